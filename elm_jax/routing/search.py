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

from elm_jax.routing.index import KeyIndex
from elm_jax.types import Array

TIE = 1e-5
"""Similarities (cosines) that differ by no more are equal."""
CHUNK = 4_096
"""Keys compared at once: Q x CHUNK similarities are in memory, never Q x N."""


def best_numpy(queries: np.ndarray, index: KeyIndex, *, chunk: int = CHUNK) -> np.ndarray:
    """Similarities f32[Q, E] of each query f32[Q, K] to the nearest key of each expert, by NumPy.

    Args:
        queries: f32[Q, K].
        index: of E experts; keys of one expert that stand together are fastest, any order is right.
        chunk: keys compared at once.
    """
    best = np.full((len(index.experts), len(queries)), -np.inf, np.float32)
    for start in range(0, len(index.keys), chunk):
        similarities = queries @ index.keys[start : start + chunk].T
        owners = index.owners[start : start + chunk]
        runs = np.flatnonzero(np.diff(owners, prepend=-1))  # where a run of one expert's keys begins
        np.maximum.at(best, owners[runs], np.maximum.reduceat(similarities, runs, axis=1).T)
    return best.T


def best_jax(queries: np.ndarray, index: KeyIndex, *, chunk: int = CHUNK) -> np.ndarray:
    """Finds what `best_numpy` finds, with JAX; the keys stay on the device while the index lives."""
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
    own = np.flatnonzero(index.owners == expert)
    similarities = index.keys[own] @ query
    return int(own[(similarities >= similarities.max() - np.float32(TIE)).argmax()])


class _ResidentKeys:
    """The keys of an index on JAX's default device, in groups of experts with equally many keys.

    A number of keys between two steps is filled up by repeating the expert's first key, which changes no
    maximum. Steps are a quarter of a power of two apart, so that few shapes are compiled; while an index has
    few different numbers, each is a group of its own and nothing is filled up.
    """

    def __init__(self, index: KeyIndex, chunk: int) -> None:
        self.chunk, self.number = chunk, len(index.experts)
        counts = np.bincount(index.owners, minlength=self.number)
        order = np.argsort(index.owners, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        sizes = counts if len(np.unique(counts)) <= 4 else _steps(counts)
        self.groups = []
        for size in np.unique(sizes):
            experts = np.flatnonzero(sizes == size)
            offsets = np.arange(size)[None, :]
            offsets = np.where(offsets < counts[experts][:, None], offsets, 0)
            positions = order[starts[experts][:, None] + offsets]
            block = max(1, chunk // int(size))
            filled = -(-len(experts) // block) * block
            positions = np.concatenate([positions, np.repeat(positions[:1], filled - len(experts), axis=0)])
            keys = index.keys[positions.reshape(-1)].reshape(-1, block * int(size), index.keys.shape[1])
            self.groups.append((experts, int(size), jnp.asarray(keys)))

    def best(self, queries: np.ndarray) -> np.ndarray:
        best = np.empty((len(queries), self.number), np.float32)
        for experts, size, keys in self.groups:
            found = np.asarray(_best_of_group(jnp.asarray(queries), keys, size))
            best[:, experts] = found[:, : len(experts)]
        return best


_RESIDENT: "weakref.WeakKeyDictionary[KeyIndex, _ResidentKeys]" = weakref.WeakKeyDictionary()


def _steps(counts: np.ndarray) -> np.ndarray:
    """Rounds numbers of keys i64[E] up to multiples of a quarter of the power of two below them."""
    quarter = np.maximum(1, 2 ** np.floor(np.log2(counts)).astype(np.int64) // 4)
    return -(-counts // quarter) * quarter


@partial(jax.jit, static_argnames="size")
def _best_of_group(queries: Array, keys: Array, size: int) -> Array:
    """Best similarities f32[Q, B * X] of queries f32[Q, K] with keys f32[B, X * size, K] of B * X experts."""

    def step(carry: None, block: Array) -> tuple[None, Array]:
        similarities = jnp.dot(queries, block.T, precision=jax.lax.Precision.HIGHEST)
        return carry, similarities.reshape(len(queries), -1, size).max(axis=2)

    _, found = jax.lax.scan(step, None, keys)
    return jnp.moveaxis(found, 0, 1).reshape(len(queries), -1)
