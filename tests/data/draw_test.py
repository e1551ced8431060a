"""Rows are drawn without replacement, by their seed alone, and never those that are taken."""

import numpy as np
import pytest

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.errors import InputError


@pytest.mark.parametrize("seed", [0, 7, (3, 1, 4)])
def test_a_draw_is_a_part_of_one_order_without_repetition(seed):
    whole = draw_rows(50, 50, seed)
    assert sorted(whole) == list(range(50)) and list(whole) != list(range(50))
    for count in (0, 1, 32, 50):
        assert draw_rows(50, count, seed).tolist() == whole[:count].tolist()
    assert draw_rows(50, 99, seed).tolist() == whole.tolist()
    assert draw_rows(50, 50, (seed, 1) if isinstance(seed, int) else 5).tolist() != whole.tolist()


def test_the_order_is_the_same_on_every_machine():
    assert draw_rows(10, 4, 0).tolist() == [4, 6, 2, 7]
    assert draw_rows(10, 4, (1, 2)).tolist() == draw_rows(10, 4, [1, 2]).tolist()


def test_taken_rows_are_not_drawn():
    keys = draw_rows(100, 60, 0)
    queries = draw_rows(100, 60, 1, taken=keys.tolist())
    assert len(queries) == 40 and not set(keys) & set(queries)


def test_numbers_of_rows_are_checked():
    with pytest.raises(InputError, match="-1 of 5"):
        draw_rows(5, -1, 0)


def test_subsets_of_arrays_are_draws():
    rows = [{"inputs": [number, 1], "targets": [2, 1],
             "text": {"inputs": str(number), "targets": "t", "choices": [], "index": number}}
            for number in range(30)]
    split = PreparedSplit.from_rows("t", "train", {"kind": "generation"}, rows)
    part = split.subset(8, seed=3)
    assert [part.text(row)["index"] for row in range(8)] == np.sort(draw_rows(30, 8, 3)).tolist()


@pytest.mark.parametrize("count, taken", [(3, ()), (100, (5, 17)), (40, tuple(range(40)))])
def test_a_few_of_many_are_drawn_as_well(count, taken):
    rows = draw_rows(20_000, count, (7, 1), taken=taken, one_by_one=True)
    assert len(set(rows.tolist())) == len(rows) == count and not set(rows.tolist()) & set(taken)
    assert rows.min() >= 0 and rows.max() < 20_000
    assert rows.tolist() == draw_rows(20_000, count, (7, 1), taken=taken, one_by_one=True).tolist()
    assert rows.tolist() != draw_rows(20_000, count, (7, 2), taken=taken, one_by_one=True).tolist()


def test_a_few_of_many_are_drawn_evenly():
    """Of 400 draws of 100 of 10,000 rows every quarter gets a quarter, within five standard deviations."""
    drawn = np.concatenate([draw_rows(10_000, 100, seed, one_by_one=True) for seed in range(400)])
    counts = np.bincount(drawn // 2500)
    assert (abs(counts - 10_000) < 5 * np.sqrt(40_000 * 0.25 * 0.75)).all()
