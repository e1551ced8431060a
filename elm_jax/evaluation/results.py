"""Evaluation results on disk: one row for each (expert, task, metric), and the predictions behind it."""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage

SCHEMA_VERSION = 2
"""Since 2 a row holds ``num_cut`` and ``source_length``, a ranked prediction ``label``."""
READABLE_VERSIONS = (1, SCHEMA_VERSION)
"""Versions that reports read; a run computes rows of an older version again."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Result of one expert on one task.

    Attributes:
        rows: one a metric, as ``results.jsonl`` holds them.
        predictions: one an instance, in the order of their indices.
    """

    rows: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


class ResultsStore:
    """A folder of results; results in it are not computed again.

    Files: ``results.jsonl`` (appended to; of equal keys the newest row counts) and
    ``predictions/<expert>/<task>.<split>.jsonl``, written whole before its row.

    Attributes:
        folder: of the results.
        path: of the rows.
    """

    def __init__(self, folder: storage.PathLike, file_name: str = "results.jsonl") -> None:
        """Reads the existing rows; a half-written last line is dropped.

        Raises:
            InputError: a line is not a result row of this schema version.
        """
        self.folder = storage.as_path(folder)
        self.path = self.folder / file_name
        self._rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self._metrics: set[str] = set()
        for number, row in enumerate(storage.read_jsonl(self.path), start=1):
            found = row.get("schema_version") if isinstance(row, dict) else None
            if found not in READABLE_VERSIONS:
                raise InputError(describe(
                    "A result row has a schema version that this program does not read",
                    where=f"{self.path}, line {number}", got=found,
                    expected=" or ".join(map(str, READABLE_VERSIONS)),
                    cure="write the results into another folder"))
            self._remember(row)

    def rows(self) -> list[dict[str, Any]]:
        """The newest row of every (expert, task, split, metric), in the order of first writing."""
        return list(self._rows.values())

    def rows_of(self, expert: str, task: str, split: str) -> list[dict[str, Any]]:
        """The newest rows of an expert on a task, one for each metric."""
        found = (self._rows.get((expert, task, split, metric)) for metric in sorted(self._metrics))
        return [row for row in found if row is not None]

    def done(self, expert: str, task: str, split: str, digest: str) -> bool:
        """Whether the newest row of an expert on a task has this schema and this digest of settings."""
        return any(
            row["schema_version"] == SCHEMA_VERSION and row["settings"] == digest
            and self._predictions_path(expert, task, split).exists()
            for row in self.rows_of(expert, task, split))

    def append(self, result: TaskResult) -> None:
        """Writes the predictions whole, then the rows."""
        row = result.rows[0]
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in result.predictions)
        storage.write_text(self._predictions_path(row["expert"], row["task"], row["split"]), lines)
        storage.append_jsonl(self.path, result.rows)
        for row in result.rows:
            self._remember(row)

    def predictions(self, expert: str, task: str, split: str = "validation") -> list[dict[str, Any]]:
        """All predictions of one expert on one task, in the order of the instances' indices.

        Raises:
            InputError: there are none.
        """
        path = self._predictions_path(expert, task, split)
        if not path.exists():
            raise InputError(describe("There are no predictions of this expert on this task",
                                      where=path, cure="evaluate it"))
        return storage.read_jsonl(path)

    def values(self, expert: str, task: str, split: str = "validation") -> np.ndarray:
        """Per-instance values f64[n] in order of the indices: 0 or 1 for accuracy, ROUGE-L for generation."""
        return np.asarray([one["correct"] if "correct" in one else one["rouge_l"]
                           for one in self.predictions(expert, task, split)], np.float64)

    def _remember(self, row: dict[str, Any]) -> None:
        self._rows[row["expert"], row["task"], row["split"], row["metric"]] = row
        self._metrics.add(row["metric"])

    def _predictions_path(self, expert: str, task: str, split: str) -> epath.Path:
        for what, name in (("expert", expert), ("task", task), ("split", split)):
            storage.require_name(name, self.path, f"name of the {what} of a result")
        return self.folder / "predictions" / expert / f"{task}.{split}.jsonl"
