"""Sparse feed-forward of a layer: a router sends each token to a few of E experts."""

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.models.blocks import dispatch
from elm_jax.models.blocks.experts import Experts
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

    def __call__(self, x: Array, deterministic: bool, real: Array | None = None, task: Array | None = None,
                 task_ids: Array | None = None) -> Array:
        """Applies the block: f[B, L, D] -> f[B, L, D]; 0 for padding and for tokens without a place.

        Args:
            x: f[B, L, D].
            deterministic: no dropout, no jitter, and the capacity outside of training.
            real: bool[B, L], tokens that are not padding; None: all.
            task: f[B, D_t] or f[B, L, D_t], vectors of the rows' or tokens' tasks, for gates that read them.
            task_ids: i32[B] or i32[B, L], numbers of the tasks, to count choices by task; None does not.
        """
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        logits = self.router(x, task, deterministic)
        x = x.astype(self.dtype)
        rows = min(self.sparse.group_rows, x.shape[0])
        places = gates.capacity(self.sparse, rows * x.shape[1], not deterministic)
        if self.sparse.choice == EXPERTS:
            y = self._by_experts(*_in_groups(rows, x, logits, real), places, deterministic)
        elif places is None or x.shape[1] == 1:  # a step of decoding never drops
            y = self._by_tokens(*_in_groups(x.shape[0], x, logits, real), None, deterministic)
        else:
            y = self._by_tokens(*_in_groups(rows, x, logits, real), places, deterministic)
        if task_ids is not None and self.is_mutable_collection(ROUTER):
            self._report_tasks(rows, logits, real, task_ids, places)
        return stream(y.reshape(-1, *x.shape[1:])[:x.shape[0]])

    def _by_tokens(self, x: Array, logits: Array, real: Array, places: int | None, deterministic: bool
                   ) -> Array:
        """x f[G, N, D], logits f32[G, N, E], real bool[G, N] -> f[T, D]; without `places` nothing drops."""
        count, width = self.sparse.num_experts, x.shape[-1]
        choices = gates.choose_by_tokens(logits, real, self.sparse, places)
        self._report(gates.router_sums(logits, *gates.chosen_of(choices, count), real))
        tokens = x.reshape(-1, width)
        if places is None:
            size = dispatch.block_rows(choices.experts.size, count)
            slots, blocks = dispatch.block_slots(choices, count, size)
            rows = dispatch.to_slots(tokens, slots).reshape(-1, size, width)
            rows = self.expert.on_blocks(rows, blocks, deterministic)
        else:
            slots = dispatch.capacity_slots(choices, count, places)
            rows = dispatch.to_slots(tokens, slots).reshape(count, -1, width)
            rows = self.expert(rows, x.shape[0], deterministic)
        weights = choices.gates.reshape(slots.of_choice.shape)
        return dispatch.from_slots(rows.reshape(-1, width), weights, slots)

    def _by_experts(self, x: Array, logits: Array, real: Array, places: int, deterministic: bool) -> Array:
        """The same, f[G, N, D], with the choice by experts: what no expert takes is 0."""
        choices = gates.choose_by_experts(logits, real, self.sparse, places)
        taken = gates.taken_of(choices, x.shape[1])
        sums = gates.router_sums(logits, taken, taken, real)
        self._report(sums._replace(dropped=jnp.sum(real & ~taken.any(axis=-1), dtype=jnp.float32)))
        return dispatch.through_experts(x, choices, lambda rows: self.expert(rows, x.shape[0], deterministic))

    def _report_tasks(self, rows: int, logits: Array, real: Array, task_ids: Array, places: int | None
                      ) -> None:
        """Adds choices by task to the report. XLA computes the choices once where it is one program."""
        ids = task_ids if task_ids.ndim == 2 else task_ids[:, None]
        groups = _in_groups(rows, logits, real, jnp.broadcast_to(ids, real.shape))
        counts = gates.choices_by_task(*groups, self.sparse, places)
        if not self.is_initializing():
            self.sow(ROUTER, SUMS, counts, reduce_fn=lambda sums, new: sums._replace(by_task=new))

    def _report(self, sums: gates.RouterSums) -> None:
        if not self.is_initializing():
            self.sow(ROUTER, SUMS, sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _in_groups(rows: int, *arrays: Array) -> list[Array]:
    """Puts every `rows` rows of [B, L, ...] together: [G, rows * L, ...]; missing rows are 0 or False."""
    count = -(-arrays[0].shape[0] // rows)
    missing = count * rows - arrays[0].shape[0]
    return [jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))).reshape(
        count, rows * array.shape[1], *array.shape[2:]) for array in arrays]
