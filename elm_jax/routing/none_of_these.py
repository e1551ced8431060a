"""None of these: from which similarity on a library has an expert for a task, by its own tasks.

What counts is the mean similarity of a task's queries with the expert whose keys are nearest, whichever a
router puts first: a general one is often far, of tasks that the library has, too.

An expert's own keys are a task that the library has; with the experts of its data set taken out, they are
one that it has not. Each key is compared with the others, never with itself.
"""

from collections.abc import Iterator

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.routing.cases import RoutedLibrary
from elm_jax.routing.fitted import Threshold
from elm_jax.routing.routers.by_fit import spread
from elm_jax.routing.search import best_numpy

COMPARISONS = 500_000_000
"""Similarities that are computed at most: with a million keys fewer of them are queries."""
FEWEST = 2
"""Experts of which each of two halves needs one."""


def fit_threshold(library: RoutedLibrary, *, queries: int = 32, most: int = 2_000) -> Threshold:
    """Fits from which similarity on a library has an expert for a task, for one query and for `queries`.

    Args:
        library: with the data sets of its experts.
        queries: keys of an expert that are the queries of one task.
        most: keys that are queries, over all experts.

    Raises:
        InputError: the data sets are not known, fewer than two experts can be taken out, or the keys are
            means, which are nearer to each other than queries are to them.
    """
    if library.of_means:
        raise InputError(describe(
            "Whether none of the experts fits is told by training instances as queries",
            got="a library that keeps means and no instances", cure="do not ask for it, or build the library "
            "of instances (without --means)"))
    queries = int(min(queries, np.bincount(library.index.owners).max(initial=1)))
    rows = list(_targets(library, queries, most))
    if len(rows) < FEWEST:
        raise InputError(describe(
            "Too few experts tell when none of them fits",
            expected="two of one data set each with two keys or more, beside experts of other data sets"))
    return _threshold(rows, queries)


_Confidences = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of a task with its own experts by query f64[q] and as a whole f64[1], then without them likewise."""


def _targets(library: RoutedLibrary, queries: int, most: int) -> Iterator[_Confidences]:
    """Confidences of tasks of experts, evenly spread over those of one data set and two keys or more."""
    if library.datasets is None:
        raise InputError(describe("It is not known which data sets the experts were trained on",
                                  cure="do not ask whether none of them fits"))
    index, different = library.index, library.different
    voting = np.flatnonzero(index.keys.any(axis=1))
    counts = np.bincount(index.owners[voting], minlength=len(index.experts))
    usable = np.flatnonzero(different & (counts > 1) & [len(names) == 1 for names in library.datasets])
    most = min(most, COMPARISONS // max(1, len(index)))
    targets = spread(usable, max(FEWEST, most // queries))
    own = [voting[index.owners[voting] == expert] for expert in targets]
    drawn = [spread(np.arange(len(keys)), queries) for keys in own]
    if not len(targets):
        return
    asked = index.keys[np.concatenate([keys[places] for keys, places in zip(own, drawn, strict=True)])]
    nearest = best_numpy(asked, index)
    ends = np.cumsum([len(places) for places in drawn])
    for expert, keys, places, end in zip(targets, own, drawn, ends, strict=True):
        dataset = next(iter(library.datasets[expert]))
        others = np.array([dataset not in names for names in library.datasets], bool)
        if others.any():
            rows = nearest[end - len(places):end]
            apart = _without_themselves(rows, library, expert, index.keys[keys], places)
            yield tuple(values for kept in (apart, apart[:, others])
                        for values in (kept.max(axis=1), kept.mean(axis=0).max(keepdims=True)))


def _without_themselves(nearest: np.ndarray, library: RoutedLibrary, expert: int, own: np.ndarray,
                        drawn: np.ndarray) -> np.ndarray:
    """Similarities f64[q, E] of keys with the nearest of each expert, none with itself.

    Args:
        nearest: f32[q, E], of keys of one expert with those of all, themselves among them.
        library: of E experts.
        expert: its position.
        own: f32[S, K], its keys.
        drawn: i64[q], the places among them of those that were compared.
    """
    among = own[drawn] @ own.T
    among[np.arange(len(drawn)), drawn] = -np.inf
    same = [expert] if library.copies is None else library.copies == library.copies[expert]
    found = nearest.astype(np.float64)
    found[:, same] = among.max(axis=1, keepdims=True)
    return found


def _threshold(rows: list[_Confidences], queries: int) -> Threshold:
    """The threshold for one query and for the queries of a target."""
    facts = {}
    for size, fits, fits_not in ((1, 0, 2), (queries, 1, 3)):
        halves = [tuple(np.concatenate([row[side] for row in rows[start::2]]) for side in (fits, fits_not))
                  for start in (0, 1)]
        value = best_threshold(*map(np.concatenate, zip(*halves, strict=True)))
        facts[size] = value, float(np.mean([balanced_accuracy(best_threshold(*one), *other)
                                            for one, other in (halves, halves[::-1])]))
    return Threshold(tuple(facts), *zip(*facts.values(), strict=True))


def best_threshold(fits: np.ndarray, fits_not: np.ndarray) -> float:
    """The value that tells two groups apart with the largest `balanced_accuracy`; of equal ones the lowest.

    It is in the middle between two values that are there, or below all.

    Args:
        fits: f64[n], what should be at or above it.
        fits_not: f64[m], what should be below.
    """
    values = np.unique(np.concatenate([fits, fits_not]))
    places = np.concatenate([values[:1] - 1e-3, (values[:-1] + values[1:]) / 2])
    right = (1 - np.searchsorted(np.sort(fits), places) / len(fits)
             + np.searchsorted(np.sort(fits_not), places) / len(fits_not))
    return float(places[(right >= right.max() - 1e-12).argmax()])


def balanced_accuracy(threshold: float, fits: np.ndarray, fits_not: np.ndarray) -> float:
    """Mean of the part of `fits` at or above a threshold and the part of `fits_not` below."""
    return float(np.mean(fits >= threshold) + np.mean(fits_not < threshold)) / 2
