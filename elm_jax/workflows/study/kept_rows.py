"""Kept predictions of a study as rows to score experts on: what routers ask for, without a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.routing.cases import RowScores

Predictions = Sequence[Mapping[str, Any]]


class KeptRows:
    """Scores of experts on some rows of one task, from the predictions that a study kept.

    Attributes:
        num_rows: that there are.
    """

    def __init__(self, predictions: Callable[[str], Predictions], experts: Sequence[str], rows: np.ndarray
                 ) -> None:
        """Takes what gives an expert's predictions, the library's ids, and numbers i64[n] of the rows."""
        self.predictions, self.experts, self.rows = predictions, experts, rows
        self.num_rows = len(rows)

    def __call__(self, experts: np.ndarray, start: int, end: int) -> RowScores:
        """Scores experts i64[n], positions in the library, on the rows from `start` to `end`."""
        found = [[self.predictions(self.experts[e])[row] for row in self.rows[start:end]] for e in experts]
        return RowScores(*(np.array([[of(one) for one in rows] for rows in found], kind).reshape(
            len(experts), -1) for of, kind in ((_value, np.float64), (_choice, np.int64),
                                               (_margin, np.float64))))


def _value(found: Mapping[str, Any]) -> float:
    return found["correct"] if "correct" in found else found["rouge_l"]


def _choice(found: Mapping[str, Any]) -> int:
    """Number of the choice that was taken; -1 of a generation, which has none."""
    if "place" in found:
        return found["place"]
    return int(np.argmax(found["scores"])) if "scores" in found else -1


def _margin(found: Mapping[str, Any]) -> float:
    """By how much the best choice was better than the next; NaN where there is none to compare."""
    if len(found.get("scores", ())) < 2:
        return float("nan")
    next_best, best = np.sort(found["scores"])[-2:]
    return float(best - next_best)
