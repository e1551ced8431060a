"""None of these: from which similarity on a router's first expert fits a task, by a library's own tasks.

An expert's own keys are a task that the library has; with the experts of its data set taken out, they are
one that it has not. Each key is compared with the others, never with itself.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.routing.cases import RoutedLibrary, RouterSettings, RoutingCase
from elm_jax.routing.evidence import Evidence, centroid_index, centroids_of, evidence_of, shared
from elm_jax.routing.fitted import Threshold
from elm_jax.routing.ranking import firsts
from elm_jax.routing.router import ROUTERS
from elm_jax.routing.routers.by_fit import fit_of, spread, why_no_fit
from elm_jax.routing.search import best_numpy

COMPARISONS = 500_000_000
"""Similarities that are computed at most: with a million keys fewer of them are queries."""
FEWEST = 2
"""Experts of which each of two halves needs one."""


def fit_thresholds(library: RoutedLibrary, routers: Collection[str] | None = None, *, queries: int = 32,
                   most: int = 2_000) -> dict[str, Threshold]:
    """Fits from which similarity on each router is sure, for one query and for `queries`.

    Args:
        library: with the data sets of its experts.
        routers: names; by default all that can decide for this library and score no rows.
        queries: keys of an expert that are the queries of one task.
        most: keys that are queries, over all experts.

    Raises:
        InputError: the data sets are not known, or fewer than two experts can be taken out.
    """
    names = list(routers) if routers is not None else [
        name for name, row in ROUTERS.items() if row.needs_rows is None
        and (library.priors is not None or not row.needs_priors)
        and not (row.needs_fit and why_no_fit(library))]
    queries = min(queries, np.bincount(library.index.owners).max(initial=1))
    found: dict[str, list[_Confidences]] = {name: [] for name in names}
    for target in _targets(library, queries, most):
        for name in names:
            found[name].append(tuple(
                _confidence(groups, experts, target, library, name)
                for evidence, experts in target.sides for groups in (evidence, evidence.pooled())))
    if min(map(len, found.values()), default=0) < FEWEST:
        raise InputError(describe(
            "Too few experts tell when none of them fits",
            expected="two of one data set each with two keys or more, beside experts of other data sets"))
    return {name: _threshold(rows, queries) for name, rows in found.items()}


_Confidences = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of a target with its own experts by query f64[q] and as a whole f64[1], then without them likewise."""


class _Target(NamedTuple):
    """An expert's keys as a task: the data set, and evidence of E' experts with and without its own."""

    dataset: str
    sides: tuple[tuple[Evidence, np.ndarray], tuple[Evidence, np.ndarray]]


def _targets(library: RoutedLibrary, queries: int, most: int) -> Iterator[_Target]:
    """Tasks of experts that are evenly spread over the library, of one data set and two keys or more."""
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
    nearest, centroid = best_numpy(asked, index), best_numpy(asked, centroid_index(index))
    ends = np.cumsum([len(places) for places in drawn])
    for expert, keys, places, end in zip(targets, own, drawn, ends, strict=True):
        rows, dataset = slice(end - len(places), end), next(iter(library.datasets[expert]))
        others = np.flatnonzero(different & [dataset not in names for names in library.datasets])
        if len(others):
            apart = _without_themselves(
                (nearest[rows], centroid[rows]), library, expert, index.keys[keys], places)
            yield _Target(dataset, tuple(
                (evidence_of(*(one[:, kept] for one in apart), np.ones(len(places), bool)), kept)
                for kept in (np.flatnonzero(different), others)))


def _without_themselves(similarities: tuple[np.ndarray, np.ndarray], library: RoutedLibrary, expert: int,
                        own: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarities f32[q, E] with nearest keys and centroids, none of a key with itself.

    Args:
        similarities: of keys of one expert with those of all, themselves among them.
        library: of E experts.
        expert: its position.
        own: f32[S, K], its keys.
        drawn: i64[q], the places among them of those that were compared.
    """
    nearest, centroid = (np.array(one, np.float32) for one in similarities)
    among = own[drawn] @ own.T
    among[np.arange(len(drawn)), drawn] = -np.inf
    means = np.concatenate([centroids_of(np.delete(own, place, axis=0), 1) for place in drawn])
    copies = np.arange(nearest.shape[1]) if library.copies is None else library.copies
    same = copies == expert
    nearest[:, same] = among.max(axis=1, keepdims=True)
    centroid[:, same] = (own[drawn] * means).sum(axis=1, keepdims=True)
    return shared(nearest, copies), shared(centroid, copies)


def _confidence(evidence: Evidence, experts: np.ndarray, target: _Target, library: RoutedLibrary, router: str
                ) -> np.ndarray:
    """Mean similarities f64[R] with the nearest keys of the router's first, of some experts i64[E']."""
    family, everyone = library.family_of(target.dataset), np.ones(len(experts), bool)
    prior = None if library.priors is None else library.priors.for_task(target.dataset, family)[experts]
    weights = fit_of(library).by_feature(family) if ROUTERS[router].needs_fit else None
    case = RoutingCase(evidence, None, prior, everyone, RouterSettings(), weights=weights)
    first = firsts(np.asarray(ROUTERS[router].score(case), np.float64), evidence, everyone)
    return evidence.mean_nearest[np.arange(len(first)), first]


def _threshold(rows: list[_Confidences], queries: int) -> Threshold:
    """The threshold of one router, for one query and for the queries of a target."""
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
