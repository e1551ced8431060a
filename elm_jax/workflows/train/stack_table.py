"""Reads tables of experts: one row for each expert that `elm train` trains in a stack.

``.jsonl`` has one object a line, ``.csv`` a heading. Columns: ``task`` (required; one task, or tasks
separated by commas), ``expert_id``, ``learning_rate``, ``train_steps``, ``epochs``, ``seed``,
``max_examples``. What a row leaves out (in CSV: leaves empty) is as in the run's config.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime import storage


@dataclasses.dataclass(frozen=True)
class Row:
    """One expert of a table; None in a field means: as in the config that all experts share.

    Attributes:
        task: a task or a mixture, or several separated by commas, that the expert is trained on.
        expert_id: its name; None for the task's.
        learning_rate: peak of the schedule.
        train_steps: length of its run; or `epochs`.
        epochs: passes over its data.
        seed: `random_seed` of its run; the column keeps its short name, which tables on disk have.
        max_examples: at most this many examples of each dataset an epoch.
    """

    task: str
    expert_id: str | None = None
    learning_rate: float | None = None
    train_steps: int | None = None
    epochs: float | None = None
    seed: int | None = None
    max_examples: int | None = None

    @property
    def id(self) -> str:
        """Name of the expert."""
        return self.expert_id or self.task


_KINDS: dict[str, type] = {"task": str, "expert_id": str, "learning_rate": float, "train_steps": int,
                           "epochs": float, "seed": int, "max_examples": int}


def rows_of_table(path: storage.PathLike) -> list[Row]:
    """Reads a table of experts.

    Raises:
        InputError: the file is not there or not a table, a column is unknown, a value is of the wrong
            kind, a row names no task. File and line are named.
    """
    name = str(path)
    if name.endswith(".csv"):
        rows = _read_csv(path, name)
    elif name.endswith(".jsonl"):
        rows = [_row(value, f"{name}, line {number}", _typed)
                for number, value in enumerate(row_files.read_lines(path), start=1)]
    else:
        raise InputError(describe("A table of experts is .jsonl or .csv", where=name))
    if not rows:
        raise InputError(describe("The table of experts is empty", where=name))
    return rows


def csv_rows(path: storage.PathLike) -> Iterator[tuple[dict[Any, Any], int]]:
    """Reads a table with a heading: each row by column, and the number of the line on which it begins.

    Raises:
        InputError: the file is missing, is no text, names a column twice, or has a cell of more than 131,072
            characters.
    """
    reader = csv.DictReader(io.StringIO(storage.read_text(path), newline=""))
    try:
        names = [name for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise InputError(describe("A column of the table occurs twice", where=f"{path}, line 1",
                                      got=next(name for name in names if names.count(name) > 1)))
        for row in reader:
            breaks = sum(cell.count("\n") for cell in row.values() if isinstance(cell, str))
            yield row, reader.line_num - breaks
    except csv.Error as error:
        raise InputError(describe("The table cannot be read", where=f"{path}, line {reader.line_num + 1}",
                                  got=error)) from error


def _read_csv(path: storage.PathLike, name: str) -> list[Row]:
    found = []
    for value, line in csv_rows(path):
        where = f"{name}, line {line}"
        if None in value or None in value.values():
            raise InputError(describe("A row of the table has not as many cells as the heading", where=where,
                                      expected=", ".join(filter(None, value))[:300]))
        cells = {key.strip(): cell.strip() for key, cell in value.items()}
        found.append(_row({key: cell for key, cell in cells.items() if cell or key not in _KINDS}, where,
                          _parsed))
    return found


def _row(value: Mapping[str, Any], where: str, convert: Callable[[str, Any, str], Any]) -> Row:
    for column in value:
        if column not in _KINDS:
            raise unknown_name("column", str(column), _KINDS, where=where)
    row = Row(**{"task": "", **{column: convert(column, cell, where) for column, cell in value.items()
                                if cell is not None}})
    if not row.task:
        raise InputError(describe("A row of the table names no task", where=where))
    storage.require_name(row.id, where, "expert_id")
    if row.train_steps is not None and row.epochs is not None:
        raise InputError(describe("Give the length of training once", where=where,
                                  got=f"train_steps={row.train_steps}, epochs={row.epochs}"))
    return row


def _typed(column: str, cell: Any, where: str) -> Any:
    """Converts a JSON value to its column's type."""
    kind = _KINDS[column]
    fits = isinstance(cell, (int, float) if kind is float else kind) and not isinstance(cell, bool)
    if not fits:
        raise _wrong(column, cell, where)
    return kind(cell)


def _parsed(column: str, cell: str, where: str) -> Any:
    """Converts a CSV cell to its column's type."""
    try:
        return _KINDS[column](cell)
    except ValueError as error:
        raise _wrong(column, cell, where) from error


def _wrong(column: str, cell: Any, where: str) -> InputError:
    words = {str: "text", int: "a whole number", float: "a number"}
    return InputError(describe("A value of the table is of the wrong kind", where=f"{where}, {column}",
                               got=repr(cell), expected=words[_KINDS[column]]))
