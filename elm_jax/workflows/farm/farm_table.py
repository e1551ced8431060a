"""Reads a farm's table of experts: JSON lines or CSV, one row for each expert."""

from collections.abc import Mapping
from typing import Any

from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import storage
from elm_jax.workflows.train.stack_table import csv_rows


def read_table(path: storage.PathLike) -> list[dict[str, Any]]:
    """Reads a table of experts, JSON lines or CSV: ``task``, and the settings of each expert.

    ``expert_id`` defaults to the task's name. Any other column is a gin macro or parameter; an empty cell
    sets nothing. CSV cells are read as gin values, or as text if that fails.

    Raises:
        InputError: no rows, a row without a task, an id that is no file name or occurs twice.
    """
    if str(path).endswith(".csv"):
        found = list(csv_rows(path))
        for row, line in found:
            if any(row.get(None) or ()):
                raise InputError(describe("A row of the table has more cells than there are columns",
                                          where=f"{path}, line {line}", got=row[None],
                                          cure="put cells that hold commas in quotes"))
        rows = [{name: _cell(value) for name, value in row.items() if name and value} for row, _ in found]
        lines = [line for _, line in found]
    else:
        rows = list(row_files.read_lines(path))  # which refuses empty lines between them
        lines = list(range(1, len(rows) + 1))
    if not rows:
        raise InputError(describe("The table of experts has no rows", where=path))
    ids: dict[str, int] = {}
    for number, row in zip(lines, rows, strict=True):
        where = f"{path}, line {number}"
        if not isinstance(row.get("task"), str) or not row["task"].strip():
            raise InputError(describe("A row of the table has no task", where=f"{where}: task",
                                      got=in_short(row)))
        row.setdefault("expert_id", row["task"])
        storage.require_name(row["expert_id"], f"{where}: expert_id, or else task", "expert_id")
        if ids.setdefault(row["expert_id"], number) != number:
            raise InputError(describe(
                "Two rows of the table have one expert_id", where=where, got=row["expert_id"],
                expected=f"another one than line {ids[row['expert_id']]}"))
    return rows


def _cell(text: str) -> Any:
    import ast  # late: for tables only

    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):  # nested too deep, too
        return text.strip()


def bindings_of(row: Mapping[str, Any]) -> list[str]:
    """Converts a row's columns to gin bindings."""
    names = {"task": "TASK", "expert_id": "train.expert_id"}
    return [f"{names.get(name, name)} = {value!r}" for name, value in row.items() if name != "gin_file"]
