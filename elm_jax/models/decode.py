"""Decoding with a cache, for any network: greedy or by drawing tokens, whole or a few steps a call."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elm_jax.models.network import Cache, Network, ends_of
from elm_jax.models.sampling import Sampling, draw
from elm_jax.types import Array, Padded, Params


class Rules(NamedTuple):
    """What the steps of a decoding have in common; values, not constants, of the compiled program.

    Attributes:
        ends: i32[E], tokens that end a row.
        limits: i32[B], most tokens of each row; 0 for a row that only fills the batch up.
        sampling: how tokens are drawn; None takes the likeliest.
        keys: key[B], random keys of the rows; None without `sampling`.
    """

    ends: Array
    limits: Array
    sampling: Sampling | None = None
    keys: Array | None = None


class Decoding(NamedTuple):
    """State of decoding a batch.

    Attributes:
        cache: of the network.
        token: i32[B], what the next step takes.
        ended: bool[B].
        tokens: i32[B, T], found so far, EOS included; the rest is padding.
        index: i32[], steps that were made.
    """

    cache: Cache
    token: Array
    ended: Array
    tokens: Array
    index: Array


@functools.partial(jax.jit, static_argnames=("network", "max_length", "eos_id"))
def greedy(
    network: Network, params: Params, inputs: Padded, *, max_length: int, eos_id: int | None = None
) -> Array:
    """Decodes greedily, the most likely token at every step: returns tokens i32[B, max_length].

    Args:
        network: static.
        params: as `network.init` makes them.
        inputs: tokens i32[B, S], lengths i32[B].
        max_length: most tokens a row gets, EOS included; static.
        eos_id: token that ends a row; None for all that the network's config names; static.

    Returns:
        i32[B, max_length]: tokens, EOS included if it came in time, then the network's padding.
    """
    ends = ends_of(network.config) if eos_id is None else (eos_id,)
    limits = jnp.full(inputs.tokens.shape[:1], max_length, jnp.int32)
    state = _begun(network, params, inputs, max_length, limits)
    return _steps(network, params, state, Rules(jnp.asarray(ends, jnp.int32), limits), max_length).tokens


@functools.partial(jax.jit, static_argnames=("network", "max_length"))
def begin(network: Network, params: Params, inputs: Padded, limits: Array, *, max_length: int) -> Decoding:
    """Computes the prompts and makes the state before the first step.

    Args:
        network: static.
        params: as `network.init` makes them.
        inputs: tokens i32[B, S], lengths i32[B].
        limits: i32[B], see `Rules`.
        max_length: T, most steps that can be made; static.
    """
    return _begun(network, params, inputs, max_length, limits)


@functools.partial(jax.jit, static_argnames=("network",), donate_argnames=("state",))
def advance(network: Network, params: Params, state: Decoding, rules: Rules, steps: Array) -> Decoding:
    """Makes steps until all rows have ended, at most `steps` i32[]; the state that is given is used up."""
    return _steps(network, params, state, rules, state.index + steps)


def _begun(network: Network, params: Params, inputs: Padded, max_length: int, limits: Array) -> Decoding:
    batch = inputs.tokens.shape[0]
    cache, first = network.start(params, inputs, max_length)
    tokens = jnp.full((batch, max_length), network.config.pad_id, jnp.int32)
    return Decoding(cache, first, limits <= 0, tokens, jnp.zeros((), jnp.int32))


def _steps(network: Network, params: Params, state: Decoding, rules: Rules, until: Array | int) -> Decoding:
    def unfinished(state: Decoding) -> Array:
        return (state.index < until) & ~jnp.all(state.ended)

    def step(state: Decoding) -> Decoding:
        logits, cache = network.step(params, state.cache, state.token)
        token = jnp.where(state.ended, network.config.pad_id, _chosen(logits, rules, state.index))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.index, axis=1)
        ends = jnp.any(token[:, None] == rules.ends[None, :], axis=1)
        ended = state.ended | ends | (state.index + 1 >= rules.limits)
        return Decoding(cache, token, ended, tokens, state.index + 1)

    return jax.lax.while_loop(unfinished, step, state)


def likeliest(logits: Array) -> Array:
    """Returns the first place of each row's largest value: f32[B, V] -> i32[B], as `jnp.argmax`.

    By two reductions, which XLA's CPU backend runs nine times as fast as the one of argmax.
    """
    size = logits.shape[-1]
    largest = logits.max(axis=-1, keepdims=True)
    behind = jnp.where(logits == largest, size - jnp.arange(size, dtype=jnp.int32)[None], 1)
    return size - behind.max(axis=-1)


def _chosen(logits: Array, rules: Rules, index: Array) -> Array:
    if rules.sampling is None:
        return likeliest(logits)
    return draw(logits, rules.sampling, rules.keys, index)
