"""Priors: how well an expert does on tasks that it was not trained on, before any query is seen.

The score of an expert on a task is the normal score of its rank among the experts of the library, ties at
their middle rank; its generality on a data set is the mean over that data set's tasks. Experts that were
trained on a data set have no score on it. A prior for a target is the mean over the data sets that may count:
not the target's own, nor any of its family.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from elm_jax.errors import InputError, describe


@dataclasses.dataclass(frozen=True, eq=False)
class Priors:
    """Generality of E experts on D data sets.

    Attributes:
        generality: f64[E, D], mean normal score; NaN where an expert has none.
        datasets: D names.
        families: D names of the data sets' families (kinds of task); the data set's own name without one.
    """

    generality: np.ndarray
    datasets: tuple[str, ...]
    families: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises InputError if the fields do not fit each other."""
        if self.generality.shape[1:] != (len(self.datasets),) or len(self.families) != len(self.datasets):
            raise InputError(describe("Priors do not fit their data sets", got=self.generality.shape,
                                      expected=f"[experts, {len(self.datasets)}]"))

    def for_task(self, dataset: str | None = None, family: str | None = None) -> np.ndarray:
        """f64[E], the mean over data sets without the target's own data set and family.

        An expert that was scored on none of them has 0, the mean of normal scores. Without any data set that
        may count all are 0.
        """
        counts = np.array([name != dataset and (family is None or kind != family)
                           for name, kind in zip(self.datasets, self.families, strict=True)], bool)
        known = self.generality[:, counts]
        scored = ~np.isnan(known)
        return np.where(scored, known, 0.0).sum(axis=1) / np.maximum(scored.sum(axis=1), 1)


def priors_of_scores(scores: np.ndarray, datasets: Sequence[str], families: Sequence[str],
                     copies: np.ndarray | None = None, own: np.ndarray | None = None) -> Priors:
    """Priors from a complete table of experts and tasks.

    On a task the experts that were not trained on its data set are ranked among themselves: an own task says
    nothing of other tasks, and would push all others down. Where fewer than two are left, none has a score.

    Args:
        scores: f64[E, T], larger is better; equal scores tie. NaN only of copies, and of own tasks.
        datasets: T, of each task.
        families: T, of each task.
        copies: i64[E], position of the oldest equal of each expert; copies count once in ranks, with the
            oldest's score.
        own: bool[E, T], tasks of data sets that an expert was trained on; what one of several copies was
            trained on counts for all of them.

    Raises:
        InputError: a score that counts is missing.
    """
    scores = np.asarray(scores, np.float64)
    copies = np.arange(len(scores)) if copies is None else copies
    different, group = np.unique(copies, return_inverse=True)
    ranked = np.ones((len(different), *scores.shape[1:]), bool)
    if own is not None:
        np.logical_and.at(ranked, group, ~own)
    missing = int(np.isnan(scores[different][ranked]).sum())
    if scores.ndim != 2 or missing:
        raise InputError(describe("Priors need every expert scored on every task", got=f"{scores.shape}, "
                                  f"{missing} scores missing"))
    normal = np.full(ranked.shape, np.nan)
    for task in np.flatnonzero(ranked.sum(axis=0) > 1):
        normal[ranked[:, task], task] = normal_scores(scores[different, task][ranked[:, task]])
    names = tuple(dict.fromkeys(datasets))
    of = np.array([names.index(name) for name in datasets])
    means = [_mean_of_known(normal[:, of == number]) for number in range(len(names))]
    return Priors(np.stack(means, axis=1)[group], names,
                  tuple(families[list(datasets).index(name)] for name in names))


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """f64[E], the mean of f64[E, T] over what is not NaN; NaN where nothing is known."""
    known = ~np.isnan(values)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.nan)


def normal_scores(scores: np.ndarray) -> np.ndarray:
    """Normal scores f64[E] of the ranks of f64[E], the best the largest; ties at their middle rank."""
    from scipy import stats  # late: half a second of start-up

    ranks = stats.rankdata(scores)
    return stats.norm.ppf((ranks - 0.5) / len(scores))
