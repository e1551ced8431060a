"""The router that scores experts on rows: budget, the best expert found, and ties."""

import collections

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings
from elm_jax.routing.router import decide_task
from elm_jax.routing.routers.by_labels import halved
from tests.routing.router_test import library_of, order, permuted, task_of


class TableScorer:
    """Scores that are known beforehand, and a list of the pairs of expert and row that were asked for."""

    def __init__(self, correct: np.ndarray) -> None:
        self.correct, self.num_rows = np.asarray(correct, np.float64), correct.shape[1]
        self.asked: list[tuple[int, int]] = []

    def __call__(self, experts: np.ndarray, start: int, end: int) -> np.ndarray:
        assert 0 <= start < end <= self.num_rows
        self.asked += [(int(expert), row) for expert in experts for row in range(start, end)]
        return self.correct[experts, start:end]


def test_halving_keeps_to_its_budget_and_never_scores_a_pair_twice():
    rng = np.random.default_rng(0)
    for number, rows, budget in ((1, 3, 5), (2, 7, 1), (7, 32, 40), (9, 16, 100), (20, 50, 333), (20, 4, 79)):
        scorer = TableScorer(rng.random((number, rows)))
        found = halved(np.arange(number), scorer, budget)
        assert sorted(found) == list(range(number))
        assert len(scorer.asked) == len(set(scorer.asked)) <= budget
        seen = collections.Counter(expert for expert, _ in scorer.asked)
        assert [seen[e] for e in found] == sorted((seen[e] for e in found), reverse=True)


def test_a_budget_of_all_rows_ranks_by_the_whole_score():
    scorer = TableScorer(np.random.default_rng(1).random((11, 13)))
    for budget in (None, 11 * 13, 1000):
        np.testing.assert_array_equal(halved(np.arange(11), scorer, budget),
                                      np.argsort(-scorer.correct.mean(axis=1)))


def test_halving_without_noise_finds_the_best_and_ties_go_to_the_likeliest():
    """Any budget that pays for one row of each in each round does."""
    for seed in range(20):
        quality = np.random.default_rng(seed).permutation(16)
        found = halved(np.arange(16), TableScorer(np.repeat(quality[:, None], 20, axis=1)), 64)
        assert found[0] == quality.argmax()
    likeliest = np.array([3, 0, 2, 1])
    np.testing.assert_array_equal(halved(likeliest, TableScorer(np.ones((4, 8))), 9), likeliest)
    np.testing.assert_array_equal(halved(likeliest, TableScorer(np.eye(4)), 1), likeliest)


def test_only_the_likely_experts_are_scored_and_the_decision_says_on_what():
    """Those that the router without rows ranks first, or votes where there are no priors; copies never."""
    rng, library, task = np.random.default_rng(3), library_of(3), task_of(3)
    copied = RoutedLibrary(library.index, library.priors, np.array([0, 1, 2, 3, 4, 5, 6, 2, 0]))
    settings = RouterSettings(candidates=4)
    voted = RoutedLibrary(copied.index, None, copied.copies)
    for known, first in ((copied, "prior+nearest"), (voted, "vote")):
        scorer = TableScorer(rng.random((9, 12)))
        decision = decide_task(task, known, "labelled", settings=settings, scorer=scorer)
        assert sorted(order(decision)[:4]) == sorted(order(decide_task(task, known, first))[:4])
        for line in decision.ranking[:4]:
            expert = library.index.experts.index(line.expert)
            assert (line.rows, line.accuracy) == (12, pytest.approx(scorer.correct[expert].mean()))
        scores = [line.score for line in decision.ranking]
        assert scores[:4] == sorted(scores[:4], reverse=True) and set(scores[4:]) == {None}
        assert {line.rows for line in decision.ranking[4:]} == {None}
        measured = [line.accuracy for line in decision.ranking[:4]]
        assert measured == sorted(measured, reverse=True)


def test_order_of_experts_changes_no_decision_on_rows():
    rng, library, task = np.random.default_rng(4), library_of(4), task_of(4)
    places, settings = rng.permutation(9), RouterSettings(candidates=5, budget=37)
    correct = rng.random((9, 12))
    scorer, moved = TableScorer(correct), TableScorer(correct[places])
    decision = decide_task(task, library, "labelled", settings=settings, scorer=scorer)
    assert len(scorer.asked) <= 37
    assert order(decision) == order(
        decide_task(task, permuted(library, places), "labelled", settings=settings, scorer=moved))


def test_rows_that_are_missing_or_without_labels_are_one_error():
    library, task = library_of(0), task_of(0)
    with pytest.raises(InputError, match="--labelled"):
        decide_task(task, library, "labelled")
    with pytest.raises(InputError, match="scores experts on labelled rows"):
        decide_task(task, library, "labelled", scorer=TableScorer(np.ones((9, 0))))
    with pytest.raises(InputError, match="row 0, counted from 0"):
        decide_task(task, library, "labelled", scorer=TableScorer(np.full((9, 3), np.nan)))
    with pytest.raises(InputError, match="budget"):
        RouterSettings(budget=0)
    none = RoutedTask(task.queries[:0])
    with pytest.raises(InputError, match="no priors, no queries"):
        decide_task(none, RoutedLibrary(library.index), "labelled", scorer=TableScorer(np.ones((9, 3))))
