"""Sparsification: keeps the largest elements of a task vector (TIES), or random ones (DARE).

What is kept does not depend on how a leaf is cut into slices or spread over devices: every element is
judged by its own value and its place in the leaf, against a few numbers that hold for the whole leaf.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elm_jax.types import Array

_BITS = 32


class Cut(NamedTuple):
    """The cut that separates the largest elements of a leaf: a magnitude, and an index among equals.

    Attributes:
        threshold: u32, bits of the smallest magnitude (float32) that is kept.
        last: u32, flat index of the last kept element of exactly that magnitude.
        any: bool, whether anything is kept at all.
    """

    threshold: Array
    last: Array
    any: Array


def num_kept(density: float, size: int) -> int:
    """Number of elements that a density keeps of a leaf: ``int(density * size)``, at least one.

    >>> num_kept(0.2, 64), num_kept(0.001, 63), num_kept(0.0, 10), num_kept(1.0, 10), num_kept(0.5, 0)
    (12, 1, 0, 10, 0)
    """
    if density <= 0 or size == 0:
        return 0
    return min(size, max(1, int(density * size)))


def magnitude_bits(values: Array) -> Array:
    """Bits u32[...] of ``|x|`` in float32, f[...]: they are ordered as the magnitudes are."""
    return jax.lax.bitcast_convert_type(jnp.abs(values.astype(jnp.float32)), jnp.uint32)


def places(shape: tuple[int, ...], start: Array | int = 0) -> Array:
    """Index u32[shape] of each element in the flattened leaf, counted from `start`.

    Computed from one iota for each dimension, so a sharded leaf needs no communication.
    """
    place = jnp.full(shape, start, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return place


def find_cut(values: Array, count: Array | int) -> Cut:
    """Finds the cut that keeps the `count` largest magnitudes of a leaf; of equal ones the first.

    Searches bit by bit, and counts over the leaf once a bit: no sort, and for a sharded leaf only the counts
    are communicated.

    Args:
        values: a whole leaf, f[...], of less than 2^32 elements.
        count: how many are kept, see `num_kept`.

    Source: the trimming of Yadav et al., https://arxiv.org/abs/2306.01708, section 3.1.
    """
    count = jnp.asarray(count, jnp.uint32)
    bits, place = magnitude_bits(values), places(values.shape)

    def number(mask: Array) -> Array:
        return jnp.sum(mask, dtype=jnp.uint32)

    threshold = _largest(lambda candidate: number(bits >= candidate) >= count)
    equal = bits == threshold
    missing = count - number(bits > threshold)
    last = jax.lax.cond(
        number(equal) == missing, lambda: jnp.uint32(2**_BITS - 1),
        lambda: _largest(lambda candidate: number(equal & (place < candidate)) < missing))
    return Cut(threshold, last, count > 0)


def _largest(holds: Callable[[Array], Array]) -> Array:
    """The largest u32 for which a monotone predicate holds (true up to some number, then false)."""
    def step(done: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (jnp.uint32(_BITS - 1) - done.astype(jnp.uint32)))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, _BITS, step, jnp.uint32(0))


def keep_largest(values: Array, cut: Cut, start: Array | int = 0) -> Array:
    """Mask bool[...] of the elements of a leaf, or of a slice of it, that the cut keeps.

    Args:
        values: the leaf, or whole rows of it.
        cut: of the whole leaf.
        start: place of the slice's first element in the leaf.
    """
    bits = magnitude_bits(values)
    first_ones = (bits == cut.threshold) & (places(values.shape, start) <= cut.last)
    return cut.any & ((bits > cut.threshold) | first_ones)


def keep_random(key: Array, density: Array | float, shape: tuple[int, ...], start: Array | int = 0) -> Array:
    """Random mask bool[shape]; an element's random number depends on its index in the leaf alone.

    Args:
        key: u32[2], of one leaf of one expert (see `random_key`).
        density: the probability, f32.
        shape: of the leaf, or of whole rows of it.
        start: index of the slice's first element in the flattened leaf.

    Source: Yu et al., https://arxiv.org/abs/2311.03099, section 3.2.
    """
    key = jax.random.wrap_key_data(key, impl="threefry2x32")

    def draw(place: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(key, place))[0]

    for _ in shape:
        draw = jax.vmap(draw)
    # 24 bits, which float32 holds exactly: below a density of 1 there is always one that is not kept.
    uniform = (draw(places(shape, start)) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    return uniform < density


def random_key(seed: int, *names: str) -> Array:
    """Random key u32[2] that depends on a seed and on names, such as those of a leaf and an expert."""
    key = jax.random.key(seed, impl="threefry2x32")
    for name in names:
        key = jax.random.fold_in(key, _number_of(name))
    return jax.random.key_data(key)


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def norm_factor(before: Array, after: Array) -> Array:
    """Factor f32[...] ``before / after`` that restores the L1 norm f32[...]; 1 if either norm is tiny.

    The bound 1e-7 is mergekit's.
    """
    tiny = (before < 1e-7) | (after < 1e-7)
    return jnp.where(tiny, 1.0, before / jnp.where(tiny, 1.0, after))
