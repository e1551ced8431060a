"""BIG-bench tasks, for evaluation only (the makers ask that their data stay out of training).

The input is ELM.md's: ``{task_prefix}\\nQ: {input}\\n choice: {c} ...\\nA: ``, with the task file's own
prefixes where it gives them, and without the choices where it says that they are not appended. The only
split is called ``test``. Tasks that the paper does not score have the role ``bigbench_extra``.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage

logger = logging.getLogger(__name__)

PAPER = (
    "code_line_description", "conceptual_combinations", "formal_fallacies_syllogisms_negation",
    "hindu_knowledge", "known_unknowns", "language_identification", "logic_grid_puzzle", "logical_deduction",
    "misconceptions", "movie_dialog_same_or_different", "strategyqa", "vitaminc_fact_verification", "winowhy",
)
"""The 13 tasks that the paper scores."""
RANKED = (*PAPER, "novel_concepts")
"""Tasks with choices. Several may have a score: a prediction is credited that of the chosen one."""
GENERATED = ("linguistics_puzzles",)

_DEFAULTS = {"task_prefix": "", "example_input_prefix": "\nQ: ", "choice_prefix": "\n choice: ",
             "example_output_prefix": "\nA: "}
_SHOWN = "{% for choice in choices %}{{choice_prefix}}{{choice}}{% endfor %}"


LISTS = registry.RowLists("choices", "scores", "references")


def _ranking(choices: str) -> PromptTemplate:
    return PromptTemplate(
        name="bigbench", metrics=("Accuracy",), answer_choices='{{choices | join("|||")}}',
        jinja="{{task_prefix}}{{example_input_prefix}}{{input}}" + choices
              + "{{example_output_prefix}}|||{{target}}")


RANKING = _ranking(_SHOWN)
RANKING_UNSHOWN = _ranking("")
"""For tasks whose file says ``append_choices_to_input: false``."""
GENERATION = dataclasses.replace(RANKING, answer_choices=None, metrics=("ROUGE",))


_KNOWN = {*_DEFAULTS, "append_choices_to_input", "name", "description", "keywords", "canary", "metrics",
          "preferred_score", "max_examples", "few_shot_example_separator"}
"""Settings that are honoured, or say nothing of a zero-shot input and its score by rank."""


@functools.cache
def _settings(path: str) -> dict[str, dict[str, Any]]:
    try:
        settings = json.loads(storage.read_text(path))
        if not isinstance(settings, dict) or not all(isinstance(own, dict) for own in settings.values()):
            raise InputError(describe("The settings of BIG-bench are no object of objects", where=path,
                                      got=str(settings)[:60], expected='{"winowhy": {"task_prefix": ...}}'))
        for task, own in settings.items():
            if unknown := own.keys() - _KNOWN:
                logger.warning("%s: %s of %s is not honoured", path, ", ".join(sorted(unknown)), task)
        return settings
    except json.JSONDecodeError as error:
        raise InputError(describe("The settings of BIG-bench are not valid JSON",
                                  where=f"{path}, line {error.lineno}", got=error.msg)) from error


def _settings_file() -> str | None:
    folder = row_files.data_dir()
    path = folder and folder / "bigbench" / "tasks.json"
    return str(path) if path and path.exists() else None


def _template(task: str) -> PromptTemplate:
    """A task's template, as its file says; the usual one where there is no file."""
    if task in GENERATED:
        return GENERATION
    path = _settings_file()
    parts = [] if path is None else [
        settings for key, settings in _settings(path).items() if key.split("/")[0] == task]
    unshown = {str(settings.get("append_choices_to_input", True)).lower() == "false" for settings in parts}
    if len(unshown) > 1:
        raise InputError(describe("The parts of a BIG-bench task have unlike settings", where=path,
                                  got=f"append_choices_to_input of {task}", expected="one value"))
    return RANKING_UNSHOWN if unshown == {True} else RANKING


def _adapt(row: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A row's prefixes, input, choices and target, with the scores or right texts where there are several.

    Source: https://github.com/google/BIG-bench/blob/main/docs/doc.md (``target_scores``, ``target``).
    """
    path = _settings_file()
    if path is None:
        raise InputError(describe("BIG-bench tasks need their settings", where=row_files.data_dir(),
                                  expected="a file bigbench/tasks.json below the data folder"))
    settings = _settings(path)
    key = f"{task}/{row['subtask']}" if "subtask" in row else task
    if key not in settings:
        raise InputError(describe("A BIG-bench task has no settings", where=path, got=key))
    prefixes = {name: settings[key].get(name, value) for name, value in _DEFAULTS.items()}
    if task in GENERATED:
        return {**prefixes, "input": row["input"], "choices": [], **right_texts(row["target"])}
    scores = row["target_scores"]
    if not isinstance(scores, Mapping) or not scores:
        raise InputError(describe("A BIG-bench row to rank has no scored choices", where=key,
                                  got=f"target_scores {scores!r}"[:80]))
    plain = sorted(scores.values(), reverse=True) == [1, *[0] * (len(scores) - 1)]
    return {**prefixes, "input": row["input"], "choices": list(scores),
            "target": max(scores, key=scores.__getitem__),
            **({} if plain else {"scores": list(scores.values())})}


def right_texts(target: str | list[str]) -> dict[str, Any]:
    """A row's target: a text, or the first of several right ones and all of them."""
    if isinstance(target, list):
        return {"target": target[0] if target else "", "references": target}
    return {"target": target}


def _add(task: str) -> str:
    return registry.add_prompted_task(
        "bigbench", task, "bigbench", kind="rank" if task in RANKED else "generation",
        role="bigbench" if task in PAPER else "bigbench_extra", splits=("test",), truncate=False,
        make_template=functools.partial(_template, task), adapt=functools.partial(_adapt, task=task),
        lists=LISTS, metrics=() if task in RANKED else ("exact_match",))


TASKS = [_add(task) for task in PAPER]
EXTRA_TASKS = [_add(task) for task in RANKED + GENERATED if task not in PAPER]
registry.add_mixture("bigbench", TASKS)
