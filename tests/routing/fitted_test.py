"""The router that is fitted on a library, and thresholds of it, against plain loops and properties."""

import dataclasses
import itertools

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings
from elm_jax.routing.fitted import STRENGTHS, FittedRouter, Threshold
from elm_jax.routing.none_of_these import balanced_accuracy, best_threshold, fit_threshold
from elm_jax.routing.priors import Priors
from elm_jax.routing.router import decide_task
from elm_jax.routing.routers.by_fit import fit_router
from tests.routing.index_test import make_index, unit_rows

OWN = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"]
FAMILIES = {"a": "x", "b": "x", "c": "y", "d": "y", "e": "z"}


def library_of(seed: int, spread: float = 0.4, copies: bool = False) -> RoutedLibrary:
    """Two experts a data set, their keys around one direction; priors NaN on own data sets, as calibrated."""
    rng = np.random.default_rng(seed)
    middles = dict(zip(FAMILIES, unit_rows(rng, 5), strict=True))
    keys = {}
    for number, own in enumerate(OWN):
        rows = middles[own] + spread * unit_rows(rng, 4)
        keys[f"e{number}"] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    generality = rng.normal(size=(10, 1)) + rng.normal(size=(10, 5))
    generality[[[one == own for one in FAMILIES] for own in OWN]] = np.nan
    return RoutedLibrary(
        make_index(keys), Priors(generality, tuple(FAMILIES), tuple(FAMILIES.values())),
        np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 8]) if copies else None,
        tuple(frozenset({own}) for own in OWN))


def plain_rows(library: RoutedLibrary, left_out: str | None) -> dict[str, list[tuple]]:
    """By family: weight, centred features and centred score of each pair of a target and an expert."""
    found: dict[str, list[tuple]] = {}
    keys = [library.index.keys[library.index.owners == e].astype(np.float64) for e in range(10)]
    for place, (dataset, family) in enumerate(FAMILIES.items()):
        if family == left_out:
            continue
        ranked = [e for e in range(10) if OWN[e] != dataset]
        score = library.priors.generality[ranked, place]
        known = [d for d, (_, kind) in enumerate(FAMILIES.items()) if kind not in (family, left_out)]
        prior = [np.nanmean(row) if not np.isnan(row).all() else 0.0
                 for row in library.priors.generality[np.ix_(ranked, known)]]
        for home in [e for e in range(10) if OWN[e] == dataset]:
            near = [np.mean([max(key @ other for other in keys[e]) for key in keys[home]]) for e in ranked]
            middle = [np.mean(keys[home] @ keys[e].sum(0)) / np.linalg.norm(keys[e].sum(0)) for e in ranked]
            shares = [np.log([np.mean([other <= one for other in match]) for one in match])
                      for match in (near, middle)]
            values = np.stack([prior, *shares], axis=1)
            for row, y in zip(values - values.mean(0), score - score.mean(), strict=True):
                found.setdefault(family, []).append((1 / (2 * len(ranked)), row, y))
    return found


def plain_ridge(rows: list[tuple], strength: float) -> np.ndarray:
    """The best of all sets of features whose weights by least squares are none below 0."""
    root = np.sqrt([weight for weight, _, _ in rows])
    x, y = root[:, None] * np.array([row for _, row, _ in rows]), root * np.array([y for _, _, y in rows])
    usual = np.array([1, 0.3, 0])
    factor = max(0, np.linalg.lstsq((x @ usual)[:, None], y, rcond=None)[0][0])
    penalty = np.diag(np.sqrt(strength * (x ** 2).sum(0)))
    x, y = np.concatenate([x, penalty]), np.concatenate([y, factor * penalty @ usual])
    best, least = np.zeros(3), y @ y
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        weights = np.zeros(3)
        weights[list(kept)] = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
        if (weights >= 0).all() and ((x @ weights - y) ** 2).sum() < least:
            best, least = weights, ((x @ weights - y) ** 2).sum()
    return best


def plain_weights(rows: dict[str, list[tuple]]) -> np.ndarray:
    """Ridge with the strength that is best on families left out in turn; 100 where there is one family."""
    def error(strength):
        others = {out: itertools.chain(*(rows[other] for other in rows if other != out)) for out in rows}
        found = {out: plain_ridge(list(kept), strength) for out, kept in others.items()}
        return sum(weight * (y - x @ found[out]) ** 2 for out in rows for weight, x, y in rows[out])

    strength = min(STRENGTHS, key=error) if len(rows) > 1 else 100
    return plain_ridge(list(itertools.chain(*rows.values())), strength)


@pytest.mark.parametrize("family", [None, "x", "z"])
def test_weights_are_those_of_a_plain_ridge_on_the_other_families(family):
    library = library_of(0)
    fitted = fit_router(library)
    assert fitted.features == ("prior", "nearest", "centroid")
    np.testing.assert_allclose(fitted.weights(family), plain_weights(plain_rows(library, family)), atol=1e-6)


def test_nothing_of_the_targets_family_is_in_its_weights():
    """Neither as scores nor by way of the priors of other tasks; other families' weights do change."""
    library = library_of(1)
    own = np.array([family == "x" for family in FAMILIES.values()])
    changed = np.where(own, 3 - 7 * library.priors.generality[:, ::-1], library.priors.generality)
    other = dataclasses.replace(library, priors=dataclasses.replace(library.priors, generality=changed))
    fits = fit_router(library), fit_router(other)
    np.testing.assert_array_equal(fits[0].weights("x"), fits[1].weights("x"))
    assert not np.allclose(fits[0].weights("y"), fits[1].weights("y"))
    task = RoutedTask(library.index.keys[:3], dataset="a")
    decisions = [decide_task(task, dataclasses.replace(library, fitted=one), "fitted") for one in fits]
    assert decisions[0] == decisions[1]


def test_a_fit_is_kept_as_json_and_says_what_is_missing():
    library = library_of(2)
    fitted = fit_router(library)
    again = FittedRouter.from_dict(fitted.to_dict())
    np.testing.assert_array_equal(again.weights("y"), fitted.weights("y"))
    for damage in ({"families": ["x"]}, {"grams": "no"}, {"squares": [[float("nan")] * 3] * 4}):
        with pytest.raises(InputError, match="calibrate"):
            FittedRouter.from_dict(fitted.to_dict() | damage)
    task = RoutedTask(library.index.keys[:3])
    assert decide_task(task, library, "fitted") == decide_task(
        task, dataclasses.replace(library, fitted=again), "fitted")
    with pytest.raises(InputError, match="elm library calibrate"):
        decide_task(task, dataclasses.replace(library, datasets=None), "fitted")
    for lacking in ({"priors": None}, {"datasets": None}):
        with pytest.raises(InputError, match="elm library calibrate"):
            fit_router(dataclasses.replace(library, **lacking))
    alone = dataclasses.replace(fitted, families=("x",), grams=np.zeros((2, 1, 3, 3)),
                                moments=np.zeros((2, 1, 3)), squares=np.ones((2, 1)))
    with pytest.raises(InputError, match="no family of tasks but"):
        alone.weights("x")
    with pytest.raises(InputError, match="data set of the priors"):
        fit_router(library, [task])


def test_the_best_threshold_is_that_of_brute_force():
    rng = np.random.default_rng(3)
    for count in (1, 4, 30):
        fits, fits_not = np.round(rng.random(count) + 0.2, 1), np.round(rng.random(count + 2), 1)
        tried = [-1, *np.linspace(-0.05, 1.3, 28)]
        best = max(balanced_accuracy(value, fits, fits_not) for value in tried)
        assert balanced_accuracy(best_threshold(fits, fits_not), fits, fits_not) == pytest.approx(best)


@pytest.mark.parametrize("copies", [False, True])
def test_a_threshold_compares_each_key_with_all_others_and_with_those_of_other_data_sets(copies):
    """By plain loops, by one query."""
    library = library_of(4, copies=copies)
    keys, owners = library.index.keys.astype(np.float64), library.index.owners
    stands = library.copies if copies else np.arange(10)
    fits, fits_not = [], []
    for key, owner in enumerate(owners):
        if stands[owner] == owner:
            likely = [keys[key] @ keys[o] for o in range(40)
                      if (stands[owners[o]] != owner or owners[o] == owner) and o != key]
            fits.append(max(likely))
            fits_not.append(max(keys[key] @ keys[o] for o in range(40) if OWN[owners[o]] != OWN[owner]))
    found = fit_threshold(library)
    assert found.num_queries == (1, 4)
    assert found.values[0] == pytest.approx(best_threshold(np.array(fits), np.array(fits_not)), abs=1e-5)


def test_a_decision_says_when_none_of_the_experts_fits():
    """Tasks near to the keys are sure, others are not; a threshold between two numbers of queries is too."""
    library = library_of(5, spread=0.2)
    library = dataclasses.replace(library, threshold=fit_threshold(library))
    assert min(library.threshold.balanced_accuracies) > 0.85
    settings, rng = RouterSettings(none_of_these=True), np.random.default_rng(6)
    near = library.index.keys[:2] + 0.1 * unit_rows(rng, 2)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    assert decide_task(RoutedTask(near), library, "vote", settings=settings).is_sure is True
    far = RoutedTask(-library.index.keys[:2])
    assert decide_task(far, library, "vote", settings=settings).is_sure is False
    assert decide_task(RoutedTask(near), library, "vote").is_sure is None
    threshold = Threshold((1, 16), (0.2, 0.6), (1.0, 1.0))
    assert [threshold.at(count) for count in (1, 4, 16, 99)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert Threshold.from_dict(threshold.to_dict()) == threshold
    with pytest.raises(InputError, match="read"):
        Threshold.from_dict({"num_queries": [1]})


def test_thresholds_that_cannot_be_told_are_one_error():
    library, settings = library_of(7), RouterSettings(none_of_these=True)
    with pytest.raises(InputError, match="fit_threshold"):
        decide_task(RoutedTask(library.index.keys[:2]), library, "vote", settings=settings)
    with pytest.raises(InputError, match="told by queries"):
        decide_task(RoutedTask(library.index.keys[:0]), library, "prior", settings=settings)
    with pytest.raises(InputError, match="data sets"):
        fit_threshold(dataclasses.replace(library, datasets=None))
    with pytest.raises(InputError, match="Too few experts"):
        fit_threshold(dataclasses.replace(library, datasets=(frozenset({"a"}),) * 10))
