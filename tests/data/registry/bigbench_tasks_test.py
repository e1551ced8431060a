"""BIG-bench and BBH rows become the prompts that their files ask for."""

import json
import pathlib

import pytest
from elm_jax.tasks import bbh, bigbench

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.prepare import prepare
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.vocabularies.vocabulary import ByteVocabulary


def write(folder: pathlib.Path, name: str, rows: list[dict]) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rendered(task: str) -> list:
    return [row for _, row in registry.get_task(task).render_rows("test")]


@pytest.mark.parametrize("text", ["[]", '{"winowhy": "x"}', "3"])
def test_settings_of_another_shape_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bigbench/winowhy.jsonl", [{"input": "One?", "target_scores": {"yes": 0, "no": 1}}])
    (tmp_path / "bigbench" / "tasks.json").write_text(text)
    with pytest.raises(InputError, match=r"(?s)no object of objects.*tasks.json"):
        rendered("bigbench_winowhy__bigbench")


def test_a_setting_that_is_not_honoured_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bigbench/winowhy.jsonl", [{"input": "One?", "target_scores": {"yes": 0, "no": 1}}])
    (tmp_path / "bigbench" / "tasks.json").write_text('{"winowhy": {"output_regex": "[a-z]"}}')
    rendered("bigbench_winowhy__bigbench")
    assert "output_regex of winowhy is not honoured" in caplog.text


def test_an_input_that_offers_one_answer_is_no_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bbh/snarks.jsonl", [{"input": "Which?\nOptions:\n(A) this", "target": "(A)"},
                                         {"input": "Which?\nOptions:\n(A) this\n(B) that", "target": "(B)"}])
    assert [row.choices for row in rendered("bbh_snarks__bbh")] == [("(A)", "(B)")]


def test_several_choices_may_have_a_score(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    scores = ({"a": 1, "b": 1, "c": 0}, {"a": 0, "b": 0.25, "c": 0.75}, {"a": 0, "b": 0}, {"a": 0, "b": 1},
              {"yes|||no": 1, "|||": 0})
    write(tmp_path, "bigbench/novel_concepts.jsonl", [
        {"input": "Which|||one?", "target_scores": own} for own in scores])
    (tmp_path / "bigbench" / "tasks.json").write_text('{"novel_concepts": {}}')
    found = rendered("bigbench_novel_concepts__bigbench")
    assert [row.targets for row in found] == ["a", "c", "", "b", "yes|||no"]
    assert [row.scores for row in found] == [(1, 1, 0), (0, 0.25, 0.75), (0, 0), None, None]
    assert [row.choices for row in found] == [tuple(own) for own in scores]
    assert found[4].inputs == "Q: Which|||one?\n choice: yes|||no\n choice: |||\nA:"
    split = prepare("bigbench_novel_concepts__bigbench", "test", ByteVocabulary())
    assert [split.label(row) for row in range(5)] == [0, 2, -1, 1, 0]
    assert [split.credits(row) for row in range(5)] == [list(map(float, own.values())) for own in scores]
    split.save(tmp_path / "arrays")
    assert PreparedSplit.open(tmp_path / "arrays").subset(5).credits(1) == [0, 0.25, 0.75]


@pytest.mark.parametrize("scores", [{"a": 2, "b": 0}, {"a": -1, "b": 1}, {}, {"a": "1", "b": "1"}])
def test_scores_that_are_no_credit_are_refused(tmp_path, monkeypatch, scores):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bigbench/novel_concepts.jsonl", [{"input": "Which?", "target_scores": scores}])
    (tmp_path / "bigbench" / "tasks.json").write_text('{"novel_concepts": {}}')
    with pytest.raises(InputError, match=r"novel_concepts"):
        rendered("bigbench_novel_concepts__bigbench")


def test_a_list_of_targets_is_a_list_of_right_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bigbench/linguistics_puzzles.jsonl", [
        {"input": "Say", "target": ["one", "two"]}, {"input": "Say", "target": "three"},
        {"input": "Say", "target": ["four"]}])
    (tmp_path / "bigbench" / "tasks.json").write_text('{"linguistics_puzzles": {}}')
    found = rendered("bigbench_linguistics_puzzles__bigbench")
    assert [row.targets for row in found] == ["one", "three", "four"]
    assert [row.references for row in found] == [("one", "two"), (), ()]
    write(tmp_path, "bbh/web_of_lies.jsonl", [{"input": "Does he lie?", "target": ["Yes", "No"]}])
    ranked, = rendered("bbh_web_of_lies__bbh")
    assert ranked.scores == (1, 1) and ranked.targets == "Yes"
    write(tmp_path, "bbh/word_sorting.jsonl", [{"input": "Sort: b a", "target": ["a b", "a, b"]}])
    written, = rendered("bbh_word_sorting__bbh")
    assert written.references == ("a b", "a, b") and registry.get_task(
        "bbh_word_sorting__bbh").metrics == ("exact_match",)


@pytest.mark.parametrize("setting, shown", [(True, True), (False, False), ("false", False), (None, True)])
def test_choices_are_shown_as_the_file_says(tmp_path, monkeypatch, setting, shown):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    settings = {"task_prefix": "Say which.", "choice_prefix": "\n option: "}
    if setting is not None:
        settings["append_choices_to_input"] = setting
    row = {"input": "One?", "target_scores": {"yes": 0, "no": 1}}
    write(tmp_path, "bigbench/winowhy.jsonl", [row])
    (tmp_path / "bigbench" / "tasks.json").write_text(json.dumps({"winowhy": settings}))
    found, = rendered("bigbench_winowhy__bigbench")
    choices = "\n option: yes\n option: no" if shown else ""
    assert found.inputs == f"Say which.\nQ: One?{choices}\nA:"
    assert found.targets == "no" and found.choices == ("yes", "no")


def test_parts_of_unlike_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bigbench/winowhy.jsonl", [{"subtask": "a", "input": "", "target_scores": {"x": 1}}])
    with pytest.raises(InputError, match=r"need their settings(?s:.*)bigbench/tasks.json"):
        rendered("bigbench_winowhy__bigbench")
    (tmp_path / "bigbench" / "tasks.json").write_text(json.dumps({
        "winowhy/a": {}, "winowhy/b": {"append_choices_to_input": False}}))
    with pytest.raises(InputError, match="unlike settings"):
        rendered("bigbench_winowhy__bigbench")


def test_a_task_without_its_file_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    for name in bigbench.TASKS + bbh.TASKS:
        assert registry.get_task(name).why_unavailable() == "no data"
        assert registry.describe_task(name)["unavailable"] == "no data"


@pytest.mark.parametrize("text, choices", [
    ("Which?\nOptions:\n(A) one\n(B) two (C) three", ["(A)", "(B)"]),
    ("(A) is no option\nOptions:\n(B) x\n(C) y\n(B) x again", ["(B)", "(C)"]),
    ("Options:\n(B) x\n(B) x again", []),
    ("Is it?\nOptions:\n- valid \n- invalid", ["valid", "invalid"]),
    ("No list", []),
])
def test_options_of_an_input(text, choices):
    assert bbh.choices_of(text) == choices


def test_bbh_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    write(tmp_path, "bbh/web_of_lies.jsonl", [{"input": "Does he lie?", "target": "Yes"}])
    write(tmp_path, "bbh/word_sorting.jsonl", [{"input": "Sort: b a", "target": "a b"}])
    ranked, = rendered("bbh_web_of_lies__bbh")
    assert (ranked.inputs, ranked.targets, ranked.choices) == ("Q: Does he lie?\nA:", "Yes", ("Yes", "No"))
    written, = rendered("bbh_word_sorting__bbh")
    assert written.targets == "a b" and written.choices is None
