"""Streams: every example once an epoch, the same order twice, resumable anywhere."""

from collections import Counter

import numpy as np
import pytest
from t5_rows import FORM

from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.errors import InputError

LENGTHS = {"inputs": 12, "targets": 6}


class Numbered:
    """Source whose example i says i: inputs (i + 2) repeated, targets the same token."""

    def __init__(self, size: int, offset: int = 2) -> None:
        self.size, self.offset = size, offset

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        token = index + self.offset
        inputs = np.append(np.full(index % 5 + 1, token), 1).astype(np.int32)
        return inputs, np.array([token, 1], np.int32)


def stream(size: int = 23, **options) -> TrainStream:
    settings = {"batch_size": 4, "lengths": LENGTHS, "seed": 7, "pack": False, **options}
    return TrainStream(Numbered(size), form=FORM, **settings)


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_example_exactly_once_an_epoch(pack, batch_size):
    source = stream(pack=pack, batch_size=batch_size)
    seen = Counter()
    for step in range(source.steps_for(3)):
        seen.update(source.examples(step))
    for epoch in range(3):
        assert [seen[epoch, index] for index in range(23)] == [1] * 23


@pytest.mark.parametrize("pack", [False, True])
def test_batches_hold_the_examples_that_they_say(pack):
    source = stream(pack=pack)
    for step in range(8):
        targets = source.batch(step)["decoder_target_tokens"]
        said = Counter(index + 2 for _, index in source.examples(step))
        assert Counter(targets[targets > 1].tolist()) == said


@pytest.mark.parametrize("pack", [False, True])
def test_random_access_equals_reading_from_the_start(pack):
    reference = stream(pack=pack)
    expected = [reference.batch(step) for step in range(15)]
    for step in (14, 0, 7, 3, 14):
        assert_same(stream(pack=pack).batch(step), expected[step])
    resumed = stream(pack=pack)
    for step in range(9, 15):
        assert_same(resumed.batch(step), expected[step])


def test_epochs_and_seeds_have_orders_of_their_own():
    plain = stream(batch_size=23)
    assert plain.examples(0) != [(0, index) for _, index in plain.examples(1)]
    assert plain.examples(0) != stream(batch_size=23, seed=8).examples(0)
    in_order = stream(batch_size=23, shuffle=False)
    assert in_order.examples(1) == [(1, index) for index in range(23)]


def test_steps_per_epoch():
    assert stream().steps_per_epoch == 6
    assert stream().steps_for(4) == 23
    assert stream(pack=True).steps_per_epoch < 6


def test_facts_tell_streams_apart():
    assert stream().facts() == stream().facts()
    assert stream().facts() != stream(seed=8).facts()
    other = TrainStream(Numbered(23, offset=3), form=FORM, batch_size=4, lengths=LENGTHS, seed=7, pack=False)
    assert stream().facts() != other.facts()  # same size, other contents


def test_mixture_takes_at_most_its_cap_and_another_subset_every_epoch():
    mixture = MixtureSource([Numbered(50), Numbered(5)], caps=[10, 10], seed=3)
    assert len(mixture) == 15
    picks = []
    for epoch in range(2):
        found = [mixture.locate(index, epoch) for index in range(15)]
        assert len(set(found)) == 15
        assert Counter(number for number, _ in found) == {0: 10, 1: 5}
        picks.append({inside for number, inside in found if number == 0})
    assert picks[0] != picks[1]
    again = MixtureSource([Numbered(50), Numbered(5)], caps=10, seed=3)
    assert {again.locate(index, 1)[1] for index in range(10)} == picks[1]
    other = MixtureSource([Numbered(50), Numbered(5)], caps=10, seed=4)
    assert {other.locate(index, 1)[1] for index in range(10)} != picks[1]


def test_mixture_in_a_stream_reads_the_epoch_of_its_row():
    mixture = MixtureSource([Numbered(50, offset=100), Numbered(5)], caps=[5, None])
    source = TrainStream(mixture, form=FORM, batch_size=5, lengths=LENGTHS, seed=0, pack=False)
    for step in range(4):
        said = [mixture.example(index, epoch)[1][0] for epoch, index in source.examples(step)]
        assert source.batch(step)["decoder_target_tokens"][:, 0].tolist() == said


def test_wrong_settings_are_input_errors():
    with pytest.raises(InputError, match="stream is empty"):
        stream(size=0)
    with pytest.raises(InputError, match="Mixture is wrong"):
        MixtureSource([Numbered(3)], caps=[1, 2])
    with pytest.raises(InputError, match="Mixture is wrong"):
        MixtureSource([Numbered(3)], caps=0)
    with pytest.raises(IndexError, match="negative"):
        stream().batch(-1)
