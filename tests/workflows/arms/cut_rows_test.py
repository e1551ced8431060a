"""Rows of the runs of a study of arms: held out, nested, repeated, the same for every arm."""

import numpy as np
import pytest

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.errors import InputError
from elm_jax.workflows.arms.cut_rows import CutTaskData, RowCuts, TaskRows


class Rows:
    """Task data of one task with 50 rows, each of its own tokens."""

    vocabulary, modules = None, ()

    def split(self, task, split, max_rows=None):
        rows = [{"inputs": [number + 2], "targets": [1], "text": {
            "inputs": "", "targets": "", "choices": [], "index": number}} for number in range(50)]
        return PreparedSplit.from_rows(task, split, {"kind": "generation"}, rows)


def numbers(split):
    return [split.text(row)["index"] for row in range(len(split))]


CUTS = RowCuts(Rows(), heldout=10, seed=4)


def test_held_out_rows_are_in_no_run():
    held = numbers(CUTS.heldout_split("a"))
    assert len(held) == len(set(held)) == 10
    assert CUTS.heldout_split("a").split == "heldout"
    for seed in range(5):
        own = numbers(CUTS.rows_of(TaskRows("a"), seed))
        assert sorted(held + own) == list(range(50))


def test_fewer_rows_are_a_part_of_more_and_seeds_draw_others():
    few, many = (set(numbers(CUTS.rows_of(TaskRows("a", rows), 0))) for rows in (8, 20))
    assert len(few) == 8 and len(many) == 20 and few < many
    assert few != set(numbers(CUTS.rows_of(TaskRows("a", 8), 1)))
    assert numbers(CUTS.heldout_split("a")) != numbers(CUTS.heldout_split("b"))


def test_rows_are_repeated_until_they_are_as_many():
    shown = numbers(CUTS.rows_of(TaskRows("a", 8, shown=20), 0))
    counts = np.unique(shown, return_counts=True)[1]
    assert len(shown) == 20 and len(counts) == 8 and set(counts) == {2, 3}


def test_a_run_sees_its_rows_in_the_train_split_alone():
    data = CutTaskData.of(CUTS, (TaskRows("a", 8),), seed=0)
    assert len(data.split("a", "train")) == 8
    assert len(data.split("a", "validation")) == len(data.split("b", "train")) == 50


def test_a_split_without_rows_to_spare_is_refused():
    with pytest.raises(InputError, match="too few rows for those that are held out"):
        RowCuts(Rows(), heldout=50, seed=0).rows_of(TaskRows("a"), 0)
