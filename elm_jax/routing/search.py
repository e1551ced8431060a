"""Search over a library's keys: the best similarity of each expert for each query, in one pass.

Two similarities within `TIE` of each other are a tie. `TIE` is larger than the rounding of a float32 dot
product of unit vectors, so equal keys tie at any position and on any backend; it is far smaller than any
meaningful difference.
"""

import weakref
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.routing.index import KeyIndex
from elm_jax.types import Array

TIE = 1e-5
"""Similarities (cosines) that differ by no more are equal."""
CHUNK = 16_384
"""Keys compared at once, at most: Q x CHUNK similarities are in memory, never Q x N."""
CACHED = 2**17
"""Similarities that stay in a processor's cache: NumPy compares fewer keys at once where queries are many."""
QUERIES = 512
"""Queries that JAX compares with a block of keys at once."""


def best_numpy(queries: np.ndarray, index: KeyIndex, *, chunk: int | None = None) -> np.ndarray:
    """Similarities f32[Q, E] of each query f32[Q, K] to the nearest key of each expert, by NumPy.

    Args:
        queries: f32[Q, K].
        index: of E experts; keys of one expert that stand together are fastest, any order is right.
        chunk: keys compared at once; by default as many as the cache allows.
    """
    chunk = chunk or min(CHUNK, max(CACHED // max(len(queries), 1), 1_024))
    best = np.full((len(queries), len(index.experts)), -np.inf, np.float32)
    for start in range(0, len(index.keys), chunk):
        similarities = queries @ index.keys[start : start + chunk].T
        owners = index.owners[start : start + chunk]
        runs = np.flatnonzero(np.diff(owners, prepend=-1))  # where a run of one expert's keys begins
        if len(runs) < len(owners):
            similarities = np.maximum.reduceat(similarities, runs, axis=1)
        found = owners[runs]
        if (np.diff(found) == 1).all():
            own = best[:, found[0] : found[-1] + 1]
            np.maximum(own, similarities, out=own)
        else:  # an expert has several runs, or none
            np.maximum.at(best, (slice(None), found), similarities)
    return best


def best_jax(queries: np.ndarray, index: KeyIndex, *, chunk: int = 2 * CHUNK) -> np.ndarray:
    """Finds what `best_numpy` finds, with JAX; the keys stay on the devices while the index lives.

    Every device of this process holds a part of them.
    """
    resident = _RESIDENT.get(index)
    if resident is None or resident.chunk != chunk:
        resident = _RESIDENT[index] = _ResidentKeys(index, chunk)
    return resident.best(queries)


BEST: dict[str, Callable[..., np.ndarray]] = {"numpy": best_numpy, "jax": best_jax}
"""Functions that find the best similarity of each expert, by backend; all give the same results."""


def winners_of(best: np.ndarray) -> np.ndarray:
    """Positions i64[Q] of the expert nearest to each query, from f32[Q, E]; of tied ones the oldest."""
    return (best >= best.max(axis=1, keepdims=True) - np.float32(TIE)).argmax(axis=1)


def nearest_key(query: np.ndarray, index: KeyIndex, expert: int) -> int:
    """Position of the key of one expert that is nearest to a query f32[K]; of tied keys the first."""
    own = index.places_of(expert)
    similarities = index.keys[own] @ query
    return int(own[(similarities >= similarities.max() - np.float32(TIE)).argmax()])


class _ResidentKeys:
    """The keys of an index on JAX's local devices, in blocks of experts with equally many keys.

    A number of keys between two steps is filled up by repeating the expert's first key, which changes no
    maximum. Steps are a quarter of a power of two apart, so that few shapes are compiled; while an index has
    few different numbers, each is a group of its own and nothing is filled up. The blocks of a group are of
    one size, but for the last, and every device holds a part of each.
    """

    def __init__(self, index: KeyIndex, chunk: int) -> None:
        self.chunk, self.number = chunk, len(index.experts)
        counts = index.counts
        order = None if (np.diff(index.owners) >= 0).all() else np.argsort(index.owners, kind="stable")
        starts = np.cumsum(counts) - counts
        sizes = counts if len(np.unique(counts)) <= 4 else _steps(counts)
        devices = np.array(jax.local_devices())
        mesh = Mesh(devices, ("experts",))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec("experts"))
        self.blocks = []
        for size in map(int, np.unique(sizes)):
            experts = np.flatnonzero(sizes == size)
            most = max(1, chunk // size) * len(devices)
            for first in range(0, len(experts), most):
                own = experts[first : first + most]
                filled = np.concatenate([own, np.repeat(own[:1], -len(own) % len(devices))])
                keys = _keys_of(index.keys, order, starts[filled], counts[filled], size)
                self.blocks.append((own, size, jax.device_put(keys, split)))

    def best(self, queries: np.ndarray) -> np.ndarray:
        best = np.empty((len(queries), self.number), np.float32)
        for start in range(0, len(queries), QUERIES):
            part = queries[start : start + QUERIES]
            if len(self.blocks) > 1:  # one block takes them with its own call
                part = jax.device_put(part, self.everywhere)
            found = [_best_of_block(part, keys, size) for _, size, keys in self.blocks]  # all are under way
            for (experts, _, _), similarities in zip(self.blocks, found, strict=True):
                best[start : start + QUERIES, experts] = np.asarray(similarities)[:, : len(experts)]
        return best


def _keys_of(keys: np.ndarray, order: np.ndarray | None, starts: np.ndarray, counts: np.ndarray, size: int
             ) -> np.ndarray:
    """Keys f32[X * size, K] of X experts, whose S keys begin at `starts` i64[X] of an order of all keys."""
    if order is None and counts[-1] == size and (np.diff(starts) == size).all():
        return keys[starts[0] : starts[-1] + size]  # they stand together, and none is filled up
    offsets = np.arange(size)[None, :]
    positions = (starts[:, None] + np.where(offsets < counts[:, None], offsets, 0)).reshape(-1)
    return keys[positions if order is None else order[positions]]


_RESIDENT: "weakref.WeakKeyDictionary[KeyIndex, _ResidentKeys]" = weakref.WeakKeyDictionary()


def _steps(counts: np.ndarray) -> np.ndarray:
    """Rounds numbers of keys i64[E] up to multiples of a quarter of the power of two below them."""
    quarter = np.maximum(1, 2 ** np.floor(np.log2(counts)).astype(np.int64) // 4)
    return -(-counts // quarter) * quarter


@partial(jax.jit, static_argnames="size")
def _best_of_block(queries: Array, keys: Array, size: int) -> Array:
    """Best similarities f32[Q, X] of queries f32[Q, K] with keys f32[X * size, K] of X experts."""
    similarities = jnp.dot(keys, queries.T, precision=jax.lax.Precision.HIGHEST)
    return similarities.reshape(-1, size, len(queries)).max(axis=1).T
