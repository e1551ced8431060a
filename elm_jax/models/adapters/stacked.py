"""Runs many experts as one network: one shared base, overlays with a leading axis, one program.

`GroupedNetwork` implements `models.network.Network`, so scoring and decoding need no change. If each row has
its own expert, groups have one row, and the overlays are gathered. Parameters are a pair ``(shared, own)``:
leaves of the base, and leaves of the overlays with a leading axis. A product with a leaf of the base is one
product over the rows of all experts; products with overlay leaves are batched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.models.losses import PLAIN, LossConfig, LossSums
from elm_jax.models.network import Cache, Layout, Network, NetworkConfig, Start, StepAccount
from elm_jax.runtime import trees
from elm_jax.runtime.sharding import Axes
from elm_jax.types import Array, Batch, Padded, Params

EXPERTS = "experts"
"""Name of the axis of experts, as a logical axis and on the mesh."""
Many = tuple[Params, Params]
"""Leaves of the base, and leaves of the overlays, [E, ...] or [B, ...]."""


@dataclasses.dataclass(frozen=True)
class GroupedNetwork:
    """A network whose rows are E groups of equal size, each computed with its own expert.

    Attributes:
        network: of the base with any of the overlays.
        size: E; ``own`` has leaves [E, ...], and the rows are E * B, those of one expert together.
    """

    network: Network
    size: int

    @property
    def config(self) -> NetworkConfig:
        """Config of the inner network."""
        return self.network.config

    @property
    def layout(self) -> Layout:
        """Layout of the inner network."""
        return self.network.layout

    @property
    def batches(self) -> str:
        """Form of the inner network's training batches; here they have E * B rows."""
        return self.network.batches

    def init(self, rng: Array) -> Many:
        """Initialises E networks that share no leaf: leaves [E, ...]."""
        return {}, jax.vmap(self.network.init)(jax.random.split(rng, self.size))

    def abstract_params(self) -> Many:
        """Tree of `jax.ShapeDtypeStruct` with the structure of `init`; nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> Many:
        """Logical axes of `init`'s leaves: the expert axis, then those of the inner network."""
        return {}, jax.tree.map(lambda axes: Axes((EXPERTS, *axes)), self.network.logical_axes(),
                                is_leaf=lambda leaf: isinstance(leaf, Axes))

    def axes_of(self, path: str) -> Axes | None:
        """Logical axes of a leaf that experts do not share: the expert axis first; None if there is none."""
        axes = self.network.axes_of(path)
        return None if axes is None else Axes((EXPERTS, *axes))

    def role_of(self, path: str) -> str:
        """Role of a leaf, as the inner network gives it."""
        return self.network.role_of(path)

    def loss(self, params: Many, batch: Batch, rng: Array | None = None,
             settings: LossConfig = PLAIN) -> LossSums:
        """Loss sums f32[] over batches [E * B, ...] of all experts; each expert draws its own dropout."""
        keys = None if rng is None else jax.random.split(rng, self.size)

        def one(params: Params, batch: Batch, key: Array | None) -> LossSums:
            return self.network.loss(params, batch, key, settings)

        sums = self._map(one, params)(self._groups(dict(batch)), keys)
        return jax.tree.map(lambda each: each.sum(axis=0), sums)

    def target_log_probs(self, params: Many, inputs: Padded, targets: Padded) -> Array:
        """Log-probabilities f32[E * B, C, T] of the choices; see `Network.target_log_probs`."""
        score = self._map(self.network.target_log_probs, params)
        return self._flat(score(self._groups(inputs), self._groups(targets)))

    def start(self, params: Many, inputs: Padded, max_length: int) -> Start:
        """Makes the cache (leaves [E, B, ...]) and the first tokens i32[E * B]."""
        def one(params: Params, inputs: Padded) -> Start:
            return self.network.start(params, inputs, max_length)

        out_axes = Start(self.network.cache_axes(params[1]), 0)
        cache, token = self._map(one, params, out_axes)(self._groups(inputs))
        return Start(cache, self._flat(token))

    def step(self, params: Many, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """Decodes one token: cache and i32[E * B] -> logits f32[E * B, V], and the next cache."""
        axes = self.network.cache_axes(params[1])
        shared, own = params
        run = jax.vmap(lambda own, cache, token: self.network.step(
            trees.merge(shared, own), cache, token), in_axes=(0, axes, 0), out_axes=(0, axes),
            spmd_axis_name=EXPERTS)
        logits, cache = run(own, cache, self._groups(token))
        return self._flat(logits), cache

    def account(self, source: int, target: int) -> StepAccount:
        """Traffic of one row through its expert, as the inner network gives it."""
        return self.network.account(source, target)

    def cache_axes(self, own: Params) -> Any:
        """Which cache leaves differ between experts, also if groups are grouped again."""
        return self.network.cache_axes(own)

    def _map(self, function: Callable[..., Any], params: Many, out_axes: Any = 0) -> Callable[..., Any]:
        shared, own = params
        mapped = jax.vmap(lambda own, *rows: function(trees.merge(shared, own), *rows), out_axes=out_axes,
                          spmd_axis_name=EXPERTS)
        return lambda *rows: mapped(own, *rows)

    def _groups(self, rows: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(self.size, -1, *leaf.shape[1:]), rows)

    def _flat(self, groups: Array) -> Array:
        return groups.reshape(-1, *groups.shape[2:])


def stack(overlays: list[Params]) -> Params:
    """Stacks E overlays of one shape: leaves [...] -> leaves [E, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *overlays)


def gather(stack: Params, expert_index: Array) -> Params:
    """Gathers one overlay for each row: leaves [E, ...], i32[B] -> leaves [B, ...]."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, expert_index, axis=0, mode="clip"), stack)
