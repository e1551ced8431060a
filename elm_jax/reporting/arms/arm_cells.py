"""Per-row scores of a study of arms, by what was trained: arm, set-up, rows, mixture.

A score is a value of a row of a task, averaged over the seeds of its runs: an answer's credit (a fraction),
or the target's loss with a minus sign (nats a token), so that more is better in both.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.results import ResultsStore

ACCURACY, LOSS = METRICS = ("accuracy", "target_loss")
UNITS = {ACCURACY: "points", LOSS: "nats a token"}
TITLES = {ACCURACY: "accuracy", LOSS: "target loss"}
TAGS = ("arm", "setup", "rows", "few_shot", "tuned_on", "ablation", "with", "shots", "start")
"""Columns of result rows that say what a model is, but for its seed."""


@dataclasses.dataclass(frozen=True)
class ArmCell:
    """Scores of one model on one task.

    Attributes:
        values: by metric f64[n], in the order of the rows' indices; no accuracy of generated answers, and NaN
            for a loss of a row that has no right choice.
        indices: i64[n].
        dataset: of the task.
        chance: expected accuracy of guessing; None where answers are generated.
    """

    values: Mapping[str, np.ndarray]
    indices: np.ndarray
    dataset: str
    chance: float | None


Tags = tuple[tuple[str, Any], ...]


class ArmScores:
    """All scores of a study, read from its results.

    Args:
        store: of the results.
    """

    def __init__(self, store: ResultsStore) -> None:
        self._cells: dict[tuple[Tags, str], list[ArmCell]] = {}
        self.rows: list[dict[str, Any]] = []
        accuracies = {(row["expert"], row["task"], row["split"]): row["chance"] for row in store.rows()
                      if row["metric"] == ACCURACY}
        for row in store.rows():
            if row["metric"] != LOSS or "arm" not in row:
                continue
            key = row["expert"], row["task"], row["split"]
            cell = _cell(row, store.predictions(*key), key in accuracies, accuracies.get(key))
            self._cells.setdefault((_tags(row), row["task"]), []).append(cell)
            self.rows.append(row)

    def has(self, task: str, **tags: Any) -> bool:
        """Whether a model of these tags was scored on a task."""
        return (_tags(tags), task) in self._cells

    def cell(self, task: str, **tags: Any) -> ArmCell:
        """Scores on a task of the models of these tags, the mean over their seeds.

        Raises:
            InputError: there are none, or the seeds were not scored on the same rows.
        """
        cells = self._cells.get((_tags(tags), task))
        if not cells:
            raise InputError(describe("A score of the study is missing", where=f"{task}: {tags}",
                                      cure="run the study again: it computes what is missing"))
        first = cells[0]
        if any(not np.array_equal(first.indices, cell.indices) for cell in cells):
            raise InputError(describe("Models were not scored on the same rows", where=f"{task}: {tags}"))
        return dataclasses.replace(first, values={
            metric: np.mean([cell.values[metric] for cell in cells], axis=0) for metric in first.values})

    def values(self, metric: str, tasks: Sequence[str], **tags: Any) -> dict[str, np.ndarray]:
        """Scores f64[n] by task; tasks without the metric are left out."""
        cells = {task: self.cell(task, **tags) for task in tasks}
        return {task: cell.values[metric] for task, cell in cells.items() if metric in cell.values}


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Paired differences f64[n] of two sets of scores, by task.

    Raises:
        InputError: they are of other tasks or other rows.
    """
    if one.keys() != other.keys() or any(len(one[task]) != len(other[task]) for task in one):
        raise InputError(describe("Scores of other tasks or rows are compared", got=sorted(other),
                                  expected=sorted(one)))
    return {task: one[task] - other[task] for task in one}


def mean_of(several: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean of several sets of scores, row by row."""
    return {task: np.mean([scores[task] for scores in several], axis=0) for task in several[0]}


def _tags(row: Mapping[str, Any]) -> Tags:
    return tuple((name, row[name]) for name in TAGS if row.get(name) is not None and not (
        name == "few_shot" and not row[name]))


def _cell(row: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], ranks: bool,
          chance: float | None) -> ArmCell:
    losses = np.asarray([np.nan if one["target_loss"] is None else -one["target_loss"]
                         for one in predictions])
    values = {LOSS: losses}
    if ranks:
        values[ACCURACY] = np.asarray([one["correct"] for one in predictions], np.float64)
    return ArmCell(values, np.asarray([one["index"] for one in predictions]), row["dataset"], chance)
