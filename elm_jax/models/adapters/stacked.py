"""Many experts behind one network's functions: one base, overlays with a leading axis, one program.

`GroupedNetwork` offers what scoring and decoding ask of `T5Network` (`encode`, `target_log_probs`,
`init_cache`, `decode_step`), so that `rank.score_choices` and `decode.greedy` run on it as they are. Rows
that each have an expert of their own are groups of one row, their overlays gathered. Parameters are a pair
``(shared, own)``: leaves of the base, and leaves of the overlays with the axis in front. A product with a
leaf of the base stays one product over the rows of everybody; those with an overlay's are batched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.models.t5.network import Cache, T5Network
from elm_jax.runtime import trees
from elm_jax.types import Array, Params

Many = tuple[Params, Params]
"""Leaves of the base, and leaves of the overlays, [E, ...] or [B, ...]."""


@dataclasses.dataclass(frozen=True)
class GroupedNetwork:
    """Rows in E groups of equal size, one expert a group: the same instances by E experts at once.

    Attributes:
        network: of the base with any of the overlays.
        size: E; ``own`` has leaves [E, ...], and the rows are E * B, those of one expert together.
    """

    network: T5Network
    size: int

    def encode(self, params: Many, inputs: Array) -> Array:
        """i32[E * B, S] -> f[E * B, S, D]."""
        return self._flat(self._map(self.network.encode, params)(self._groups(inputs)))

    def target_log_probs(self, params: Many, inputs: Array, targets: Array) -> Array:
        """i32[E * B, S], i32[E * B, C, T] -> f32[E * B, C, T]; see `T5Network.target_log_probs`."""
        score = self._map(self.network.target_log_probs, params)
        return self._flat(score(self._groups(inputs), self._groups(targets)))

    def init_cache(self, params: Many, encoded: Array, inputs: Array, max_length: int) -> Cache:
        """The cache of E * B rows; its leaves have the axes [E, B, ...]."""
        def start(params: Params, encoded: Array, inputs: Array) -> Cache:
            return self.network.init_cache(params, encoded, inputs, max_length)

        run = self._map(start, params, _cache_axes(params))
        return run(self._groups(encoded), self._groups(inputs))

    def decode_step(self, params: Many, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """Cache and i32[E * B] -> logits f32[E * B, V] of the token after it, and the next cache."""
        axes = _cache_axes(params)
        shared, own = params
        run = jax.vmap(lambda own, cache, token: self.network.decode_step(
            trees.merge(shared, own), cache, token), in_axes=(0, axes, 0), out_axes=(0, axes),
            spmd_axis_name="experts")
        logits, cache = run(own, cache, self._groups(token))
        return self._flat(logits), cache

    def _map(self, function: Callable[..., Any], params: Many, out_axes: Any = 0) -> Callable[..., Any]:
        shared, own = params
        mapped = jax.vmap(lambda own, *rows: function(trees.merge(shared, own), *rows), out_axes=out_axes,
                          spmd_axis_name="experts")
        return lambda *rows: mapped(own, *rows)

    def _groups(self, rows: Array) -> Array:
        return rows.reshape(self.size, -1, *rows.shape[1:])

    def _flat(self, groups: Array) -> Array:
        return groups.reshape(-1, *groups.shape[2:])


def stack(overlays: list[Params]) -> Params:
    """Overlays of one shape -> leaves [E, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *overlays)


def gather(stack: Params, expert_index: Array) -> Params:
    """One overlay a row: leaves [E, ...], i32[B] -> leaves [B, ...]."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, expert_index, axis=0, mode="clip"), stack)


def _cache_axes(params: Many) -> Any:
    """Where the axis of the experts is in a cache; what no overlay changes is there once."""
    own_bias = any("relpos_bias" in path for path in trees.flatten(params[1]))
    return {"index": None, "self_bias": 0 if own_bias else None, "cross_bias": 0, "layers": 0}
