"""Sparse feed-forward of a layer: a router sends each token to a few of E experts."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.models.blocks import dispatch
from elm_jax.models.blocks.experts import Experts, expert_blocks, expert_rows
from elm_jax.models.blocks.spread import Spread, spread_of
from elm_jax.models.blocks.token_router import TokenRouter
from elm_jax.models.layers import gates
from elm_jax.models.layers.dense import stream
from elm_jax.models.layers.sparse_config import EXPERTS, SparseConfig
from elm_jax.types import Array

ROUTER, SUMS = "router", "sums"
"""Flax collection, and the name in it, of what a sparse layer reports (`layers.gates.RouterSums`)."""


class SparseMlp(nn.Module):
    """Sparse feed-forward: the router's experts of each token, weighted by their gates.

    Leaves are named as T5X names them: ``router/router_weights/w/kernel`` f32[D, E],
    ``expert/{wi | wi_0, wi_1}/kernel`` f32[E, D, F], ``expert/wo/kernel`` f32[E, F, D]; beside them
    ``router/task_weights/w/kernel`` f32[D_t, E] for gates that read tasks.

    Attributes:
        emb_dim: D.
        mlp_dim: hidden width F of an expert.
        activations: one or two names of `layers.dense.ACTIVATION_FUNCTIONS`.
        dropout_rate: of the experts' hidden layers, where `sparse` names none.
        dtype: of the experts' computation; the router computes in float32.
        sparse: experts, gates, capacity.
    """

    emb_dim: int
    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: jnp.dtype
    sparse: SparseConfig

    def setup(self) -> None:
        """Creates the router and the experts."""
        rate = self.sparse.expert_dropout
        self.router = TokenRouter(self.sparse)
        self.expert = Experts(self.sparse.num_experts, self.emb_dim, self.mlp_dim, self.activations,
                              self.dropout_rate if rate is None else rate, self.dtype)

    def __call__(self, x: Array, deterministic: bool, real: Array | None = None, task: Array | None = None
                 ) -> Array:
        """Applies the block: f[B, L, D] -> f[B, L, D]; 0 for padding and for tokens without a place.

        Args:
            x: f[B, L, D].
            deterministic: no dropout, no jitter, and the capacity outside of training.
            real: bool[B, L], tokens that are not padding; None: all.
            task: f[B, D_t], vectors of the rows' tasks, for gates that read them.
        """
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        logits = self.router(x, task, deterministic)
        batch, length, _ = x.shape
        rows = min(self.sparse.group_rows, batch)
        places = gates.capacity(self.sparse, rows * length, not deterministic)
        if length == 1 and self.sparse.choice != EXPERTS:  # a step of decoding never drops
            places = None
        # A group that lacks rows is filled up, and so stays with all others on one device.
        spread = spread_of(batch // rows if batch % rows == 0 else 1, self.sparse.num_experts,
                           self.emb_dim, self.mlp_dim)
        mixture = functools.partial(_mixture, self.sparse, self.activations, rows, places, spread)
        y, sums = spread.over(mixture)(x.astype(self.dtype), logits, real, self.expert(),
                                       self.expert.keep(-(-batch // rows), deterministic))
        self._report(sums)
        return stream(y)

    def _report(self, sums: gates.RouterSums) -> None:
        if not self.is_initializing():
            self.sow(ROUTER, SUMS, sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _mixture(config: SparseConfig, activations: tuple[str, ...], rows: int, places: int | None,
             spread: Spread, x: Array, logits: Array, real: Array, kernels: tuple[Array, ...],
             keep: Array | None) -> tuple[Array, gates.RouterSums]:
    """The outputs f[B, L, D] of one device's rows, and the sums of the batch.

    Args:
        config: of the layer.
        activations: of the experts.
        rows: of a group.
        places: of an expert in a group; None if nothing is dropped.
        spread: what the device holds.
        x: f[B, L, D].
        logits: f32[B, L, E].
        real: bool[B, L].
        kernels: of the device's experts.
        keep: f[E, G, 1, F] of them, or None.
    """
    kernels = spread.varying(kernels, (*spread.experts, *spread.hidden))
    groups = _in_groups(rows, x, logits, real)
    experts = functools.partial(expert_rows, kernels=kernels, activations=activations, keep=keep)
    if config.choice == EXPERTS:
        y, sums = _by_experts(config, places, spread, experts, *groups)
    elif places is None:
        experts = functools.partial(expert_blocks, kernels=kernels, activations=activations, keep=keep)
        y, sums = _without_drops(config, spread, experts, *groups)
    else:
        y, sums = _by_tokens(config, places, spread, experts, *groups)
    return y.reshape(-1, *x.shape[1:])[:x.shape[0]], spread.total(sums)


def _by_tokens(config: SparseConfig, places: int, spread: Spread, experts: Callable[[Array], Array],
               x: Array, logits: Array, real: Array) -> tuple[Array, gates.RouterSums]:
    """x f[G, N, D], logits f32[G, N, E], real bool[G, N] -> f[T, D], and the groups' sums."""
    choices = gates.choose_by_tokens(logits, real, config, places)
    sums = gates.router_sums(logits, *gates.chosen_of(choices, config.num_experts), real)
    x, choices = spread.varying((x, choices), spread.groups)
    count = config.num_experts
    if not spread.exchanges:
        choices, count = spread.own(choices, count), spread.num_own(count)
    slots = dispatch.capacity_slots(choices, count, places)
    rows = dispatch.to_slots(x.reshape(-1, x.shape[-1]), slots).reshape(count, -1, x.shape[-1])
    rows = spread.from_experts(experts(spread.to_experts(rows)))
    return spread.summed(_joined(rows, choices, slots)), sums


def _without_drops(config: SparseConfig, spread: Spread, experts: Callable[..., Array], x: Array,
                   logits: Array, real: Array) -> tuple[Array, gates.RouterSums]:
    """The same without a capacity. Where rows would have to move, nobody knows how many go to a device
    before they do: each gets all of them, and computes those of its own experts.
    """
    choices = gates.choose_by_tokens(logits, real, config, None)
    sums = gates.router_sums(logits, *gates.chosen_of(choices, config.num_experts), real)
    x, choices = spread.gathered(spread.varying((x, choices), spread.groups))
    size = dispatch.block_rows(choices.experts.size, config.num_experts)
    slots, blocks = dispatch.block_slots(spread.own(choices, config.num_experts),
                                         spread.num_own(config.num_experts), size)
    rows = dispatch.to_slots(x.reshape(-1, x.shape[-1]), slots).reshape(-1, size, x.shape[-1])
    groups = slots.choice_in.reshape(-1, size) // math.prod(choices.experts.shape[1:])
    y = _joined(experts(rows, blocks, groups=groups), choices, slots)
    return spread.summed(y, gathered=True), sums


def _joined(rows: Array, choices: gates.TokenChoices, slots: dispatch.Slots) -> Array:
    """Weighted sums f[T, D] of the rows f[..., D] in the slots."""
    weights = choices.gates.reshape(slots.of_choice.shape)
    return dispatch.from_slots(rows.reshape(-1, rows.shape[-1]), weights, slots)


def _by_experts(config: SparseConfig, places: int, spread: Spread, experts: Callable[[Array], Array],
                x: Array, logits: Array, real: Array) -> tuple[Array, gates.RouterSums]:
    """The same with the choice by experts: what no expert takes is 0."""
    choices = gates.choose_by_experts(logits, real, config, places)
    taken = gates.taken_of(choices, x.shape[1])
    sums = gates.router_sums(logits, taken, taken, real)
    sums = sums._replace(dropped=jnp.sum(real & ~taken.any(axis=-1), dtype=jnp.float32))
    x, choices = spread.varying((x, choices), spread.groups)
    if not spread.exchanges:
        choices = spread.own(choices, config.num_experts)
    return spread.summed(dispatch.through_experts(
        x, choices, lambda rows: spread.from_experts(experts(spread.to_experts(rows))))), sums


def _in_groups(rows: int, *arrays: Array) -> list[Array]:
    """Puts every `rows` rows of [B, L, ...] together: [G, rows * L, ...]; missing rows are 0 or False."""
    count = -(-arrays[0].shape[0] // rows)
    missing = count * rows - arrays[0].shape[0]
    return [jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))).reshape(
        count, rows * array.shape[1], *array.shape[2:]) for array in arrays]
