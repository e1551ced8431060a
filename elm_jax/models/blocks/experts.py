"""The experts of a sparse layer: E feed-forwards without biases, each on rows of its own."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.blocks.dispatch import Blocks
from elm_jax.models.blocks.grouped_product import batched_product, grouped_product
from elm_jax.models.layers.dense import Dropout, activate
from elm_jax.types import Array

Product = Callable[[Array, Array], Array]


class Experts(nn.Module):
    """E feed-forwards ``act(x wi) wo``, or gated ``(act_0(x wi_0) * act_1(x wi_1)) wo``.

    Attributes:
        num_experts: E.
        emb_dim: D.
        mlp_dim: hidden width F of an expert.
        activations: one or two names of `layers.dense.ACTIVATION_FUNCTIONS`.
        dropout_rate: of the hidden layer; the rows of one expert in a group, or of a block, share a draw.
        dtype: of the computation.
    """

    num_experts: int
    emb_dim: int
    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Creates ``wi``, or ``wi_0`` and ``wi_1``, and ``wo``."""
        axes, size = ("expert", "embed", "expert_mlp"), (self.emb_dim, self.mlp_dim)
        for name in self._inner:
            setattr(self, name, _Kernels(self.num_experts, *size, axes, self.dtype))
        self.wo = _Kernels(self.num_experts, *size[::-1], ("expert", "expert_mlp", "embed"), self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self, rows: Array, groups: int, deterministic: bool) -> Array:
        """Applies each expert to its own rows: f[E, C, D] -> f[E, C, D].

        Args:
            rows: f[E, C, D], those of a group together.
            groups: how many of them.
            deterministic: no dropout.
        """
        keep = self._keep((self.num_experts, groups), deterministic)
        return expert_rows(rows, self.kernels(), self.activations, keep)

    def on_blocks(self, rows: Array, blocks: Blocks, deterministic: bool) -> Array:
        """Applies to each block its expert: f[n, b, D] -> f[n, b, D]; unused blocks give 0."""
        keep = self._keep((rows.shape[0], 1), deterministic)
        return _feed_forward(rows, self.kernels(), self.activations, keep,
                             functools.partial(grouped_product, blocks=blocks))

    def kernels(self) -> tuple[Array, ...]:
        """The kernels f[E, D, F] of the hidden layer, and f[E, F, D] of the outputs, in `dtype`."""
        return (*(getattr(self, name)() for name in self._inner), self.wo())

    def _keep(self, shape: tuple[int, int], deterministic: bool) -> Array | None:
        """Factors f[n, G, 1, F] of the hidden layer; None for none."""
        if deterministic or self.dropout_rate == 0.0:
            return None
        return self.dropout(jnp.ones((*shape, 1, self.mlp_dim), self.dtype), deterministic)

    @property
    def _inner(self) -> tuple[str, ...]:
        return ("wi",) if len(self.activations) == 1 else ("wi_0", "wi_1")


def expert_rows(rows: Array, kernels: tuple[Array, ...], activations: tuple[str, ...],
                keep: Array | None = None) -> Array:
    """Applies each expert to its own rows: f[E, C, D] -> f[E, C, D].

    It knows nothing of tokens and no expert depends on another one: what spreads experts over devices wraps
    this function.

    Args:
        rows: f[E, C, D].
        kernels: f[E, D, F], one or two, and f[E, F, D].
        activations: as many names.
        keep: f[E, G, 1, F], factors of the hidden layer for each of G groups of C / G rows, or None.
    """
    return _feed_forward(rows, kernels, activations, keep, batched_product)


def _feed_forward(rows: Array, kernels: tuple[Array, ...], activations: tuple[str, ...], keep: Array | None,
                  product: Product) -> Array:
    *inner, outer = kernels
    hidden = activate(activations, [product(rows, kernel) for kernel in inner])
    if keep is not None:
        groups = hidden.reshape(*keep.shape[:2], -1, keep.shape[-1])
        hidden = (groups * keep).reshape(hidden.shape)
    return product(hidden, outer)


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
