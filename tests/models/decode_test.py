"""Cached decoding against transformers' cache and generate, and against the full pass."""

import functools

import jax
import numpy as np
import pytest
import torch
import weights
from hf_weights import GENERATIONS, padded_tokens, peer, small_config
from t5_rows import rows

from elm_jax.models import AdapterConfig, T5Network, greedy
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.decode import Rules, advance, begin
from elm_jax.models.t5.network import Cache
from elm_jax.types import Padded

INPUTS = padded_tokens(np.random.default_rng(0), (7, 3, 12, 1), 14)


@functools.partial(jax.jit, static_argnums=(0, 3))
def init_cache(network: T5Network, params: dict, inputs: Padded, max_length: int) -> Cache:
    return network.start(params, inputs, max_length).cache


@pytest.mark.parametrize("generation", GENERATIONS)
def test_steps_equal_transformers_steps_with_cache(generation: str) -> None:
    config = small_config(generation, vocab_size=14)
    model, params = peer(config)
    network = T5Network(config)
    tokens = np.random.default_rng(1).integers(2, 14, (4, 9)).astype(np.int32)
    tokens[:, 0] = 0
    mask = torch.tensor(INPUTS > 0).long()
    cache = init_cache(network, params, rows(INPUTS), 9)
    step = jax.jit(network.step)
    with torch.no_grad():
        states = model.encoder(input_ids=torch.tensor(INPUTS).long(), attention_mask=mask)
        past = None
        for position in range(9):
            output = model(
                encoder_outputs=states, attention_mask=mask, past_key_values=past, use_cache=True,
                decoder_input_ids=torch.tensor(tokens[:, position : position + 1]).long(),
            )
            past = output.past_key_values
            logits, cache = step(params, cache, tokens[:, position])
            np.testing.assert_allclose(logits, output.logits[:, 0].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(4)])
def test_steps_equal_the_full_pass(adapter: AdapterKind | None) -> None:
    network = T5Network(small_config(vocab_size=14).with_adapter(adapter))
    params = weights.drawn(network)
    tokens = np.random.default_rng(1).integers(2, 14, (4, 6)).astype(np.int32)
    full = jax.jit(network.logits)(
        params, {"encoder_input_tokens": INPUTS, "decoder_input_tokens": tokens}
    )
    # A longer cache than the row: positions not yet written must not count.
    cache = init_cache(network, params, rows(INPUTS), 11)
    step = jax.jit(network.step)
    for position in range(6):
        logits, cache = step(params, cache, tokens[:, position])
        np.testing.assert_allclose(logits, full[:, position], rtol=0, atol=2e-6)


def test_greedy_equals_generate() -> None:
    ended_early = set()
    for seed in range(2):
        config = small_config(vocab_size=14)
        model, params = peer(config, seed)
        with torch.no_grad():
            generated = model.generate(
                torch.tensor(INPUTS).long(), attention_mask=torch.tensor(INPUTS > 0).long(),
                do_sample=False, num_beams=1, max_new_tokens=10,
            ).numpy()[:, 1:]
        expected = np.zeros((4, 10), np.int32)
        expected[:, : generated.shape[1]] = generated
        found = greedy(T5Network(config), params, rows(INPUTS), max_length=10)
        np.testing.assert_array_equal(found, expected)
        ended_early |= set((expected == 1).any(axis=1))
    assert ended_early == {True, False}  # rows that end and rows that do not were both seen


def test_greedy_is_the_same_alone_and_in_a_batch() -> None:
    network = T5Network(small_config(vocab_size=14))
    params = peer(network.config)[1]
    together = greedy(network, params, rows(INPUTS), max_length=8)
    for row, tokens in zip(INPUTS[:2], together[:2], strict=True):
        alone = greedy(network, params, rows(row[row > 0][None]), max_length=8)
        np.testing.assert_array_equal(alone[0], tokens)


def test_another_end_token() -> None:
    network = T5Network(small_config(vocab_size=14))
    params = peer(network.config)[1]
    tokens = np.asarray(greedy(network, params, rows(INPUTS), max_length=8, eos_id=99))
    end = int(tokens[0, 2])
    first = int(np.argmax(tokens[0] == end))
    stopped = np.asarray(greedy(network, params, rows(INPUTS), max_length=8, eos_id=end))[0]
    np.testing.assert_array_equal(stopped[: first + 1], tokens[0, : first + 1])
    assert not stopped[first + 1 :].any()


def test_several_end_tokens_limits_and_steps_in_parts() -> None:
    """Parts of any size find what greedy decoding in one part finds, cut at ends and limits."""
    network = T5Network(small_config(vocab_size=14))
    params = peer(network.config)[1]
    tokens = np.asarray(greedy(network, params, rows(INPUTS), max_length=8, eos_id=99))
    ends, limits = np.asarray(sorted({int(tokens[0, 2]), int(tokens[1, 4])}), np.int32), (8, 8, 3, 0)
    expected = np.zeros_like(tokens)
    for row, limit, out in zip(tokens, limits, expected, strict=True):
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), 8)
        out[: min(stop, limit)] = row[: min(stop, limit)]
    rules, before = Rules(ends, np.asarray(limits, np.int32)), advance._cache_size()
    for parts in [(8,), (1, 2, 4, 4), (3,) * 3]:
        state = begin(network, params, rows(INPUTS), rules.limits, max_length=8)
        for part in parts:
            state = advance(network, params, state, rules, np.int32(part))
        np.testing.assert_array_equal(state.tokens, expected)
        assert state.ended.all()
    assert advance._cache_size() == before + 1, "the number of steps compiles nothing anew"
