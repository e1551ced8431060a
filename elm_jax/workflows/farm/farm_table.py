"""A farm's table of experts: JSON lines or CSV, one row an expert."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage


def read_table(path: storage.PathLike) -> list[dict[str, Any]]:
    """Rows of a table of experts, JSON lines or CSV: ``task``, and what else is set for each.

    ``expert_id`` is the task's name where a row has none. Any other column is a gin macro or parameter,
    without its value in empty cells; CSV cells are read as gin would, and as text where that fails.

    Raises:
        InputError: no rows, a row without a task, an id that is no file name or stands twice.
    """
    if str(path).endswith(".csv"):
        rows = [{name: _cell(value) for name, value in row.items() if name and value not in (None, "")}
                for row in csv.DictReader(io.StringIO(storage.read_text(path)))]
    else:
        rows = list(row_files.read_lines(path))
    if not rows:
        raise InputError(describe("The table of experts has no rows", where=path))
    ids: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row.get("task"), str) or not row["task"].strip():
            raise InputError(describe("A row of the table has no task", where=where, got=row))
        row.setdefault("expert_id", row["task"])
        storage.require_name(row["expert_id"], where, "expert_id")
        if ids.setdefault(row["expert_id"], number) != number:
            raise InputError(describe(
                "Two rows of the table have one expert_id", where=where, got=row["expert_id"],
                expected=f"another one than row {ids[row['expert_id']]}"))
    return rows


def _cell(text: str) -> Any:
    import ast  # late: for tables only

    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def bindings_of(row: Mapping[str, Any]) -> list[str]:
    """A row's columns as gin bindings."""
    names = {"task": "TASK", "expert_id": "train.expert_id"}
    return [f"{names.get(name, name)} = {value!r}" for name, value in row.items() if name != "gin_file"]
