"""Router `fitted`: a small regression from how general and how near an expert is to its score.

It is fitted on a library itself: the targets are the data sets that its experts were trained on, the queries
their keys, the scores those of the experts that were trained on others (`Priors.generality`).
"""

import collections
import dataclasses
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings, RoutingCase
from elm_jax.routing.evidence import Evidence, no_evidence, observe
from elm_jax.routing.fitted import FittedRouter
from elm_jax.routing.routers.by_prior import match_share, prior_scores, with_known

FEATURES: dict[str, tuple[Callable[[RoutingCase], np.ndarray], float]] = {
    "prior": (prior_scores, 1.0),
    "nearest": (lambda case: np.log(match_share(case, "mean_nearest")), RouterSettings().match_weight),
    "centroid": (lambda case: np.log(match_share(case, "mean_centroid")), 0.0),
}
"""What is known of experts, f64[R, E], by name, larger is better; and its usual weight: `prior+nearest`."""
FEWEST = 3
"""Experts below which a task says nothing of features."""


def fitted_scores(case: RoutingCase) -> np.ndarray:
    """Weighted sums f64[R, E] of the features that the fit names."""
    scores = np.zeros(case.evidence.votes.shape)
    for name, weight in case.weights.items():
        if name not in FEATURES:
            raise unknown_name("feature of the router fitted", name, FEATURES,
                               cure="run `elm library calibrate` again")
        scores += weight * FEATURES[name][0](case)
    return with_known(case, scores)


def fit_router(library: RoutedLibrary, targets: Sequence[RoutedTask] | None = None) -> FittedRouter:
    """Fits the weights of `FEATURES` on tasks of the data sets of a library's priors.

    Args:
        library: with priors, and for its own targets the data sets of its experts.
        targets: tasks with queries, text or both; by default `own_targets`.

    Raises:
        InputError: there are no priors or data sets, a target is of none of their data sets, or nothing is
            left to fit.
    """
    if library.priors is None:
        raise InputError(describe("The router fitted is fitted on priors, and the library has none",
                                  cure="run `elm library calibrate`"))
    targets = own_targets(library) if targets is None else targets
    families = tuple(dict.fromkeys(library.priors.families))
    size, number = len(FEATURES), len(families)
    sums = (np.zeros((number + 1, number, size, size)), np.zeros((number + 1, number, size)),
            np.zeros((number + 1, number)))
    counts = collections.Counter(target.dataset for target in targets)
    for target in targets:
        if target.dataset not in library.priors.datasets:
            raise unknown_name("data set of the priors", str(target.dataset), library.priors.datasets)
        place = library.priors.datasets.index(target.dataset)
        family, counted = library.priors.families[place], _counted(library, place)
        if counted.sum() < FEWEST:
            continue
        evidence, text = (_pooled(rows, library) for rows in (target.queries, target.text))
        scores, of = library.priors.generality[counted, place], families.index(family)
        for out in [*range(of), *range(of + 1, number + 1)]:
            prior = _prior(library, {family, *families[out:out + 1]})
            case = RoutingCase(evidence, text, prior, counted, RouterSettings())
            for total, part in zip(sums, _means(case, scores), strict=True):
                total[out, of] += part / counts[target.dataset]
    if not sums[2].any():
        raise InputError(describe("Nothing can be fitted on the library",
                                  got="no data set of an expert on which three others were scored",
                                  cure="calibrate on the experts' own tasks"))
    return FittedRouter(tuple(FEATURES), tuple(usual for _, usual in FEATURES.values()), families, *sums)


_FITS: "weakref.WeakKeyDictionary[RoutedLibrary, FittedRouter]" = weakref.WeakKeyDictionary()


def fit_of(library: RoutedLibrary) -> FittedRouter:
    """The fit that a library has, or that of its own targets, which is kept; errors as `fit_router`."""
    if library.fitted is not None:
        return library.fitted
    if library not in _FITS:
        _FITS[library] = fit_router(library)
    return _FITS[library]


def why_no_fit(library: RoutedLibrary, dataset: str | None = None, family: str | None = None) -> str | None:
    """Why the router fitted has no weights for a target, in words; None if it has."""
    try:
        fit_of(library).weights(library.family_of(dataset, family))
    except InputError as error:
        return str(error).replace("\n  ", "; ")
    return None


def own_targets(library: RoutedLibrary, *, queries: int = 32, most: int = 2_000) -> list[RoutedTask]:
    """The data sets of a library's experts as targets: keys of an expert are the queries of one.

    Args:
        library: with priors, and the data sets of its experts.
        queries: keys of an expert at most.
        most: keys over all targets; an expert of each data set is always taken.

    Raises:
        InputError: the data sets are not known.
    """
    if library.datasets is None:
        raise InputError(describe("It is not known which data sets the experts were trained on",
                                  cure="run `elm library calibrate`"))
    index, found = library.index, []
    each = max(1, most // (queries * max(1, len(library.priors.datasets))))
    for dataset in library.priors.datasets:
        own = np.flatnonzero(library.different & [dataset in names for names in library.datasets])
        found += [RoutedTask(index.keys[spread(index.places_of(expert), queries)],
                             dataset=dataset) for expert in spread(own, each)]
    return found


def _counted(library: RoutedLibrary, place: int) -> np.ndarray:
    """bool[E], the experts to rank for a data set of the priors: scored on it, and not trained on it."""
    dataset = library.priors.datasets[place]
    own = np.array([dataset in names for names in library.datasets or ()] or False)
    return library.different & ~own & ~np.isnan(library.priors.generality[:, place])


def _pooled(rows: np.ndarray | None, library: RoutedLibrary) -> Evidence | None:
    """Evidence of queries f32[Q, K], or of a text f32[K], as one group; None of no text."""
    if rows is None:
        return None
    rows = np.atleast_2d(rows)
    return (observe(rows, library.index, library.copies, num_centroids=1).pooled() if len(rows)
            else no_evidence(len(library.index.experts)))


def _prior(library: RoutedLibrary, left_out: set[str]) -> np.ndarray:
    """Priors f64[E] without the data sets of some families."""
    priors = library.priors
    kept = [place for place, family in enumerate(priors.families) if family not in left_out]
    return dataclasses.replace(
        priors, generality=priors.generality[:, kept], datasets=tuple(priors.datasets[k] for k in kept),
        families=tuple(priors.families[k] for k in kept)).for_task()


def _means(case: RoutingCase, scores: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means over the experts of one target of products of features f64[p, p], with scores f64[p], of scores.

    All are centred.
    """
    values = np.stack([feature(case)[0, case.different] for feature, _ in FEATURES.values()], axis=1)
    values = values - values.mean(axis=0)
    scores = scores - scores.mean()
    products = values.T @ values, values.T @ scores, scores @ scores
    return tuple(product / len(scores) for product in products)


def spread(places: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of i64[n], evenly spread, the first among them."""
    count = min(count, len(places))
    return places[np.arange(count) * len(places) // max(1, count)]
