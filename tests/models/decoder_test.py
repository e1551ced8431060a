"""Decoders against transformers: every model type, padded and packed rows, cached steps, choices."""

import functools

import hf_decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.data.arrays.joined import Joined
from elm_jax.experts.base import load_base
from elm_jax.models import families
from elm_jax.models.network import ids_of
from elm_jax.types import Padded

LENGTHS = {"inputs": 9, "targets": 6}
every_case = pytest.mark.parametrize("name", [*hf_decoders.CASES, *hf_decoders.SPARSE_CASES])
THOROUGH = ["llama, grouped, tied", "qwen3", "gpt2", "mixtral", "olmoe"]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    @functools.cache
    def base(name):
        folder = tmp_path_factory.mktemp("hf")
        hf_decoders.model(name).save_pretrained(folder)
        return load_base(folder)

    return base


def texts(count, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, hf_decoders.VOCAB_SIZE, draw.integers(2, 8)).astype(np.int32)
            for _ in range(count)]


@every_case
def test_logits_of_packed_rows_are_those_of_transformers(name, base_of):
    """Two examples in a row, segments and positions anew, and padding that may be a real token."""
    base = base_of(name)
    network = families.network_of(base.config)
    pairs = list(zip(texts(4), texts(4, seed=1), strict=True))
    form = Joined(ids_of(base.config)._replace(bos=None))
    batch = form.make_packed([pairs[:2], pairs[2:3], pairs[3:]], {"inputs": 16, "targets": 15}, 3)
    found = np.asarray(jax.jit(network.logits)(base.params, batch))
    for row, numbers in enumerate(((0, 1), (2,), (3,))):
        start = 0
        for number in numbers:
            whole = np.concatenate([form.prompt(pairs[number][0], 16), form.target(pairs[number][1], 15)])
            wanted = hf_decoders.logits(name, whole[None])[0]
            np.testing.assert_allclose(found[row, start:start + len(whole)], wanted, rtol=0, atol=1e-4)
            start += len(whole)


@pytest.mark.parametrize("name", THOROUGH)
def test_choices_and_steps_are_full_passes_of_transformers(name, base_of):
    """One prefix for all choices; unequal prompts; cached steps beside them.

    The context holds each row, but not the widths of prompts and choices together.
    """
    base = base_of(name)
    network = families.network_of(base.config)
    draw = np.random.default_rng(3)
    wide = network.config.max_length - 3
    prompts = Padded(draw.integers(0, 61, (3, wide)).astype(np.int32), np.array([wide - 1, 1, 4], np.int32))
    choices = Padded(draw.integers(0, 61, (3, 2, 4)).astype(np.int32),
                     np.array([[4, 2], [1, 3], [3, 4]], np.int32))
    score = jax.jit(network.target_log_probs)
    found = np.asarray(score(base.params, prompts, choices))
    longer = np.asarray(score(base.params, prompts._replace(lengths=prompts.lengths + 1), choices))
    assert np.isnan(longer[0, 0]).all() and np.isfinite(longer).sum() == longer.size - 4
    cache, token = jax.jit(network.start, static_argnums=2)(base.params, prompts, 4)
    assert list(token) == [prompts.tokens[row, length - 1] for row, length in enumerate(prompts.lengths)]
    step = jax.jit(network.step)
    logits = []
    for place in range(4):
        now, cache = step(base.params, cache, token)
        logits.append(np.asarray(now))
        token = jnp.asarray(choices.tokens[:, 0, place])
    for row, length in enumerate(prompts.lengths):
        for choice, size in enumerate(choices.lengths[row]):
            own = choices.tokens[row, choice]
            whole = np.concatenate([prompts.tokens[row, :length], own])
            theirs = hf_decoders.logits(name, whole[None])[0, length - 1:-1]
            wanted = np.asarray(jax.nn.log_softmax(theirs))[np.arange(4), own]
            np.testing.assert_allclose(found[row, choice, :size], wanted[:size], rtol=0, atol=1e-4)
            assert not found[row, choice, size:].any()
            if choice == 0:
                np.testing.assert_allclose(np.stack(logits)[:, row], theirs, rtol=0, atol=1e-4)
