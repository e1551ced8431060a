"""Packing of texts into rows: each text once and whole, little padding, one length of rows a call."""

import numpy as np
import pytest

from elm_jax.routing import packing

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("most", "padding"), [(20, 0.01), (64, 0.04), (130, 0.07), (256, 0.07)])
def test_each_text_stands_once_and_whole_in_rows_with_little_padding(most, padding):
    lengths = RNG.integers(1, most + 1, 500).tolist()
    size, rows = packing.cheapest_rows(lengths, 256)
    assert size >= most and size in packing.ROW_LENGTHS
    assert sorted(text for row in rows for text in row) == list(range(500))
    assert max(sum(lengths[text] for text in row) for row in rows) <= size
    assert 1 - sum(lengths) / (len(rows) * size) < padding
    turned = packing.pack_texts(lengths[::-1], size)
    assert [[lengths[~text] for text in row] for row in turned] == [
        [lengths[text] for text in row] for row in rows]


def test_a_text_above_all_lengths_of_rows_gets_rows_of_the_longest():
    assert packing.cheapest_rows([600, 300, 5], 700) == (700, [[0, 2], [1]])


def test_rows_hold_tokens_texts_and_places():
    ids = [[7, 8], [5, 6, 7, 8], [9]]
    tokens, numbers, positions = packing.lay_out(ids, [[1, 2], [0]], (3, 6))
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 8, 9, 0], [7, 8, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(numbers, [[1, 1, 1, 1, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6])
