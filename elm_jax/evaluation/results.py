"""Evaluation results on disk: one row for each (expert, task, metric), and the predictions behind it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluation_settings import KNOWN_METRICS, PRIMARY
from elm_jax.evaluation.intervals import mean_with_interval
from elm_jax.evaluation.script_words import is_plain
from elm_jax.runtime import storage

SCHEMA_VERSION = 3
"""Since 3 a row names its interval, ROUGE-L knows all scripts, and each of several right answers has its
credit; since 2 it holds ``num_cut`` and ``source_length``, and a ranked prediction ``label``."""
READABLE_VERSIONS = (1, 2, SCHEMA_VERSION)
"""Versions that reports read; a run computes rows of version 1 again, and those of 2 whose value changes."""


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
        """The newest rows of an expert on a task, one for each metric, that of the task's kind first."""
        order = sorted(self._metrics, key=lambda metric: (metric not in PRIMARY.values(), metric))
        found = (self._rows.get((expert, task, split, metric)) for metric in order)
        return [row for row in found if row is not None]

    def done(self, expert: str, task: str, split: str, digest: str, *, metrics: Sequence[str] = (),
             several_right: bool = False) -> bool:
        """Whether the newest rows of an expert on a task hold for this digest of settings.

        Args:
            expert: id.
            task: name.
            split: of the task.
            digest: of the settings.
            metrics: that are wanted beside that of the task's kind; those of the other kind do not count.
            several_right: whether several choices of a row may be right, which older versions did not credit.
        """
        rows = [row for row in self.rows_of(expert, task, split) if row["settings"] == digest]
        kinds = [kind for kind, metric in PRIMARY.items() if any(row["metric"] == metric for row in rows)]
        if not kinds or not self._predictions_path(expert, task, split).exists():
            return False
        wanted = {PRIMARY[kinds[0]], *(name for name in metrics if name in KNOWN_METRICS[kinds[0]])}
        return wanted <= {row["metric"] for row in rows if self._holds(row, several_right)}

    def _holds(self, row: Mapping[str, Any], several_right: bool) -> bool:
        """Whether a row has the value that it would have now."""
        if row["schema_version"] == SCHEMA_VERSION:
            return True
        if row["schema_version"] < 2 or several_right:
            return False
        return row["metric"] != "rouge_l" or all(
            is_plain(found["prediction"]) and is_plain(found["target"])
            for found in self.predictions(row["expert"], row["task"], row["split"]))

    def with_interval(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the interval that it would have now: older versions had some beyond 0 and 1."""
        if "interval" in row or row["metric"] not in PRIMARY.values():
            return row
        if not self._predictions_path(row["expert"], row["task"], row["split"]).exists():
            return row
        found = mean_with_interval(self.values(row["expert"], row["task"], row["split"]))
        return {**row, "ci95_low": found.low, "ci95_high": found.high}

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
        """Per-instance values f64[n] in order of the indices: credit for accuracy, ROUGE-L for generation."""
        return np.asarray([one["correct"] if "correct" in one else one["rouge_l"]
                           for one in self.predictions(expert, task, split)], np.float64)

    def _remember(self, row: dict[str, Any]) -> None:
        self._rows[row["expert"], row["task"], row["split"], row["metric"]] = row
        self._metrics.add(row["metric"])

    def _predictions_path(self, expert: str, task: str, split: str) -> epath.Path:
        for what, name in (("expert", expert), ("task", task), ("split", split)):
            storage.require_name(name, self.path, f"name of the {what} of a result")
        return self.folder / "predictions" / expert / f"{task}.{split}.jsonl"
