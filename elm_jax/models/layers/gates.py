"""Gates of sparse layers: from the router's logits to each token's experts, weights and places."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from elm_jax.types import Array


class RouterSums(NamedTuple):
    """Sums over the real tokens of a batch that one sparse layer reports; those of two batches add.

    Attributes:
        choices: f32[E], choices of each expert before any is dropped: K a token.
        probs: f32[E], the router's probabilities.
        tokens: f32[], real tokens.
        dropped: f32[], choices without a place.
        z: f32[], squared logsumexp of the logits.
        entropy: f32[], of the router's probabilities, in nats.
    """

    choices: Array
    probs: Array
    tokens: Array
    dropped: Array
    z: Array
    entropy: Array


def router_sums(logits: Array, chosen: Array, kept: Array, real: Array) -> RouterSums:
    """Sums the report of a layer.

    Args:
        logits: f32[G, N, E].
        chosen: bool[G, N, E], the choices of each token.
        kept: bool[G, N, E], those that have a place.
        real: bool[G, N], tokens that are not padding.
    """
    weights = real.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    probs = jax.nn.softmax(logits, axis=-1)
    entropy = log_z - jnp.sum(probs * logits, axis=-1)
    chosen, kept = chosen & real[..., None], kept & real[..., None]
    return RouterSums(
        choices=chosen.sum((0, 1), dtype=jnp.float32), probs=jnp.einsum("gne,gn->e", probs, weights),
        tokens=weights.sum(), dropped=(chosen & ~kept).sum(dtype=jnp.float32),
        z=jnp.sum(jnp.square(log_z) * weights), entropy=jnp.sum(entropy * weights))
