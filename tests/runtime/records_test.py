"""Records: JSON objects that fit a dataclass are read as they are, others are refused by file and field."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from elm_jax.errors import InputError, spelled_out
from elm_jax.runtime import records


@dataclasses.dataclass(frozen=True)
class Part:
    number: int
    shares: list[float]


@dataclasses.dataclass(frozen=True)
class Whole:
    name: str
    parts: dict[str, Part]
    limit: float | None
    counts: list[int] | None = None
    note: Any = None


RIGHT = {"name": "a", "parts": {"x": {"number": 1, "shares": [1, 0.5]}}, "limit": None, "unknown": {"a": 1}}


def read(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    values = {name: value for name, value in {**RIGHT, **changes}.items() if value is not ...}
    (folder / "whole.json").write_text(json.dumps({"schema_version": 1, **values}))
    return records.read_record(folder / "whole.json", Whole, kind="whole")


def test_what_fits_is_read_as_it_is(tmp_path):
    """With fields of newer versions, and without those that have a default."""
    assert read(tmp_path) == {"schema_version": 1, **RIGHT}
    assert read(tmp_path, counts=[1], note=[None])["counts"] == [1]


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": 7}, r"name\n(.|\n)*got: 7\n(.|\n)*a text"),
    ({"name": ...}, r"is missing\n(.|\n)*whole.json: name"),
    ({"limit": True}, r"limit\n(.|\n)*a finite number or null"),
    ({"limit": 10**400}, r"limit\n"),
    ({"counts": [1, 2**63]}, r"counts/1\n(.|\n)*a whole number"),
    ({"parts": []}, r"parts\n(.|\n)*an object"),
    ({"parts": {"x": {"number": 1, "shares": [1, "2"]}}}, r"parts/x/shares/1\n(.|\n)*'2'"),
    ({"parts": {"x\x1b[31m": {"shares": []}}}, r"parts/x\\x1b\[31m/number\n"),
])
def test_what_does_not_fit_is_named(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as found:
        read(tmp_path, **changes)
    assert "whole.json" in str(found.value) and "\x1b" not in str(found.value)


def test_lines_are_named_by_their_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"number": 1, "shares": []}\n{"number": 1}\n')
    with pytest.raises(InputError, match=r"a.jsonl, line 2: shares"):
        records.read_records(tmp_path / "a.jsonl", Part, kind="part")


def test_signs_that_a_terminal_obeys_are_spelled_out():
    assert spelled_out("a\x1b[31m\u202e\r\nb\tc é") == "a\\x1b[31m\\u202e\\r\nb\tc é"
