"""Reads rows of data sets: JSON lines in a data folder, else what TFDS has prepared (`tfds_rows`).

```
ELM_DATA_DIR/<dataset>[/<config>]/{train,validation}.jsonl[.gz]   one JSON object a line, UTF-8; test.jsonl
                                                                  stands for a validation that is not there
ELM_DATA_DIR/<dataset>/<config>.jsonl[.gz]                        split ``test``, if it is the only
ELM_DATA_DIR/<dataset>[/<config>]/templates.yaml
ELM_DATA_DIR/index.json                                           optional facts of each data set
```
"""

import codecs
import dataclasses
import functools
import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from elm_jax.data.draw import draw_rows
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.sources import tfds_rows
from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import records, storage
from elm_jax.runtime.config_checks import items_of

logger = logging.getLogger(__name__)

DATA_DIR_VARIABLE = "ELM_DATA_DIR"
MAX_LINE_BYTES = 10_000_000
"""Most bytes of one row: a longer line means a file without line breaks, or no text data."""
_SUFFIXES = (".jsonl.gz", ".jsonl")


def data_dir() -> epath.Path | None:
    """Path of the data folder that ELM_DATA_DIR names; None if it is not set."""
    value = os.environ.get(DATA_DIR_VARIABLE)
    return storage.as_path(value) if value else None


def find_file(dataset: str, config: str | None, split: str) -> epath.Path | None:
    """Path of a split's file below the data folder; None if there is none."""
    folder = data_dir()
    if folder is None:
        return None
    stems = [f"{dataset}/{config}/{split}" if config else f"{dataset}/{split}"]
    if config and split == "test":
        stems.append(f"{dataset}/{config}")
    for stem in stems:
        for suffix in _SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.exists():
                return path
    return None


@dataclasses.dataclass(frozen=True)
class FoundSplit:
    """A split's rows on disk: a file of JSON lines, or a prepared TFDS data set.

    Attributes:
        path: a file of JSON lines, or the folder of a prepared TFDS data set.
        split: ours, or TFDS's own name of it.
        tfds: the data set's name in TFDS, None for JSON lines.
    """

    path: epath.Path
    split: str
    tfds: tfds_rows.TfdsName | None = None

    @property
    def transforms(self) -> bool:
        """Whether reading changes the rows, so that the files' hash does not describe them."""
        return self.tfds is not None and (self.tfds.adapt is not None or bool(self.tfds.fields))

    def read(self) -> list[dict[str, Any]]:
        """Reads all rows, in the files' order."""
        if self.tfds is None:
            return list(read_lines(self.path))
        return tfds_rows.read_rows(self.path, self.tfds, self.split)

    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.read()) if self.tfds is None else tfds_rows.splits_of(self.path)[self.split]

    def fields(self) -> frozenset[str] | None:
        """Names of the rows' fields if a TFDS data set records them; else None."""
        return None if self.tfds is None else tfds_rows.fields_of(self.path, self.tfds)

    def files(self) -> list[epath.Path]:
        """Paths of the files that hold the rows."""
        if self.tfds is None:
            return [self.path]
        return sorted(path for path in self.path.iterdir() if f"-{self.split}." in path.name)

    def place_of(self, index: int) -> str:
        """File and line of a row, for errors."""
        if self.tfds is None:
            return f"{self.path}, line {index + 1}"
        return f"{self.path}, split {self.split}, row {index + 1}"


@dataclasses.dataclass(frozen=True)
class OwnFile:
    """A split in a file of JSON lines that the user named.

    Attributes:
        path: of the file.
        split: the split.
        held_out: share of the file's rows that are its split ``validation``, drawn by a fixed seed, the
            others being ``train``; None where the whole file is the split.
    """

    path: epath.Path
    split: str
    held_out: float | None = None

    @property
    def transforms(self) -> bool:
        """Whether reading changes or selects the rows."""
        return self.held_out is not None

    def exists(self) -> bool:
        """Whether the file exists."""
        return self.path.exists()

    def read(self) -> list[dict[str, Any]]:
        """Reads all rows of the split, in the file's order."""
        rows = list(read_lines(self.path))
        return rows if self.held_out is None else [rows[number] for number in self._numbers(len(rows))]

    def _numbers(self, count: int) -> list[int]:
        if count < 2:
            raise InputError(describe("One row cannot be split into train and validation", where=self.path,
                                      cure="give more rows, or a file for each split"))
        drawn = set(draw_rows(count, min(max(1, round(self.held_out * count)), count - 1), 0).tolist())
        return [number for number in range(count) if (number in drawn) == (self.split == "validation")]

    @functools.cached_property
    def _lines(self) -> list[int]:
        return self._numbers(sum(1 for _ in read_lines(self.path)))

    def files(self) -> list[epath.Path]:
        """Path of the file, in a list."""
        return [self.path]

    def place_of(self, index: int) -> str:
        """File and line of a row, for errors."""
        line = index if self.held_out is None else self._lines[index]
        return f"{self.path}, line {line + 1}"


def find_split(dataset: str, config: str | None, split: str) -> FoundSplit | None:
    """Finds a split's rows: JSON lines below the data folder, else a TFDS data set, else None."""
    path = find_file(dataset, config, split)
    if path is None and split == "validation":  # as of TFDS's: many sets of the hub have only a test split
        path = find_file(dataset, config, "test")
        if path is not None:
            _tell_once(f"{dataset}: {path} serves as validation")
    if path is not None:
        return FoundSplit(path, split)
    found = tfds_rows.find(dataset, config)
    name = None if found is None else tfds_rows.split_name(*found, split)
    return None if name is None else FoundSplit(found[0], name, found[1])


@functools.cache
def _tell_once(message: str) -> None:
    logger.info(message)


def read_rows(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """Reads all rows of a split, in the file's order.

    Raises:
        InputError: no data folder, no such file, or a line that is not a whole JSON object.
    """
    found = find_split(dataset, config, split)
    if found is None:
        name = dataset_path(dataset, config)
        raise InputError(describe(
            f"There are no {split} rows of {name}",
            where=f"{DATA_DIR_VARIABLE}={os.environ.get(DATA_DIR_VARIABLE, '')}",
            expected=f"a file {name}/{split}.jsonl.gz below the data folder, or the data set as TFDS "
            f"prepares it, below {tfds_rows.TFDS_DIR_VARIABLE}",
            cure=f"set {DATA_DIR_VARIABLE} to a folder that has the data set"))
    return found.read()


def read_lines(path: storage.PathLike) -> Iterator[dict[str, Any]]:
    """Reads the objects of a JSON-lines file (gzip by its suffix ``.gz``).

    A byte order mark at its start and empty lines at its end, which other programs write, are passed over.

    Raises:
        InputError: with file and line: the file is missing or empty, its gzip stream breaks off, or
            a line is empty, half written, too long, not JSON, not UTF-8, or not an object, or holds half of a
            surrogate pair, which is no character.
    """
    path = storage.as_path(path)
    if not path.exists():
        raise InputError(describe("Data file does not exist", where=path, got=storage.what_is_there(path)))
    raw = io.BytesIO(storage.read_bytes(path))
    stream = gzip.GzipFile(fileobj=raw) if str(path).endswith(".gz") else raw
    number, empty, has_rows = 0, "", False
    while True:
        where = f"{path}, line {number + 1}"
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(describe("Data file is cut off or damaged", where=where, got=error,
                                      cure="fetch or write the file again")) from error
        if not line:
            break
        if len(line) > MAX_LINE_BYTES:
            raise InputError(describe("Line is too long", where=where, got=f"{line[:60]!r} and so on",
                                      expected=f"at most {MAX_LINE_BYTES:,} bytes a row",
                                      cure="end each row with a line break, or cut its texts"))
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            empty = empty or where
            continue
        if empty:
            raise InputError(describe("Line is empty", where=empty, expected="one JSON object"))
        has_rows = True
        yield _parse(line, where)
    if not has_rows:
        raise InputError(describe("Data file is empty", where=f"{path}, line 1", got="no rows"))


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_number)
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(describe("Line holds half of a surrogate pair, which is no character", where=where,
                                  got=repr(error.object[error.start])[1:-1],
                                  expected="whole characters: a pair such as \\ud83d\\ude00, or none",
                                  cure="replace it, by \\ufffd say")) from error
    except UnicodeDecodeError as error:
        raise InputError(describe("Line is not UTF-8", where=where, got=error,
                                  cure="save the file as UTF-8")) from error
    except json.JSONDecodeError as error:
        rule = "Line is not valid JSON" if line.endswith(b"\n") else "Line is half written"
        start = line[:80].decode("utf-8", "replace").rstrip()
        raise InputError(describe(rule, where=where, got=f"{start!r} ({error.msg})")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(describe("Line cannot be read", where=where, got=str(error)[:200])) from error
    if not isinstance(row, dict):
        raise InputError(describe("Line is not a JSON object", where=where,
                                  got=type(row).__name__, expected="an object of fields"))
    return row


def _no_number(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")


@dataclasses.dataclass(frozen=True)
class IndexEntry:
    """What ``index.json`` says of a data set: the number of rows of each split, among other facts."""

    name: str
    config: str | None
    splits: dict[str, int] = dataclasses.field(default_factory=dict)


def read_index() -> dict[tuple[str, str | None], dict[str, Any]]:
    """Reads the facts of each data set below the data folder, by name and config; empty without an index.

    Raises:
        InputError: the index is not a JSON list of objects with ``name`` and ``config``.
    """
    folder = data_dir()
    if folder is None or not (folder / "index.json").exists():
        return {}
    path = folder / "index.json"
    entries = storage.parse_json(storage.read_text(path), "index of the data folder", path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(describe("The index of the data folder is damaged", where=path,
                                  got=in_short(entries),
                                  expected="a JSON list of objects with name and config"))
    for number, entry in enumerate(entries):
        records.check_record(entry, IndexEntry, kind="index of the data folder", where=f"{path}, [{number}]")
    return {(entry["name"], entry["config"]): entry for entry in entries}


def num_rows(dataset: str, config: str | None, split: str) -> int:
    """Number of rows of a split, from the index or by reading the file."""
    entry = read_index().get((dataset, config))
    if entry is not None and split in entry.get("splits", {}):
        return entry["splits"][split]
    found = find_split(dataset, config, split)
    return len(read_rows(dataset, config, split)) if found is None else found.num_rows()


def read_passages(
    dataset: str, config: str | None, fields: Sequence[str], split: str = "train"
) -> Iterator[str]:
    """Reads the raw passages of a training data set, each once, in the file's order.

    Args:
        dataset: name of the data set.
        config: its config, None without one.
        fields: fields to join, a line each, into one passage; a field may hold a text or a list
            of texts. Which fields of which data set are raw passages: ``tasks/passages.py``.
        split: never a split that anything is evaluated on.

    Raises:
        InputError: a row lacks a field, or holds something else than text in it.
    """
    seen, fields = set(), items_of(fields)
    rows, found = read_rows(dataset, config, split), find_split(dataset, config, split)
    for number, row in enumerate(rows):
        passage = "\n".join(_field_text(row, field, found.place_of(number)) for field in fields).strip()
        if passage and passage not in seen:
            seen.add(passage)
            yield passage


def _field_text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise InputError(describe("A row lacks the passage's field", where=where, got=field,
                                  expected=f"one of {', '.join(sorted(row))}"))
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    raise InputError(describe("A passage's field does not hold text", where=where,
                              got=f"{field}: {type(value).__name__}"))
