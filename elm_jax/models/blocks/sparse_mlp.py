"""Sparse feed-forward of a layer: a router sends each token to a few of E experts."""

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.models.blocks.expert_mixture import ExpertMixture, in_groups
from elm_jax.models.blocks.experts import Experts
from elm_jax.models.blocks.spread import spread_of
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
        batch, length, _ = x.shape
        rows = min(self.sparse.group_rows, batch)
        places = gates.capacity(self.sparse, rows * length, not deterministic)
        if length == 1 and self.sparse.choice != EXPERTS:  # a step of decoding never drops
            places = None
        # A group that lacks rows is filled up, and so stays with all others on one device.
        spread = spread_of(batch // rows if batch % rows == 0 else 1, self.sparse.num_experts,
                           self.emb_dim, self.mlp_dim)
        mixture = ExpertMixture(self.sparse, self.activations, rows, places, spread)
        y, sums = spread.over(mixture)(x.astype(self.dtype), logits, real, self.expert(),
                                       self.expert.keep(-(-batch // rows), deterministic))
        self._report(sums)
        if task_ids is not None and self.is_mutable_collection(ROUTER):
            self._report_tasks(rows, logits, real, task_ids, places)
        return stream(y)

    def _report_tasks(self, rows: int, logits: Array, real: Array, task_ids: Array, places: int | None
                      ) -> None:
        """Adds choices by task to the report. XLA computes the choices once where it is one program."""
        ids = task_ids if task_ids.ndim == 2 else task_ids[:, None]
        groups = in_groups(rows, logits, real, jnp.broadcast_to(ids, real.shape))
        counts = gates.choices_by_task(*groups, self.sparse, places)
        if not self.is_initializing():
            self.sow(ROUTER, SUMS, counts, reduce_fn=lambda sums, new: sums._replace(by_task=new))

    def _report(self, sums: gates.RouterSums) -> None:
        if not self.is_initializing():
            self.sow(ROUTER, SUMS, sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
