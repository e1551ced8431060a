"""Rows say exactly what the examples said: trimmed, padded, packed, or with choices."""

import numpy as np
import pytest
import t5_rows

from elm_jax.data.arrays import batches
from elm_jax.errors import InputError

LENGTHS = {"inputs": 12, "targets": 6}


def random_examples(count: int, seed: int = 0) -> list[batches.Example]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return np.append(rng.integers(2, 50, rng.integers(low, high)), 1).astype(np.int32)

    return [(tokens(0, 16), tokens(0, 8)) for _ in range(count)]


def test_trim_keeps_eos_at_the_end_only_if_there_was_one():
    with_eos = np.array([5, 6, 7, 8, 1], np.int32)
    without = np.array([5, 6, 7, 8], np.int32)
    assert batches.trim(with_eos, 3, 1).tolist() == [5, 6, 1]
    assert batches.trim(without, 3, 1).tolist() == [5, 6, 7]
    assert batches.trim(with_eos, 5, 1).tolist() == with_eos.tolist()
    assert with_eos.tolist() == [5, 6, 7, 8, 1]  # the caller's array is left alone


def test_make_batch_rows():
    batch = t5_rows.make_batch(
        [(np.array([4, 5, 1]), np.array([7, 8, 1]))], {"inputs": 4, "targets": 4}, batch_size=2
    )
    assert batch["encoder_input_tokens"].tolist() == [[4, 5, 1, 0], [0, 0, 0, 0]]
    assert batch["decoder_target_tokens"].tolist() == [[7, 8, 1, 0], [0, 0, 0, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 7, 8, 1], [0, 0, 0, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert {array.dtype.name for array in batch.values()} == {"int32", "float32"}


def test_packed_row_by_hand():
    batch = t5_rows.make_packed_batch(
        [[(np.array([4, 1]), np.array([7, 1])), (np.array([5, 6, 1]), np.array([8, 9, 1]))]],
        {"inputs": 6, "targets": 6}, batch_size=1,
    )
    row = {name: array[0].tolist() for name, array in batch.items()}
    assert row == {
        "encoder_input_tokens": [4, 1, 5, 6, 1, 0],
        "encoder_segment_ids": [1, 1, 2, 2, 2, 0],
        "encoder_positions": [0, 1, 0, 1, 2, 0],
        "decoder_target_tokens": [7, 1, 8, 9, 1, 0],
        "decoder_input_tokens": [0, 7, 0, 8, 9, 0],
        "decoder_segment_ids": [1, 1, 2, 2, 2, 0],
        "decoder_positions": [0, 1, 0, 1, 2, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 0],
    }


def test_packed_content_is_the_unpacked_content():
    lengths = {"inputs": 24, "targets": 12}
    long = (np.append(np.arange(2, 40), 1), np.append(np.arange(2, 40), 1))
    examples = [*random_examples(59), long]
    sizes = [(len(inputs), len(targets)) for inputs, targets in examples]
    rows = t5_rows.FORM.pack(sizes, lengths)
    assert sorted(number for row in rows for number in row) == list(range(60))
    assert len(rows) < 40  # it does pack

    plain = t5_rows.make_batch(examples, lengths, batch_size=60)
    packed = t5_rows.make_packed_batch(
        [[examples[number] for number in row] for row in rows], lengths, batch_size=len(rows)
    )
    assert packed["decoder_loss_weights"].sum() == plain["decoder_loss_weights"].sum()
    for row, numbers in enumerate(rows):
        for segment, number in enumerate(numbers, start=1):
            for side, name in (("encoder", "input"), ("decoder", "target"), ("decoder", "input")):
                own = packed[f"{side}_segment_ids"][row] == segment
                found = packed[f"{side}_{name}_tokens"][row][own]
                expected = plain[f"{side}_{name}_tokens"][number][: own.sum()]
                np.testing.assert_array_equal(found, expected)
                np.testing.assert_array_equal(
                    packed[f"{side}_positions"][row][own], np.arange(own.sum())
                )


def test_pack_rows_never_overfills_and_counts_long_examples_as_cut():
    sizes = [(100, 100), (1, 1), (11, 5), (12, 1), (2, 1)]
    rows = t5_rows.FORM.pack(sizes, LENGTHS)
    assert rows[0] == [0]
    for row in rows:
        assert sum(min(sizes[number][0], 12) for number in row) <= 12
        assert sum(min(sizes[number][1], 6) for number in row) <= 6


def test_pack_rows_looks_at_a_bounded_number_of_open_rows():
    sizes = [(12, 6), (8, 1), (8, 1), (4, 1)]
    assert batches.pack_rows(sizes, tuple(LENGTHS.values()), open_rows=1) == [[0], [1], [2, 3]]
    assert batches.pack_rows(sizes, tuple(LENGTHS.values()), open_rows=2) == [[0], [1, 3], [2]]


def test_choices_are_never_cut():
    inputs = [np.array([4, 5, 6, 1]), np.array([4, 1])]
    choices = [[np.array([7, 1]), np.array([8, 9, 1])], [np.array([7, 1])]]
    batch = t5_rows.choice_batch(
        inputs, choices, source_length=3, target_length=3, num_choices=2, batch_size=3
    )
    assert batch["inputs"].tolist() == [[4, 5, 1], [4, 1, 0], [0, 0, 0]]
    assert batch["choices"][0].tolist() == [[7, 1, 0], [8, 9, 1]]
    assert batch["choice_mask"].tolist() == [[True, True], [True, False], [False, False]]
    for wrong in ({"target_length": 2}, {"num_choices": 1}):
        sizes = {"source_length": 3, "target_length": 3, "num_choices": 2, "batch_size": 3, **wrong}
        with pytest.raises(InputError, match="none is ever cut"):
            t5_rows.choice_batch(inputs, choices, **sizes)


def test_choose_bucket():
    assert [batches.choose_bucket(n, [4, 8]) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(InputError, match="No length bucket is large enough"):
        batches.choose_bucket(9, [4, 8])
    with pytest.raises(InputError, match="buckets are wrong"):
        batches.choose_bucket(1, [8, 4])


@pytest.mark.parametrize("lengths", [{"inputs": 4}, {"inputs": 4, "targets": 0},
                                     {"inputs": 4, "targets": True}])
def test_wrong_lengths_are_an_input_error(lengths):
    with pytest.raises(InputError, match="Feature lengths are wrong"):
        t5_rows.make_batch([], lengths, 1)


def test_too_many_rows_or_too_long_segments_are_input_errors():
    examples = random_examples(3)
    with pytest.raises(InputError, match="does not hold its rows"):
        t5_rows.make_batch(examples, LENGTHS, batch_size=2)
    long = (np.full(8, 5, np.int32), np.array([1], np.int32))
    with pytest.raises(InputError, match="do not fit into one packed row"):
        t5_rows.make_packed_batch([[long, long]], LENGTHS, batch_size=1)
