"""Numbers of tasks in training batches: each token has that of its own example, packed or not."""

import numpy as np
import pytest

from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.data.arrays.joined import Joined
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import task_number
from elm_jax.data.arrays.two_sided import TwoSided
from elm_jax.errors import InputError
from elm_jax.types import SpecialIds

LENGTHS = {"inputs": 9, "targets": 5}
TASKS = ("b__one", "a__two", "c")
NUMBERS = [2, 0, 1]
"""Of the sources' tasks."""
FORMS = {"two sided": TwoSided(SpecialIds(0, 1, 0), TASKS),
         "joined": Joined(SpecialIds(0, 1, None), None, TASKS)}


class Marked:
    """A source whose tokens all are 10 times its number, and more."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        token = 10 * self.number + 10 + index % 10
        return np.full(1 + index % 7, token, np.int32), np.full(1 + index % 3, token, np.int32)


def stream_of(form, pack: bool, tasks=NUMBERS) -> TrainStream:
    source = MixtureSource([Marked(0, 11), Marked(1, 5), Marked(2, 9)], caps=7, seed=1, tasks=tasks)
    return TrainStream(source, form=form, batch_size=4, lengths=LENGTHS, seed=3, pack=pack)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_token_has_the_number_of_its_example_s_task(form, pack):
    stream, seen = stream_of(form, pack), set()
    for step in range(8):
        batch = stream.batch(step)
        sides = [("tokens", "task_ids")] if "tokens" in batch else [
            (f"{side}_tokens", f"{side.split('_')[0]}_task_ids" if pack else "task_ids")
            for side in ("encoder_input", "decoder_target")]
        for name, ids in sides:
            tokens, found = batch[name], batch[ids]
            found = np.broadcast_to(found if found.ndim == 2 else found[:, None], tokens.shape)
            assert found.dtype == np.int32
            marked = tokens >= 10
            wanted = np.asarray(NUMBERS)[tokens // 10 - 1]
            np.testing.assert_array_equal(found[marked], wanted[marked])
            if pack:
                seen |= {len(set(row[own])) for row, own in zip(found, marked, strict=True)}
                assert not found[~marked].any()
        part = stream.batch(step, rows=[3, 1])
        assert all(np.array_equal(part[name], batch[name][[3, 1]]) for name in batch)
    assert not pack or max(seen) > 1  # rows of several tasks


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_else_is_as_for_a_network_that_takes_none(form, pack):
    plain = stream_of(type(form)(form.ids), pack, tasks=None)
    with_tasks = stream_of(form, pack)
    unused = stream_of(type(form)(form.ids), pack)
    for step in range(4):
        mine, found = plain.batch(step), with_tasks.batch(step)
        assert not [name for name in mine if "task" in name] and unused.batch(step).keys() == mine.keys()
        assert all(np.array_equal(mine[name], found[name]) for name in mine)
        assert {name for name in found if "task" in name} == found.keys() - mine.keys() != set()
    assert plain.facts() == unused.facts() != with_tasks.facts()


def test_sources_without_tasks_are_refused_where_they_are_needed():
    with pytest.raises(InputError, match="gates read the task of each row"):
        stream_of(FORMS["joined"], True, tasks=None).batch(0)


def test_a_task_s_own_name_counts_before_its_data_set():
    form = TwoSided(SpecialIds(0, 1, 0), ("toys/small", "toys_small__ask_it", "toys"))
    rows = [{"inputs": [5, 1], "targets": [6, 1], "text": {
        "inputs": "a", "targets": "b", "choices": [], "index": 0}}]

    def split(name, dataset, config):
        info = {"kind": "generation", "dataset": dataset, "config": config}
        return PreparedSplit.from_rows(name, "train", info, rows)

    assert task_number(split("toys_small__ask_it", "toys", "small"), form) == 1
    assert task_number(split("toys_small__tell_it", "toys", "small"), form) == 0
    assert task_number(split("toys__tell_it", "toys", None), form) == 2
    with pytest.raises(InputError, match=r"Unknown task(?s:.*)toys_smal__ask(?s:.*)nearest: toys_small"
                       r"__ask_it(?s:.*)elm tasks embed --base DIR --output DIR toys_smal__ask"):
        task_number(split("toys_smal__ask", "other", None), form)
