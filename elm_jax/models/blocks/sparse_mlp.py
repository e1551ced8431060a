"""Sparse feed-forward of a layer: a router sends each token to a few of E experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.layers.dense import Dense, Dropout, activate, stream
from elm_jax.models.layers.gates import router_sums
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.types import Array

ROUTER, SUMS = "router", "sums"
"""Flax collection, and the name in it, of what a sparse layer reports (`layers.gates.RouterSums`)."""
ROUTER_STDDEV = 0.02


class SparseMlp(nn.Module):
    """Sparse feed-forward: the router's experts of each token, weighted by their gates.

    Leaves are named as T5X names them: ``router/router_weights/w/kernel`` f32[D, E],
    ``expert/{wi | wi_0, wi_1}/kernel`` f32[E, D, F], ``expert/wo/kernel`` f32[E, F, D].

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
        self.router = TokenRouter(self.sparse.num_experts)
        self.expert = Experts(self.sparse.num_experts, self.emb_dim, self.mlp_dim, self.activations,
                              self.dropout_rate, self.dtype)

    def __call__(self, x: Array, deterministic: bool, real: Array | None = None, task: Array | None = None
                 ) -> Array:
        """Applies the block: f[B, L, D] -> f[B, L, D]; 0 for padding and for tokens without a place.

        Args:
            x: f[B, L, D].
            deterministic: no dropout, no jitter, and the capacity outside of training.
            real: bool[B, L], tokens that are not padding; None: all.
            task: f[B, D_t], vectors of the rows' tasks, for gates that read them.
        """
        del task
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        logits = self.router(x)
        probs = jax.nn.softmax(logits, axis=-1)
        _, best = jax.lax.top_k(probs, self.sparse.experts_per_token)
        chosen = jax.nn.one_hot(best, self.sparse.num_experts).sum(axis=-2) > 0
        gates = jnp.where(chosen, probs, 0.0)
        if self.sparse.normalize_gates:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        if not self.is_initializing():
            self.sow(ROUTER, SUMS, router_sums(logits, chosen, chosen, real), reduce_fn=lambda _, new: new,
                     init_fn=lambda: None)
        gates = jnp.where(real[..., None], gates, 0.0)
        return stream(jnp.einsum("ebld,ble->bld", self.expert(x, deterministic), gates.astype(x.dtype)))


class TokenRouter(nn.Module):
    """The router's logits in float32: f[B, L, D] -> f32[B, L, E]."""

    num_experts: int

    def setup(self) -> None:
        """Creates ``router_weights/w/kernel`` f32[D, E]."""
        self.router_weights = _Weights(self.num_experts)

    def __call__(self, x: Array) -> Array:
        """Computes logits f32[B, L, E] of f[B, L, D]."""
        return self.router_weights(x.astype(jnp.float32))


class _Weights(nn.Module):
    num_experts: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Dense(self.num_experts, ("embed", None), jnp.dtype("float32"),
                     kernel_init=nn.initializers.normal(ROUTER_STDDEV),
                     precision=jax.lax.Precision.HIGHEST, name="w")(x)


class Experts(nn.Module):
    """All experts on all tokens: f[B, L, D] -> f[E, B, L, D]."""

    num_experts: int
    emb_dim: int
    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Creates ``wi`` or ``wi_0`` and ``wi_1``, and ``wo``."""
        axes, size = ("expert", "embed", "expert_mlp"), (self.emb_dim, self.mlp_dim)
        for name in self._inner:
            setattr(self, name, _Kernels(self.num_experts, *size, axes, self.dtype))
        self.wo = _Kernels(self.num_experts, *size[::-1], ("expert", "expert_mlp", "embed"), self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Applies every expert to f[B, L, D]; returns f[E, B, L, D]."""
        parts = [jnp.einsum("bld,edf->eblf", x, getattr(self, name)()) for name in self._inner]
        hidden = self.dropout(activate(self.activations, parts), deterministic)
        return jnp.einsum("eblf,efd->ebld", hidden, self.wo())

    @property
    def _inner(self) -> tuple[str, ...]:
        return ("wi",) if len(self.activations) == 1 else ("wi_0", "wi_1")


class _Kernels(nn.Module):
    num_experts: int
    inputs: int
    outputs: int
    axes: tuple[str, str, str]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        kernel = param_with_axes("kernel", init, (self.num_experts, self.inputs, self.outputs), jnp.float32,
                                 axes=self.axes)
        return kernel.astype(self.dtype)
