"""Kept predictions of a study as rows to score experts on: what routers ask for, without a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

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

    def __call__(self, experts: np.ndarray, start: int, end: int) -> np.ndarray:
        """Scores f64[n, rows] of experts i64[n], positions in the library, on rows from `start` to `end`."""
        return np.array([[_value(self.predictions(self.experts[e])[row]) for row in self.rows[start:end]]
                         for e in experts], np.float64)


def _value(found: Mapping[str, Any]) -> float:
    return found["correct"] if "correct" in found else found["rouge_l"]
