"""BIG-bench and BBH rows become the prompts that their files ask for."""

import json
import pathlib

import pytest
from elm_jax.tasks import bbh, bigbench

from elm_jax.data.registry import registry
from elm_jax.errors import InputError


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
