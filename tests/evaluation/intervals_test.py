"""Intervals against scipy, and against how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats

from elm_jax.errors import InputError
from elm_jax.evaluation import intervals


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (1, 1), (150, 300), (299, 300)])
def test_a_share_has_wilsons_interval(right: int, count: int) -> None:
    values = np.random.default_rng(0).permutation([1] * right + [0] * (count - right))
    found = intervals.mean_with_interval(values)
    interval = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert found.value == right / count
    assert found.n == count
    np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), atol=1e-12)


def test_the_interval_of_none_or_all_right_ends_at_the_share_itself() -> None:
    """Not beside it by a rounding, below 0 or above 1."""
    for count in range(1, 300):
        assert intervals.wilson(0.0, count)[0] == 0.0 and intervals.wilson(1.0, count)[1] == 1.0


def test_a_mean_of_many_fractions_has_nearly_the_normal_interval() -> None:
    values = np.random.default_rng(0).uniform(0, 1, 4000)
    found = intervals.mean_with_interval(values)
    assert (found.low, found.high) == pytest.approx(
        scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values)), abs=2e-4)


@pytest.mark.parametrize("values", [[1.0], [0.0], [0.25], [1.0] * 50, [0.0] * 50, [0.3] * 50, [0.99, 1.0],
                                    [1.0] * 99 + [0.5], [1e-9, 0.0, 0.0]])
def test_no_interval_of_a_score_leaves_0_to_1_or_has_no_width(values: list[float]) -> None:
    found = intervals.mean_with_interval(values)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 1e-5
    both = intervals.combined([found, found], 2 * found.n)
    assert 0 <= both.low <= both.value <= both.high <= 1
    assert 1e-5 < both.high - both.low < found.high - found.low


@pytest.mark.parametrize("differences", [np.zeros(50), np.ones(50), -np.ones(3), np.array([0.5]),
                                         np.full(20, 0.01)])
def test_no_interval_of_a_difference_leaves_its_range_or_has_no_width(differences: np.ndarray) -> None:
    found = intervals.paired_difference([differences[:, None]])
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.high > found.low
    assert found == intervals.paired_difference([differences[:, None]])  # drawn by a seed


@pytest.mark.parametrize(("better", "worse", "told"), [(3, 0, False), (4, 0, False), (7, 0, True),
                                                       (12, 1, True), (9, 5, False)])
def test_a_difference_is_told_where_the_exact_test_tells_it(better: int, worse: int, told: bool) -> None:
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * (120 - better - worse))
    assert (scipy.stats.binomtest(better, better + worse).pvalue < 0.05) == told  # McNemar's
    assert (intervals.paired_difference([differences[:, None]]).low > 0) == told


def test_a_paired_difference_holds_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        one, two = rng.random(80) < 0.6, rng.random(60) < 0.5
        shared = np.stack([one - 1.0 * (rng.random(80) < 0.3), one - 1.0 * (rng.random(80) < 0.3)], axis=1)
        shared[rng.random(80) < 0.2, 1] = np.nan  # a prompt that does not ask all
        found = intervals.paired_difference([shared, (two - 1.0 * (rng.random(60) < 0.5))[:, None]], seed)
        covered += found.low <= 0.15 <= found.high
    assert 0.91 <= covered / 200 <= 0.99  # standard error 0.015


def test_prompts_that_share_instances_are_drawn_together() -> None:
    one = np.where(np.random.default_rng(0).random(200) < 0.4, 1.0, 0.0)
    alone = intervals.paired_difference([one[:, None]])
    twice = intervals.paired_difference([np.stack([one, one], axis=1)])
    apart = intervals.paired_difference([one[:, None], one[::-1, None]])
    assert twice.high - twice.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / np.sqrt(2), rel=0.15)


@pytest.mark.parametrize(("values", "message"), [([], "at least one instance"), ([1, 1.5], "1.5"),
                                                 ([-0.1], "-0.1"), ([float("nan")], "nan")])
def test_wrong_values_are_named(values: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        intervals.mean_with_interval(values)


def two_stages_by_hand(tasks: list[np.ndarray], count: int, seed: int) -> tuple[float, float]:
    """The percentile interval of drawing tasks, and rows within each, one draw after another."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        drawn = [tasks[number] for number in rng.integers(len(tasks), size=len(tasks))]
        found.append(np.mean([np.mean(own[rng.integers(len(own), size=len(own))]) for own in drawn]))
    return tuple(np.quantile(found, (0.025, 0.975)))


def test_over_tasks_and_rows_is_the_outer_of_two_stages_and_students() -> None:
    rng = np.random.default_rng(3)
    alike = [rng.normal(0.1, 2.0, 400) for _ in range(8)]
    unlike = [rng.normal(mean, 0.1, 400) for mean in rng.normal(0, 1, 4)]
    for tasks in (alike, unlike):
        found = intervals.over_tasks_and_rows(tasks)
        means = [own.mean() for own in tasks]
        student = scipy.stats.t.interval(0.95, len(tasks) - 1, np.mean(means), scipy.stats.sem(means))
        low, high = two_stages_by_hand(tasks, 2000, 1)
        assert found.value == pytest.approx(np.mean(means))
        assert found.n == sum(map(len, tasks))
        width = high - low
        assert found.low == pytest.approx(min(low, student[0]), abs=0.06 * width)
        assert found.high == pytest.approx(max(high, student[1]), abs=0.06 * width)
    assert student[0] < low, "of few unlike tasks, Student's is the outer one"


def test_of_one_task_the_rows_alone_are_drawn() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    found = intervals.over_tasks_and_rows([values])
    wanted = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.03)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_over_tasks_and_rows_holds_the_truth_as_often_as_it_says(spread: float) -> None:
    rng, tries = np.random.default_rng(7), 80
    held = 0
    for _ in range(tries):
        tasks = [rng.choice([-1, 0, 0, 1], size=120) + mean for mean in rng.normal(0, spread, 5)]
        found = intervals.over_tasks_and_rows(tasks)
        held += found.low <= 0 <= found.high
    assert held / tries > 0.9


def test_equal_differences_are_not_certain() -> None:
    found = intervals.over_tasks_and_rows([np.zeros(40), np.zeros(40)])
    assert found.low < 0 == found.value < found.high


def test_the_smallest_difference_that_is_seen_four_times_out_of_five() -> None:
    error = 0.7
    half = scipy.stats.norm.ppf(0.975) * error
    smallest = intervals.smallest_seen(intervals.Estimate(0.0, -half, half, 1))
    seen = scipy.stats.norm.sf(half, loc=smallest, scale=error)  # its lower end is above zero
    assert seen == pytest.approx(0.8)
