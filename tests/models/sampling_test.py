"""Draws of tokens against transformers' processors of logits and against probabilities in float64."""

import jax
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from elm_jax.models.sampling import Sampling, adjusted, draw, row_keys

SETTINGS = [(1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (0.5, 20, 0.95), (2.0, 1, 0.5),
            (1.0, 1000, 1.0), (1.0, None, 1e-6)]
adjusted_at_once = jax.jit(adjusted)
draw_at_once = jax.jit(draw)


def sampling(temperature, top_k, top_p) -> Sampling:
    return Sampling(np.float32(temperature), None if top_k is None else np.int32(top_k),
                    None if top_p is None else np.float32(top_p))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_what_can_be_drawn_is_what_transformers_leaves(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (6, 211)).astype(np.float32)
    logits[0] -= 50  # all below zero
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k is not None:
        expected = TopKLogitsWarper(min(top_k, 211))(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = np.asarray(adjusted_at_once(logits, sampling(temperature, top_k, top_p)))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_equal_logits_stay_together():
    logits = np.asarray([[1.0, 2.0, 2.0, 0.0], [-0.5, -0.5, -0.5, -0.5]], np.float32)
    kept = np.isfinite(adjusted_at_once(logits, sampling(1.0, 1, None)))
    np.testing.assert_array_equal(kept, [[False, True, True, False], [True] * 4])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.6, 6, 0.9)])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature, top_k, top_p):
    rows, size = 20_000, 9
    logits = np.random.default_rng(3).normal(0, 0.9, size)
    scaled = logits / temperature
    if top_k is not None:
        scaled[np.argsort(-scaled)[top_k:]] = -np.inf
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    if top_p is not None:
        order = np.argsort(-probabilities)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    words = np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2)
    tokens = draw_at_once(np.tile(logits.astype(np.float32), (rows, 1)), sampling(temperature, top_k, top_p),
                          row_keys(7, words), np.int32(0))
    counts, real = np.bincount(tokens, minlength=size), probabilities > 0
    assert counts[~real].sum() == 0
    assert stats.chisquare(counts[real], rows * probabilities[real]).pvalue > 1e-3


def test_a_row_has_its_own_draws():
    """They depend on the seed, the row's words and the step, not on the other rows."""
    logits = np.zeros((8, 4_000), np.float32)
    words = np.arange(16, dtype=np.uint32).reshape(8, 2)
    settings = sampling(1.0, None, None)
    found = np.asarray(draw(logits, settings, row_keys(0, words), np.int32(3)))
    order = np.random.default_rng(0).permutation(8)[:5]
    again = draw(logits[:5], settings, row_keys(0, words[order]), np.int32(3))
    np.testing.assert_array_equal(again, found[order])
    others = [draw(logits, settings, row_keys(1, words), np.int32(3)),
              draw(logits, settings, row_keys(0, words), np.int32(4))]
    assert len(set(found)) == 8 and all((np.asarray(other) != found).all() for other in others)
