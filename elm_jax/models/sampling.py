"""Draws of the next token: temperature, top-k, top-p, one random key a row.

Sources: Fan et al., https://arxiv.org/abs/1805.04833 (top-k), Holtzman et al.,
https://arxiv.org/abs/1904.09751 (top-p).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.types import Array

KEY_BITS = 32


class Sampling(NamedTuple):
    """Settings of drawing tokens: values of a compiled program; one without a setting is another program.

    Attributes:
        temperature: f32[], above 0; logits are divided by it.
        top_k: i32[], only the k largest logits can be drawn; None for all.
        top_p: f32[], only the likeliest tokens that together have this probability can be drawn, of those
            that `top_k` leaves; None for all.
    """

    temperature: Array
    top_k: Array | None = None
    top_p: Array | None = None


def row_keys(seed: int, words: Array) -> Array:
    """Makes a random key for each row: key[B].

    Args:
        seed: of all rows.
        words: u32[B, W], what tells one row from the others: a row's key depends on its own words alone.
    """
    key = jax.random.key(np.uint32(seed))

    def of_row(words: Array) -> Array:
        found = key
        for word in words:
            found = jax.random.fold_in(found, word)
        return found

    return jax.vmap(of_row)(jnp.asarray(words, jnp.uint32))


def draw(logits: Array, sampling: Sampling, keys: Array, index: Array) -> Array:
    """Draws one token a row: f32[B, V], key[B] -> i32[B].

    Args:
        logits: of the next token.
        sampling: what can be drawn, and how likely.
        keys: of the rows.
        index: i32[], number of the step; each step has its own draw.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    return jnp.argmax(adjusted(logits, sampling) + noise, axis=-1).astype(jnp.int32)


def adjusted(logits: Array, sampling: Sampling) -> Array:
    """Divides logits f32[B, V] by the temperature; those of tokens that cannot be drawn become -inf.

    Tokens of equal logits are kept or left out together.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        logits = _keep_from(logits, _kth_largest(_ordered(logits), sampling.top_k))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = _keep_from(logits, _least_of_mass(_ordered(logits), probabilities, sampling.top_p))
    return logits


def _ordered(values: Array) -> Array:
    """Whole numbers i32 in the same order as f32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _keep_from(logits: Array, least: Array) -> Array:
    return jnp.where(_ordered(logits) >= least[:, None], logits, -jnp.inf)


def _kth_largest(order: Array, count: Array) -> Array:
    """The k-th largest of each row i32[B, V]: i32[B]."""
    return _smallest(lambda bound: jnp.sum(order > bound[:, None], axis=-1) < count, order.shape[0])


def _least_of_mass(order: Array, probabilities: Array, mass: Array) -> Array:
    """The least of the likeliest tokens that together reach a probability: i32[B], as a place in `order`.

    It is the first, from below, up to which more than ``1 - mass`` lies: small probabilities are summed
    without larger ones, so that a mass of 1 keeps all tokens. The likeliest token always stays.
    """
    def is_enough(bound: Array) -> Array:
        below = jnp.sum(jnp.where(order <= bound[:, None], probabilities, 0.0), axis=-1)
        return below > 1.0 - mass

    return jnp.minimum(_smallest(is_enough, order.shape[0]), order.max(axis=-1))


def _smallest(holds: Callable[[Array], Array], rows: int) -> Array:
    """The smallest i32 of each row at which a condition holds that, once true, stays so: by bisection.

    It reads a row 32 times; to sort a vocabulary of 50,000 takes XLA longer on CPUs.
    """
    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        enough = holds(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    limits = jnp.iinfo(jnp.int32)
    low, high = (jnp.full((rows,), value, jnp.int32) for value in (limits.min, limits.max))
    return jax.lax.fori_loop(0, KEY_BITS, halve, (low, high))[1]
