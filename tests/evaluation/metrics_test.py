"""Metrics against scipy, rouge_score and numpy."""

import numpy as np
import pytest
import scipy.stats
from rouge_score import rouge_scorer

from elm_jax.errors import InputError
from elm_jax.evaluation import metrics


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (1, 1), (150, 300), (299, 300)])
def test_accuracy_has_wilsons_interval(right: int, count: int) -> None:
    values = np.random.default_rng(0).permutation([1] * right + [0] * (count - right))
    found = metrics.accuracy(values)
    interval = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert found.value == right / count
    assert found.n == count
    np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), atol=1e-12)


def test_mean_has_the_normal_interval() -> None:
    values = np.random.default_rng(0).uniform(0, 1, 40)
    found = metrics.mean_with_interval(values)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 40)
    assert (found.low, found.high) == pytest.approx(
        scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values)))
    assert metrics.mean_with_interval([0.25]) == metrics.Estimate(0.25, 0.25, 0.25, 1)


@pytest.mark.parametrize(("prediction", "target"), [
    ("the cat sat on the mat", "the cats were sitting on a mat"), ("", "something"), ("one", "one"),
    ("Police killed the gunman", "the gunman killed police"), ("a b", "c d"),
])
def test_rouge_l_is_rouge_scores(prediction: str, target: str) -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    assert metrics.rouge_l(prediction, target) == scorer.score(target, prediction)["rougeL"].fmeasure


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "cat on the mat": 4 of 5 and of 8 words, stemmed.
    found = metrics.rouge_l("cats sat on the mat", "a big cat is lying on the mat")
    assert found == pytest.approx(2 * (4 / 5) * (4 / 8) / (4 / 5 + 4 / 8))


@pytest.mark.parametrize(("function", "arguments", "message"), [
    (metrics.accuracy, ([],), "at least one instance"),
    (metrics.accuracy, ([1, 0.5],), "0.5"),
    (metrics.mean_with_interval, ([],), "at least one instance"),
])
def test_wrong_values_are_named(function: object, arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(*arguments)
