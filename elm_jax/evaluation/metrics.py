"""Metrics with 95% intervals, as fractions from 0 to 1; and the metrics of SeqIO's tasks, in percent.

A share has Wilson's interval; a mean has the normal approximation's.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe

Z95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of instances behind it.
    """

    value: float
    low: float
    high: float
    n: int


def accuracy(correct: Sequence[float]) -> Estimate:
    """Share of correct answers, with Wilson's score interval (no continuity correction).

    Args:
        correct: 0 or 1 an instance.

    Raises:
        InputError: no instance, or a value that is neither 0 nor 1.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    values = _values(correct, "correct")
    if not np.isin(values, (0, 1)).all():
        raise InputError(describe("Right or wrong is 1 or 0", got=values[~np.isin(values, (0, 1))][0]))
    count = len(values)
    share, square = values.mean(), Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(
        share * (1 - share) / count + square / (4 * count**2))
    return Estimate(float(share), max(0.0, float(centre - half)), min(1.0, float(centre + half)), count)


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """Mean with the normal interval; for a single value the interval is that value.

    Raises:
        InputError: no value.
    """
    values = _values(values, "values")
    half = Z95 * math.sqrt(_variance_of_mean(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, len(values))


def rouge_l(prediction: str, target: str) -> float:
    """ROUGE-L F1 with Porter stemming, by the rouge_score package.

    Source: Lin 2004, https://aclanthology.org/W04-1013.
    """
    return float(_scorer().score(target, prediction)["rougeL"].fmeasure)


def text_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions that equal their target, ignoring case and punctuation."""
    hits = [_plain(target) == _plain(prediction)
            for target, prediction in zip(targets, predictions, strict=True)]
    return {"accuracy": 100.0 * float(np.mean(hits))}


def text_rouge_l(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean of `rouge_l` in percent."""
    scores = [rouge_l(prediction, target) for target, prediction in zip(targets, predictions, strict=True)]
    return {"rouge_l": 100.0 * float(np.mean(scores))}


TEXT_METRICS = {"rank": text_accuracy, "generation": text_rouge_l}
"""By kind of task, the metric of predicted texts in SeqIO's terms: ``(targets, predictions)``, in percent."""


def _plain(text: str) -> str:
    """Removes case, punctuation and repeated white space from a text."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(kept.split())


@functools.lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score import rouge_scorer  # late: brings nltk and absl with it

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _values(values: Sequence[float], where: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise InputError(describe("A metric needs one value an instance", where=where,
                                  got=f"shape {array.shape}", expected="at least one instance"))
    return array


def _variance_of_mean(values: np.ndarray) -> float:
    """Estimated variance of the mean; 0 for a single value."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0
