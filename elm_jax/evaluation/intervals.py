"""Intervals of 95%: Wilson's for a score, the paired bootstrap's for a difference, and one over data sets.

A score's interval lies in [0, 1], a difference's in [-1, 1], and neither ever has zero width: also a score of
1 on all rows is uncertain. Intervals over data sets (`over_datasets`) ask another question: what other data
sets would have given.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from elm_jax.errors import InputError, describe

Z95 = 1.959963984540054
Z80 = 0.8416212335729143
"""Quantile 0.8 of the normal distribution."""
NO_VARIANCE = 1e-24
"""What rounding alone leaves of equal values' variance."""
MOST_CERTAIN = 10_000
"""Values that hardly differ are at most as certain as so many rights and wrongs each."""
RESAMPLES = 2000
DATASET_RESAMPLES = 10_000
_DRAWN_AT_ONCE = 1 << 21
_MISSING = 9.0
"""Stands for a value that is not there, where equal rows are counted; differences lie in [-1, 1]."""


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


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` instances (no continuity correction).

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    square = Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def effective_count(mean: float, variance: float, count: int) -> float:
    """Number of right-or-wrong instances whose mean is as uncertain as this one.

    Args:
        mean: in [0, 1].
        variance: estimate of the mean's variance, with the divisor n - 1.
        count: of independent instances; returned where the variance says nothing, since no value differs. The
            result is at most `MOST_CERTAIN` times as many.
    """
    if variance <= NO_VARIANCE or not 0 < mean < 1:
        return count
    return min(mean * (1 - mean) / variance + 1, MOST_CERTAIN * count)


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """Mean of values from 0 to 1, with Wilson's interval.

    Values between 0 and 1, such as ROUGE-L or the credit of an answer, count as so many rights and wrongs
    as are equally uncertain (`effective_count`).

    Raises:
        InputError: no value, or one outside of [0, 1].
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise InputError(describe("A metric needs one value an instance", where="values",
                                  got=f"shape {array.shape}", expected="at least one instance"))
    outside = array[~((array >= 0) & (array <= 1))]
    if outside.size:
        raise InputError(describe("A score is a number from 0 to 1", where="values", got=outside[0]))
    mean, count = float(array.mean()), len(array)
    binary = bool(np.isin(array, (0, 1)).all())
    variance = float(array.var(ddof=1) / count) if count > 1 else 0.0
    low, high = wilson(mean, count if binary else effective_count(mean, variance, count))
    return Estimate(mean, low, high, count)


def combined(parts: Sequence[Estimate], count: int) -> Estimate:
    """Mean of independent estimates, with the interval that follows from theirs.

    Each limit lies as far from the mean as the parts' own distances, combined as independent errors are.
    Source: Zou and Donner 2008, https://doi.org/10.1002/sim.3095 (their method of variance estimates
        recovery).

    Args:
        parts: at least one.
        count: instances behind all of them.
    """
    value = float(np.mean([part.value for part in parts]))
    below = math.sqrt(sum((part.value - part.low)**2 for part in parts)) / len(parts)
    above = math.sqrt(sum((part.high - part.value)**2 for part in parts)) / len(parts)
    return Estimate(value, max(0.0, value - below), min(1.0, value + above), count)


def paired_difference(datasets: Sequence[np.ndarray], seed: int = 0) -> Estimate:
    """Mean over data sets of paired differences, with the bootstrap's percentile interval.

    The instances of each data set are drawn again with replacement, together with two that were never seen
    and differ as far as any did (fully, where none did), one in either direction: differences that happen
    to be equal are not certain.

    Args:
        datasets: of each the differences f64[n, P] of n instances under P prompts, in [-1, 1]; NaN where a
            prompt does not ask an instance. A data set's value is the mean over its prompts.
        seed: of the draws.

    Source: Efron 1979, https://doi.org/10.1214/aos/1176344552.
    """
    rng = np.random.default_rng(seed)
    value = float(np.mean([np.nanmean(own, axis=0).mean() for own in datasets]))
    drawn = np.mean([_resampled(own, rng) for own in datasets], axis=0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, min(value, float(low)), max(value, float(high)), sum(map(len, datasets)))


def _resampled(differences: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Means f64[resamples] of one data set whose n instances are drawn again; equal instances are one row."""
    count, prompts = differences.shape
    rows, counts = np.unique(np.where(np.isnan(differences), _MISSING, differences), axis=0,
                             return_counts=True)
    extreme = np.full((1, prompts), np.nanmax(np.abs(differences)) or 1.0)
    rows, counts = np.concatenate([rows, extreme, -extreme]), np.append(counts, [1, 1])
    asked = rows != _MISSING
    values = np.where(asked, rows, 0.0)
    means = []
    block = max(1, _DRAWN_AT_ONCE // len(rows))
    for start in range(0, resamples, block):
        draws = rng.multinomial(count, counts / counts.sum(), size=min(block, resamples - start))
        means.append((draws @ values / np.maximum(draws @ asked, 1)).mean(axis=1))
    return np.concatenate(means)


def over_datasets(values: np.ndarray) -> Estimate:
    """Mean of the values f64[D] of data sets, with the percentile interval of drawing data sets again.

    One data set says nothing of others: its interval is NaN. Values that are all equal have no width.
    """
    return _over_datasets(values, np.ones(len(values)))


def over_tasks_and_rows(tasks: Sequence[np.ndarray], seed: int = 0) -> Estimate:
    """Mean over tasks of paired differences, with the interval of drawing tasks again, and rows within each.

    A task that is drawn twice has rows of its own each time. The rows are drawn as by `paired_difference`,
    so no interval has zero width. Several runs of a task are averaged row by row before: what they differ by
    is a part of what tasks differ by.

    Drawing D tasks again is too narrow where D is small and tasks differ (at 2 tasks it holds the truth 70
    times of 100), so each end is the outer one of the percentile interval's and of Student's for the tasks'
    means. One task says nothing of others: then the interval is that of its rows alone.

    Args:
        tasks: of each the differences f64[n] of its rows, finite, in any unit.
        seed: of the draws.

    Sources: Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8 (two stages);
        Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789 (of few, too narrow).
    """
    from scipy.special import stdtrit  # late: start-up

    rng, count = np.random.default_rng(seed), len(tasks)
    unit = max(float(np.max(np.abs(own))) for own in tasks) or 1.0  # `_resampled` takes values in [-1, 1]
    drawn = rng.integers(count, size=(RESAMPLES, count))
    means = np.empty(drawn.shape)
    for number, own in enumerate(tasks):
        here = drawn == number
        if here.any():
            means[here] = unit * _resampled(np.asarray(own, np.float64)[:, None] / unit, rng, int(here.sum()))
    own_means = np.asarray([np.mean(own) for own in tasks])
    value = float(own_means.mean())
    half = 0.0 if count < 2 else float(stdtrit(count - 1, 0.975) * own_means.std(ddof=1)) / math.sqrt(count)
    low, high = np.quantile(means.mean(axis=1), (0.025, 0.975))
    return Estimate(value, min(value - half, float(low)), max(value + half, float(high)),
                    sum(map(len, tasks)))


def smallest_seen(estimate: Estimate) -> float:
    """The smallest true difference that such an interval leaves zero out for, with a chance of 80 %.

    From the interval's width, as that of a normal error: ``(1.96 + 0.84) * standard error``.
    """
    return (Z95 + Z80) * (estimate.high - estimate.low) / (2 * Z95)


def share_over_datasets(parts: np.ndarray, wholes: np.ndarray) -> Estimate | None:
    """Mean of parts f64[D] as a share of the mean of wholes f64[D], both drawn again together.

    Returns:
        None if the interval of the wholes' mean is not above zero: then there is nothing to have a share of.
    """
    whole = over_datasets(wholes)
    return _over_datasets(parts, wholes) if whole.low > 0 else None


def _over_datasets(parts: np.ndarray, wholes: np.ndarray) -> Estimate:
    count = len(parts)
    value = float(np.mean(parts) / np.mean(wholes))
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DATASET_RESAMPLES)
    below = draws @ wholes
    kept = below > 0  # of wholes whose interval is above zero all but a few
    low, high = np.quantile((draws @ parts)[kept] / below[kept], (0.025, 0.975))
    return Estimate(value, min(value, float(low)), max(value, float(high)), count)
