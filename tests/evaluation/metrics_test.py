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


def test_paired_difference_is_of_pairs() -> None:
    rng = np.random.default_rng(0)
    others = rng.uniform(0, 1, 60)
    values = others + 0.1 + rng.normal(0, 0.01, 60)
    found = metrics.paired_difference(values, others)
    assert (found.low, found.high) == pytest.approx(scipy.stats.norm.interval(
        0.95, (values - others).mean(), scipy.stats.sem(values - others)))
    assert found.value == pytest.approx(values.mean() - others.mean())
    assert found.low > 0.09, "unpaired values would drown the difference"


def test_macro_paired_difference_counts_every_task_the_same() -> None:
    rng = np.random.default_rng(0)
    tasks = [(rng.integers(0, 2, count), rng.integers(0, 2, count)) for count in (300, 20, 50)]
    found = metrics.macro_paired_difference(tasks)
    differences = [np.asarray(left) - right for left, right in tasks]
    mean = np.mean([one.mean() for one in differences])
    error = np.sqrt(sum(scipy.stats.sem(one) ** 2 for one in differences)) / 3
    assert (found.low, found.high) == pytest.approx(scipy.stats.norm.interval(0.95, mean, error))
    assert (found.value, found.n) == (pytest.approx(mean), 370)
    # The interval's claim: redrawing the instances of each task moves the mean about so much.
    redrawn = [np.mean([rng.choice(one, len(one)).mean() for one in differences])
               for _ in range(2000)]
    assert np.std(redrawn) == pytest.approx(error, rel=0.1)


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
    (metrics.paired_difference, ([1, 0], [1]), "2 and 1 instances"),
    (metrics.macro_paired_difference, ([],), "at least one instance"),
    (metrics.macro_paired_difference, ([([1], [0]), ([1, 0], [1])],), "task 1"),
])
def test_wrong_values_are_named(function: object, arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(*arguments)
