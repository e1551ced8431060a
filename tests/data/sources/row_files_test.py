"""Data files are read whole or not at all; an error names file and line."""

import gzip
import json
import pathlib

import pytest

from elm_jax.data.sources import row_files
from elm_jax.errors import InputError

ROWS = [{"text": f"passage {number}", "label": number % 2} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    (tmp_path / "toys" / "big").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("config, name", [
    (None, "toys/train.jsonl"), (None, "toys/train.jsonl.gz"), ("big", "toys/big/train.jsonl.gz")])
def test_rows_of_plain_and_zipped_files(folder, config, name):
    write = gzip.open if name.endswith(".gz") else open
    with write(folder / name, "wt") as file:
        file.write(LINES)
    assert row_files.read_rows("toys", config, "train") == ROWS
    assert row_files.num_rows("toys", config, "train") == 5


def test_single_file_of_a_config_is_its_test_split(folder):
    (folder / "toys" / "small.jsonl").write_text(LINES)
    assert row_files.read_rows("toys", "small", "test") == ROWS
    assert row_files.find_file("toys", "small", "train") is None


def test_last_line_may_lack_its_line_end(folder):
    (folder / "toys" / "train.jsonl").write_text(LINES.rstrip("\n"))
    assert row_files.read_rows("toys", None, "train") == ROWS


@pytest.mark.parametrize("content, line, message", [
    (b"", 1, "Data file is empty"),
    (LINES.encode()[:-9], 5, "Line is half written"),
    (b'{"a": 1}\n\n{"a": 2}\n', 2, "Line is empty"),
    (b'{"a": 1}\nhello\n{"a": 2}\n', 2, "Line is not valid JSON"),
    (b'{"a": 1}\n[1, 2]\n', 2, "Line is not a JSON object"),
    (b'{"a": 1}\n{"a": "\xff"}\n', 2, "Line is not UTF-8"),
])
def test_bad_lines_are_named(folder, content, line, message):
    (folder / "toys" / "train.jsonl").write_bytes(content)
    (folder / "toys" / "big" / "train.jsonl.gz").write_bytes(gzip.compress(content))
    for config, name in ((None, "train.jsonl"), ("big", "train.jsonl.gz")):
        with pytest.raises(InputError, match=rf"(?s){message}.*{name}, line {line}(\n|$)"):
            row_files.read_rows("toys", config, "train")


def test_cut_off_and_damaged_gzip_is_named(folder):
    path = folder / "toys" / "train.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"n": n * 7919}) + "\n" for n in range(500)).encode())
    for content in (whole[:-20], whole[:len(whole) // 2], b"not gzip at all\n",
                    whole[:200] + b"\0" * 200 + whole[400:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"(?s)cut off or damaged|Line is.*line \d+"):
            row_files.read_rows("toys", None, "train")


def test_missing_data_say_where_they_were_looked_for(folder, monkeypatch):
    with pytest.raises(InputError, match=rf"(?s)no validation rows of toys/big.*{folder}.*set ELM_"):
        row_files.read_rows("toys", "big", "validation")
    monkeypatch.delenv("ELM_DATA_DIR")
    with pytest.raises(InputError, match=r"(?s)no train rows of toys.*set ELM_DATA_DIR"):
        row_files.read_rows("toys", None, "train")


def test_index(folder):
    assert row_files.read_index() == {}
    entry = {"name": "toys", "config": None, "splits": {"train": 9}}
    (folder / "index.json").write_text(json.dumps([entry]))
    assert row_files.read_index() == {("toys", None): entry}
    assert row_files.num_rows("toys", None, "train") == 9
    for damaged in ("[{", '[{"name": "toys"}]', '{"toys": 1}'):
        (folder / "index.json").write_text(damaged)
        with pytest.raises(InputError, match=r"index of the data folder is(.|\n)*index.json"):
            row_files.read_index()


def test_passages_are_joined_and_given_once(folder):
    rows = [{"title": "T", "body": ["a", "b"]}, {"title": "T", "body": ["a", "b"]},
            {"title": " ", "body": []}, {"title": "U", "body": ["c"]}]
    (folder / "toys" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(row_files.read_passages("toys", None, ("title", "body"))) == ["T\na\nb", "U\nc"]


@pytest.mark.parametrize("row, message", [
    ({"label": 1}, r"lacks the passage's field.*text"), ({"text": 3}, "does not hold text.*int")])
def test_passages_need_text(folder, row, message):
    (folder / "toys" / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"(?s){message}"):
        list(row_files.read_passages("toys", None, ("text",)))
