"""Decoding with a cache, over any network that has `encode`, `init_cache` and `decode_step`."""

import functools

import jax
import jax.numpy as jnp

from elm_jax.models.t5.network import T5Network
from elm_jax.types import Array, Params


@functools.partial(jax.jit, static_argnames=("network", "max_length", "eos_id"))
def greedy(
    network: T5Network, params: Params, inputs: Array, *, max_length: int, eos_id: int = 1
) -> Array:
    """The most likely token at every step, until each row has ended.

    Args:
        network: static.
        params: as `network.init` makes them.
        inputs: i32[B, S], padded with 0.
        max_length: most tokens a row gets, EOS included; static.
        eos_id: token that ends a row; static.

    Returns:
        i32[B, max_length]: tokens, EOS included if it came in time, then 0.
    """
    batch = inputs.shape[0]
    cache = network.init_cache(params, network.encode(params, inputs), inputs, max_length)

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, ended, _, cache = state
        return (cache["index"] < max_length) & ~jnp.all(ended)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        token, ended, tokens, cache = state
        index = cache["index"]
        logits, cache = network.decode_step(params, cache, token)
        token = jnp.where(ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        return token, ended | (token == eos_id), tokens, cache

    start = (
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.zeros((batch, max_length), jnp.int32),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, start)[2]
