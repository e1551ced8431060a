"""The verb `elm generate`: reads flags, calls one workflow, prints answers as they come."""

import argparse
import sys
from collections.abc import Iterator, Sequence

from elm_jax.cli.printing import print_json, print_lines, visible
from elm_jax.cli.registries import modules_of
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.workflows.generate import GenerateConfig, Panel, Question, Reply, read_questions
from elm_jax.workflows.row_routes import BASE_ID, RowRoute

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
FIELDS = ("base", "library", "router", "examples", "task", "split", "rows", "chat", "encoder_dir",
          "none_of_these", "none_per", "gate_task")
"""Flags that are fields of the settings, and of the config."""
SHOWN = 60
"""Characters of a training instance that a reason quotes."""


def generate(arguments: argparse.Namespace) -> None:
    """Runs `elm generate`: answers the questions that are given, or those that are typed in."""
    config = GenerateConfig(
        experts=tuple(arguments.expert), texts=tuple(arguments.texts), modules=modules_of(arguments),
        settings=GenerationSettings(**{name: getattr(arguments, name) for name in SETTINGS},
                                    stop=tuple(arguments.stop)),
        **{name: getattr(arguments, name) for name in FIELDS})
    asked = bool(config.texts or config.examples or config.task)
    if not asked and (arguments.json or not sys.stdin.isatty()):
        raise InputError(describe("There is nothing to answer", expected="texts, --examples or --task",
                                  cure="give one, or start without --json in a terminal and type"))
    questions = read_questions(config)
    panel = Panel(config)
    if arguments.json:
        replies = panel.ask(questions)
        print_json({"base": panel.base.name, "settings": config.settings.to_dict(),
                    "answers": [reply.to_dict(questions[reply.question]) for reply in replies]})
    elif not asked:
        _converse(panel)
    elif sys.stdout.isatty():
        _stream(panel, questions)
    else:
        _print(panel.ask(questions), questions)


def _converse(panel: Panel) -> None:
    """Answers each line that is typed, by itself, until the end of the input."""
    print("Each line is answered by itself; end with Ctrl-D.", file=sys.stderr)
    for number, text in enumerate(_lines(), start=1):
        try:
            _stream(panel, [Question.free(text, f"line {number}")])
        except InputError as error:  # the next line may be better
            print(visible(str(error), keep="\n\t"), file=sys.stderr)


def _lines() -> Iterator[str]:
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip():
            yield text


def _stream(panel: Panel, questions: Sequence[Question]) -> None:
    """Prints answers while they are generated, one after another."""
    routes = panel.routes(questions)
    many = len(questions) > 1 or len(routes[0]) > 1
    for number, (question, models) in enumerate(zip(questions, routes, strict=True)):
        for model, route in models:
            if heading := _heading(question, model, route, many):
                print_lines(heading)
            for piece in panel.stream(question, model, route, number):
                print(visible(piece, keep="\n\t"), end="", flush=True)
            print("\n" if many else "")


def _print(replies: Sequence[Reply], questions: Sequence[Question]) -> None:
    """Prints answers; one alone as it is, so that scripts can read it."""
    many = len(replies) > 1
    for reply in replies:
        if heading := _heading(questions[reply.question], reply.model, reply.route, many):
            print_lines(heading)
        print(reply.answer.text + ("\n" if many else ""))


def _heading(question: Question, model: str, route: RowRoute | None, many: bool) -> str:
    parts = [question.where, "the base" if model == BASE_ID else model] if many or route else []
    if route is not None:
        if route.is_sure is False:
            parts.append(f"none of the experts fits, {route.expert} would be first")
        quoted = " ".join((route.nearest or "").split())
        quoted = repr(quoted if len(quoted) <= SHOWN else f"{quoted[:SHOWN]}...")
        nearest = "nearest mean" if route.nearest is None else quoted
        parts.append(f"similarity {route.similarity:.2f} to its {nearest}")
        if route.next_expert is not None:
            parts.append(f"then {route.next_expert} with {route.next_similarity:.2f}")
    if many and question.target is not None:
        parts.append(f"target {question.target!r}")
    return f"[{'; '.join(parts)}]" if parts else ""
