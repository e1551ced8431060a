"""Greedy decoding with a cache, for any network."""

import functools

import jax
import jax.numpy as jnp

from elm_jax.models.network import Network
from elm_jax.types import Array, Padded, Params


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
        eos_id: token that ends a row; None for the network's own; static.

    Returns:
        i32[B, max_length]: tokens, EOS included if it came in time, then the network's padding.
    """
    batch = inputs.tokens.shape[0]
    end, padding = network.config.eos_id if eos_id is None else eos_id, network.config.pad_id
    cache, first = network.start(params, inputs, max_length)

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, ended, _, index, _ = state
        return (index < max_length) & ~jnp.all(ended)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        token, ended, tokens, index, cache = state
        logits, cache = network.step(params, cache, token)
        token = jnp.where(ended, padding, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        return token, ended | (token == end), tokens, index + 1, cache

    start = (
        first,
        jnp.zeros((batch,), bool),
        jnp.full((batch, max_length), padding, jnp.int32),
        jnp.zeros((), jnp.int32),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, start)[2]
