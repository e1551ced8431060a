"""Results on disk: one row an (expert, task, metric), and every prediction behind it."""

import dataclasses
import json
from typing import Any

import numpy as np

from elm_jax import storage
from elm_jax.errors import InputError, describe

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One expert on one task: the row (one a metric) and one prediction an instance, in order."""

    rows: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


class ResultsStore:
    """A folder of results; what is in it is not computed again.

    Files: ``results.jsonl`` (appended to; of equal keys the newest row counts) and
    ``predictions/<expert>/<task>.<split>.jsonl``, written whole before the row that speaks of it.
    """

    def __init__(self, folder: storage.PathLike, file_name: str = "results.jsonl") -> None:
        self.folder = storage.as_path(folder)
        self.path = self.folder / file_name
        self._rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for row in storage.read_jsonl(self.path):
            self._remember(row)

    def _remember(self, row: dict[str, Any]) -> None:
        if row.get("schema_version") != SCHEMA_VERSION:
            raise InputError(describe("A result row has a schema version that is not read",
                                      where=self.path, got=row.get("schema_version"),
                                      expected=SCHEMA_VERSION))
        self._rows[row["expert"], row["task"], row["split"], row["metric"]] = row

    def rows(self) -> list[dict[str, Any]]:
        """The newest row of every (expert, task, split, metric), in the order of their first writing."""
        return list(self._rows.values())

    def done(self, expert: str, task: str, split: str, settings: str, model: str | None = None) -> bool:
        """Whether there is a row made with these settings (and this model), predictions included."""
        return any(
            row["settings"] == settings and (model is None or row.get("model") == model)
            and self._predictions_path(expert, task, split).exists()
            for (e, t, s, _), row in self._rows.items() if (e, t, s) == (expert, task, split))

    def append(self, result: TaskResult) -> None:
        """Writes the predictions, then the rows."""
        row = result.rows[0]
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in result.predictions)
        storage.write_text(self._predictions_path(row["expert"], row["task"], row["split"]), lines)
        storage.append_jsonl(self.path, result.rows)
        for row in result.rows:
            self._remember(row)

    def predictions(self, expert: str, task: str, split: str = "validation") -> list[dict[str, Any]]:
        """All predictions of one expert on one task, in the order of the split."""
        return storage.read_jsonl(self._predictions_path(expert, task, split))

    def values(self, expert: str, task: str, split: str = "validation") -> np.ndarray:
        """f64[n]: 1 or 0 an instance for accuracy, ROUGE-L for generation, in the split's order."""
        return np.asarray([p["correct"] if "correct" in p else p["rouge_l"]
                           for p in self.predictions(expert, task, split)], np.float64)

    def _predictions_path(self, expert: str, task: str, split: str) -> storage.PathLike:
        return self.folder / "predictions" / expert / f"{task}.{split}.jsonl"
