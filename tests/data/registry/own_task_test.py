"""A task of one's own: from a file or a function, by a template or a function, with the same prompts."""

import collections
import json

import pytest

from elm_jax.data.registry import registry
from elm_jax.data.registry.own_task import add_task
from elm_jax.errors import InputError

ROWS = [{"text": f"ticket {number}", "team": ("billing", "shipping")[number % 2]} for number in range(30)]
PROMPT = "{{text}}\nWhich team?|||{{team}}"
CHOICES = ["billing", "shipping"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tickets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def prompts(name: str, split: str) -> list[tuple]:
    return [(row.inputs, row.targets, row.choices) for _, row in registry.get_task(name).render_rows(split)]


def expected(rows: list[dict]) -> list[tuple]:
    return [(f"{row['text']}\nWhich team?", row["team"], tuple(CHOICES)) for row in rows]


def test_one_file_is_split_without_a_row_in_both(file):
    name = add_task("own a", "which team", file, PROMPT, choices=CHOICES, held_out=0.2)
    assert name == "own_a__which_team" and registry.get_task(name).kind == "rank"
    train, validation = prompts(name, "train"), prompts(name, "validation")
    assert len(validation) == 6 and not set(train) & set(validation)
    assert sorted(train + validation) == sorted(expected(ROWS)) and validation == prompts(name, "validation")
    assert registry.get_task(name).num_rows("train") == 24
    places = [expected(ROWS).index(row) for row in train]
    assert places == sorted(places)


def test_files_functions_and_prompt_functions_give_the_same(file, tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    both = {"train": file, "validation": tmp_path / "few.jsonl"}
    names = [
        add_task("own b", "files", both, PROMPT, choices=CHOICES),
        add_task("own b", "function", {"train": ROWS, "validation": ROWS[3:4]}.get, PROMPT,
                 choices="billing ||| shipping"),
        add_task("own b", "prompt", both, lambda row: {
            "inputs": f"{row['text']}\nWhich team?", "targets": row["team"], "choices": CHOICES},
            kind="rank")]
    for name in names:
        assert prompts(name, "train") == expected(ROWS)
        assert prompts(name, "validation") == expected(ROWS[3:4])
    test_only = registry.get_task(add_task("own b", "test only", {"test": file}, PROMPT))
    assert (test_only.evaluation_split, test_only.kind) == ("test", "generation")


def test_several_right_answers_come_from_lists(tmp_path):
    rows = [{"ask": "Which?", "answers": ["one", "two"], "options": ["one", "a|||b"], "worth": [0.5, 1]},
            {"ask": "Which?", "answers": ["three"], "options": ["x", "y"], "worth": [0, 0]}]
    by_template = add_task("own e", "template", lambda _: rows, "{{ask}} ||| {{answers}}",
                           splits=("validation",), metrics=("squad_f1",))
    by_function = add_task("own e", "function", lambda _: rows, lambda row: {
        "inputs": row["ask"], "targets": row["answers"]}, splits=("validation",))
    for name in (by_template, by_function):
        found = [row for _, row in registry.get_task(name).render_rows("validation")]
        assert [(row.targets, row.references) for row in found] == [("one", ("one", "two")), ("three", ())]
    assert registry.get_task(by_template).metrics == ("squad_f1",)
    ranked = add_task("own e", "ranked", lambda _: rows, lambda row: {
        "inputs": row["ask"], "choices": row["options"], "scores": row["worth"]}, kind="rank")
    found = [row for _, row in registry.get_task(ranked).render_rows("validation")]
    assert [(row.targets, row.choices, row.scores) for row in found] == [
        ("a|||b", ("one", "a|||b"), (0.5, 1)), ("", ("x", "y"), (0, 0))]
    dropped = collections.Counter()
    assert len(list(registry.get_task(ranked).render_rows("train", dropped))) == 1
    assert dropped == {"no choice is right": 1}  # nothing to train on
    joined = add_task("own e", "joined", lambda _: rows, "{{ask}} ||| {{options[1]}}",
                      choices="{{options | join('|||')}}")
    assert prompts(joined, "validation")[0] == ("Which?", "a|||b", ("one", "a|||b"))


def test_an_error_names_the_line_of_the_file(file):
    lines = file.read_text().splitlines()
    lines[7] = '{"text": "no team"}'
    file.write_text("\n".join(lines) + "\n")
    whole = add_task("own c", "whole", {"train": file}, PROMPT, choices=CHOICES)
    held = add_task("own c", "held out", file, PROMPT, choices=CHOICES, held_out=0.5)
    function = add_task("own c", "function", {"train": file},
                        lambda row: {"inputs": row["team"], "targets": "x"})
    for name in (whole, held, function):
        with pytest.raises(InputError, match=r"(?s)lacks.*tickets.jsonl, line 8"):
            for split in registry.get_task(name).splits:
                prompts(name, split)


def test_what_is_wrong_is_refused(file, tmp_path):
    with pytest.raises(InputError, match="held_out is no share"):
        add_task("own d", "a", file, PROMPT, held_out=1.0)
    for wrong in ("a ||| b", "{{text}}", " "):
        with pytest.raises(InputError, match="empty, or holds a sign of templates"):
            add_task("own d", "b", file, PROMPT, choices=["yes", wrong])
    for number, (function, message) in enumerate((
            (lambda row: {"inputs": [][0]}, r"(?s)cannot be read as.*tickets.jsonl, line 1.*IndexError"),
            (lambda row: None, r"(?s)does not give fields.*tickets.jsonl, line 1.*None"))):
        name = add_task("own d", f"function {number}", {"train": file}, function)
        with pytest.raises(InputError, match=message):
            prompts(name, "train")
    with pytest.raises(InputError, match="gives the choices itself"):
        add_task("own d", "c", file, dict, choices=CHOICES)
    absent = add_task("own d", "absent", tmp_path / "absent.jsonl", PROMPT)
    assert registry.get_task(absent).why_unavailable() == "no data"
    with pytest.raises(InputError, match=r"(?s)Data file does not exist.*absent.jsonl"):
        prompts(absent, "train")
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match="One row cannot be split"):
        prompts(add_task("own d", "one", tmp_path / "one.jsonl", PROMPT), "train")


def test_what_the_rows_are_made_by_is_in_their_digest(file):
    """Arrays that were made by another function, or of another share, are out of date."""
    def digest_of(template: str, prompt, **facts) -> str:
        return registry.get_task(add_task("own e", template, file, prompt, **facts)).source_digest("train")

    def first(row):
        return {"inputs": row["text"], "targets": row["team"]}

    def second(row):
        return {"inputs": row["text"].upper(), "targets": row["team"]}

    digests = [digest_of("first", first), digest_of("first again", first), digest_of("second", second),
               digest_of("share", first, held_out=0.5)]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    sides = [digest_of(f"cut {side}", first, cut_prompt=side) for side in ("right", "left")]
    assert sides[0] == digests[0] and sides[1] not in digests
    with pytest.raises(InputError, match=r"cut_prompt of a task(.|\n)*left"):
        digest_of("cut both", first, cut_prompt="lfet")
    task = registry.get_task(add_task("own e", "grows", {"train": file}, PROMPT))
    before = task.source_digest("train")
    file.write_text(file.read_text() + json.dumps({"text": "one more", "team": "billing"}) + "\n")
    assert task.source_digest("train") != before
