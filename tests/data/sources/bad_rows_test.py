"""Bad rows: each fault is one error with file, line and field. Rows to be left out are counted."""

import collections
import gzip
import json
import pathlib
import re

import pytest

import elm_jax as elm
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry
from elm_jax.data.registry.task_rows import describe_dropped
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError

ASK = PromptTemplate("Ask", "{{text}} {{words | join(', ')}} ||| {{answer_choices[label]}}", "no ||| yes",
                     ("Accuracy",))
GOOD = {"text": "t", "words": ["a"], "label": 1}


@pytest.fixture
def task(tmp_path, monkeypatch) -> registry.PromptedTask:
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(registry, "_TASKS", {})
    (tmp_path / "toys").mkdir()
    return registry.get_task(registry.add_prompted_task("toys", None, ASK, kind="rank", role="train"))


def write(rows: list[dict | bytes], name: str = "train.jsonl") -> pathlib.Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = pathlib.Path(row_files.data_dir()) / "toys" / name
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def render(task: registry.PromptedTask) -> tuple[list, collections.Counter]:
    dropped = collections.Counter()
    return list(task.render_rows("train", dropped)), dropped


@pytest.mark.parametrize("row, field, found", [
    ({**GOOD, "label": "1"}, "label", "text: '1'"), ({**GOOD, "label": [1]}, "label", "list"),
    ({**GOOD, "label": True}, "label", "true or false"), ({**GOOD, "text": 5}, "text", "number: '5'"),
    ({**GOOD, "words": "a"}, "words", "text: 'a'"), ({**GOOD, "words": {"a": 1}}, "words", "object"),
])
def test_a_field_of_another_type_is_named(task, row, field, found):
    path = write([GOOD, GOOD, row])
    with pytest.raises(InputError, match=rf"(?s)Field '{field}' is of another type.*{re.escape(str(path))}, "
                                         rf"line 3\n.*got: {re.escape(found)}.*as in .*line 1$"):
        render(task)


def test_a_field_may_be_null_in_some_rows(task):
    write([{**GOOD, "text": None}, GOOD])
    assert len(render(task)[0]) == 2


@pytest.mark.parametrize("field", ["text", "words", "label"])
def test_a_missing_field_is_named(task, field):
    path = write([GOOD, {name: value for name, value in GOOD.items() if name != field}])
    with pytest.raises(InputError, match=rf"(?s){re.escape(str(path))}, line 2\n.*missing {field}"):
        render(task)


def test_a_row_on_which_the_template_fails_is_shown(task):
    path = write([GOOD, {**GOOD, "words": None}])
    with pytest.raises(InputError, match=rf"(?s)'Ask' fails.*{re.escape(str(path))}, line 2\n.*TypeError.*"
                                         r"label = 1, text = 't', words = None"):
        render(task)


@pytest.mark.slow
def test_a_row_on_which_the_template_does_not_end_is_shown(task):
    path = write([GOOD])
    spin = PromptTemplate("Spin", "{% for a in range(99999) %}{% for b in range(99999) %}{{text}}{% endfor %}"
                          "{% endfor %} ||| b", None)
    registry.add_prompted_task("toys", None, spin, kind="generation", role="train")
    with pytest.raises(InputError, match=rf"(?s)'Spin' fails.*{re.escape(str(path))}, line 1\n"
                                         r".*TemplateLimit"):
        render(registry.get_task("toys__spin"))


def test_an_adapter_that_lacks_a_field_is_named(task):
    registry.add_prompted_task("toys", "b", ASK, kind="rank", role="train", source=("toys", None),
                               adapt=lambda row: {"text": row["body"], "words": [], "label": 1})
    path = write([GOOD])
    with pytest.raises(InputError, match=rf"(?s)lacks a field.*toys_b__ask.*{re.escape(str(path))}, line 1\n"
                                         r".*'body'.*label, text, words"):
        render(registry.get_task("toys_b__ask"))


@pytest.mark.parametrize("bad, line, message", [
    (b'{"text": "t", ', 2, "Line is not valid JSON"), (b"", 2, "Line is empty"),
    (b"[1]", 2, "not a JSON object"), (b'{"text": "half \\udc00 sign"}', 2, "half of a surrogate pair"),
    (b"\xff\xfe{}", 2, "not UTF-8"),
    (b'{"text": "' + b"x" * 50_000_000 + b'"}', 2, "Line is too long"),
], ids=["broken", "empty", "list", "surrogate", "UTF-16", "50 MB"])
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_lines_are_named(task, bad, line, message, zipped):
    path = write([GOOD, bad, GOOD])
    if zipped:
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
        path = path.with_suffix(".jsonl.gz")
    with pytest.raises(InputError, match=rf"(?s){message}.*{re.escape(str(path))}, line {line}\n") as error:
        render(task)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n  \n\n"])
def test_a_byte_order_mark_and_empty_last_lines_are_passed_over(end, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\\ud83d\\ude00"}\n' + end)
    assert list(row_files.read_lines(path)) == [{"a": 1}, {"a": "\N{GRINNING FACE}"}]
    path.write_bytes(b"\xef\xbb\xbf" + end)
    with pytest.raises(InputError, match="file is empty"):
        list(row_files.read_lines(path))


@pytest.mark.parametrize("prompt", ["{{text}} ||| no", lambda row: {"inputs": row["text"], "targets": "no"}])
def test_a_text_that_is_no_character_is_named_whatever_gave_it(prompt):
    rows = [{"text": "a"}, {"text": "\udc00"}]
    name = elm.add_task(f"half_{callable(prompt)}", "t", lambda split: rows, prompt)
    with pytest.raises(InputError, match=r"(?s)half of a surrogate pair.*train, row 2"):
        render(registry.get_task(name))


def test_a_gzip_cut_short_is_named(task):
    path = write([{**GOOD, "text": str(number * 7919)} for number in range(2000)])
    content = gzip.compress(path.read_bytes())
    path.unlink()
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(content[:-1000])
    with pytest.raises(InputError, match=rf"(?s)cut off or damaged.*{re.escape(str(path))}, line \d+\n"):
        render(task)


def test_what_t0_leaves_out_is_left_out_and_counted(task):
    odd = PromptTemplate("Odd", "{% if words %}{{text}} ||| {{answer_choices[label]}}{{words[1]}}{% endif %}",
                         "no ||| yes")
    registry.add_prompted_task("toys", None, odd, kind="rank", role="train")
    registry.add_prompted_task("toys", "free", odd, kind="generation", role="train", source=("toys", None))
    write([GOOD, {**GOOD, "label": 7}, {**GOOD, "words": []}, {**GOOD, "text": " "},
           {**GOOD, "words": ["a", "b"]}])
    kept, dropped = render(registry.get_task("toys__odd"))
    assert [index for index, _ in kept] == [0]
    assert dropped == {"target is empty": 1, "skipped by the template": 1, "input is empty": 1,
                       "target is none of the choices": 1}
    assert describe_dropped(dropped).startswith("4 dropped (1 target is empty, 1 skipped")
    assert describe_dropped({}) == "0 dropped"
    kept, dropped = render(registry.get_task("toys_free__odd"))  # whose choices are not ranked
    assert [index for index, _ in kept] == [0, 4] and sum(dropped.values()) == 3
