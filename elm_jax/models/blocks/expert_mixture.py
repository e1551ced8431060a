"""The mixture of a sparse layer as a pure function of one device's rows: choice, dispatch, experts, sums."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from elm_jax.models.blocks import dispatch
from elm_jax.models.blocks.experts import expert_blocks, expert_rows
from elm_jax.models.blocks.spread import Spread
from elm_jax.models.layers import gates
from elm_jax.models.layers.sparse_config import EXPERTS, SparseConfig
from elm_jax.types import Array

Found = tuple[Array, gates.RouterSums]


class ExpertMixture(NamedTuple):
    """How a layer's rows go through its experts.

    Attributes:
        config: of the layer.
        activations: of the experts.
        rows: of the batch, that make a group.
        places: of an expert in a group; None if nothing is dropped.
        spread: what a device holds.
    """

    config: SparseConfig
    activations: tuple[str, ...]
    rows: int
    places: int | None
    spread: Spread

    def __call__(self, x: Array, logits: Array, real: Array, kernels: tuple[Array, ...], keep: Array | None
                 ) -> Found:
        """The outputs f[B, L, D] of one device's rows, and the sums of the whole batch.

        Args:
            x: f[B, L, D].
            logits: f32[B, L, E].
            real: bool[B, L].
            kernels: of the device's experts.
            keep: f[E, G, 1, F], factors of their hidden layers, or None.
        """
        kernels = self.spread.varying(kernels, (*self.spread.experts, *self.spread.hidden))
        function, mix = expert_rows, self._by_tokens
        if self.config.choice == EXPERTS:
            mix = self._by_experts
        elif self.places is None:
            function, mix = expert_blocks, self._without_drops
        experts = functools.partial(function, kernels=kernels, activations=self.activations, keep=keep)
        y, sums = mix(experts, *in_groups(self.rows, x, logits, real))
        return y.reshape(-1, *x.shape[1:])[:x.shape[0]], self.spread.total(sums)

    def _by_tokens(self, experts: Callable[[Array], Array], x: Array, logits: Array, real: Array) -> Found:
        """x f[G, N, D], logits f32[G, N, E], real bool[G, N] -> f[T, D], and the groups' sums."""
        x, choices, sums = self._chosen(x, logits, real)
        count = self.config.num_experts
        if not self.spread.exchanges:
            choices, count = self.spread.own(choices, count), self.spread.num_own(count)
        slots = dispatch.capacity_slots(choices, count, self.places)
        rows = dispatch.to_slots(x.reshape(-1, x.shape[-1]), slots).reshape(count, -1, x.shape[-1])
        return self.spread.summed(_joined(self._through(experts, rows), choices, slots)), sums

    def _without_drops(self, experts: Callable[..., Array], x: Array, logits: Array, real: Array) -> Found:
        """The same without a capacity.

        How many rows go to a device is known only once they are routed. So no rows move by themselves: where
        they would have to, a device gets all groups, and computes what goes to its own experts.
        """
        x, choices, sums = self._chosen(x, logits, real)
        x, choices = self.spread.gathered((x, choices))
        size = dispatch.block_rows(choices.experts.size, self.config.num_experts)
        slots, blocks = dispatch.block_slots(self.spread.own(choices, self.config.num_experts),
                                             self.spread.num_own(self.config.num_experts), size)
        rows = dispatch.to_slots(x.reshape(-1, x.shape[-1]), slots).reshape(-1, size, x.shape[-1])
        groups = slots.choice_in.reshape(-1, size) // math.prod(choices.experts.shape[1:])
        y = _joined(experts(rows, blocks, groups=groups), choices, slots)
        return self.spread.summed(y, gathered=True), sums

    def _by_experts(self, experts: Callable[[Array], Array], x: Array, logits: Array, real: Array) -> Found:
        """The same with the choice by experts: what no expert takes is 0."""
        choices = gates.choose_by_experts(logits, real, self.config, self.places)
        taken = gates.taken_of(choices, x.shape[1])
        sums = gates.router_sums(logits, taken, taken, real)
        sums = sums._replace(dropped=jnp.sum(real & ~taken.any(axis=-1), dtype=jnp.float32))
        x, choices = self.spread.varying((x, choices), self.spread.groups)
        if not self.spread.exchanges:
            choices = self.spread.own(choices, self.config.num_experts)
        y = dispatch.through_experts(x, choices, functools.partial(self._through, experts))
        return self.spread.summed(y), sums

    def _chosen(self, x: Array, logits: Array, real: Array
                ) -> tuple[Array, gates.TokenChoices, gates.RouterSums]:
        """The tokens, their choices, both on the way to the experts, and the groups' sums."""
        choices = gates.choose_by_tokens(logits, real, self.config, self.places)
        sums = gates.router_sums(logits, *gates.chosen_of(choices, self.config.num_experts), real)
        return *self.spread.varying((x, choices), self.spread.groups), sums

    def _through(self, experts: Callable[[Array], Array], rows: Array) -> Array:
        """Rows f[E, S, D] through the experts, wherever they are."""
        return self.spread.from_experts(experts(self.spread.to_experts(rows)))


def _joined(rows: Array, choices: gates.TokenChoices, slots: dispatch.SlotMap) -> Array:
    """Weighted sums f[T, D] of the rows f[..., D] in the slots."""
    weights = choices.gates.reshape(slots.of_choice.shape)
    return dispatch.from_slots(rows.reshape(-1, rows.shape[-1]), weights, slots)


def in_groups(rows: int, *arrays: Array) -> list[Array]:
    """Puts every `rows` rows of [B, L, ...] together: [G, rows * L, ...]; missing rows are 0 or False."""
    count = -(-arrays[0].shape[0] // rows)
    missing = count * rows - arrays[0].shape[0]
    return [jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))).reshape(
        count, rows * array.shape[1], *array.shape[2:]) for array in arrays]
