"""The experts of a sparse layer: E feed-forwards without biases, each on rows of its own."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.blocks.dispatch import Blocks
from elm_jax.models.blocks.grouped_product import batched_product, grouped_product
from elm_jax.models.blocks.spread import KERNEL_AXES
from elm_jax.models.layers.dense import Dropout, activate
from elm_jax.runtime.sharding import constrain
from elm_jax.types import Array

Product = Callable[[Array, Array], Array]


class Experts(nn.Module):
    """E feed-forwards ``act(x wi) wo``, or gated ``(act_0(x wi_0) * act_1(x wi_1)) wo``.

    Attributes:
        num_experts: E.
        emb_dim: D.
        mlp_dim: hidden width F of an expert.
        activations: one or two names of `layers.dense.ACTIVATION_FUNCTIONS`.
        dropout_rate: of the hidden layer; the rows of one expert in a group share a draw.
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
        size = (self.emb_dim, self.mlp_dim)
        for name in self._inner:
            setattr(self, name, _Kernels(self.num_experts, *size, KERNEL_AXES, self.dtype))
        outer = (KERNEL_AXES[0], *KERNEL_AXES[:0:-1])
        self.wo = _Kernels(self.num_experts, *size[::-1], outer, self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self) -> tuple[Array, ...]:
        """The kernels f[E, D, F] of the hidden layer, and f[E, F, D] of the outputs, in `dtype`."""
        return (*(getattr(self, name)() for name in self._inner), self.wo())

    def keep(self, groups: int, deterministic: bool) -> Array | None:
        """Draws the hidden layer's factors f[E, G, 1, F]; None if nothing is dropped."""
        if deterministic or self.dropout_rate == 0.0:
            return None
        ones = jnp.ones((self.num_experts, groups, 1, self.mlp_dim), self.dtype)
        return self.dropout(ones, deterministic)

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
    def dropped(hidden: Array) -> Array:
        groups = hidden.reshape(*keep.shape[:2], -1, keep.shape[-1])
        return (groups * keep).reshape(hidden.shape)

    return _feed_forward(rows, kernels, activations, None if keep is None else dropped, batched_product)


def expert_blocks(rows: Array, blocks: Blocks, kernels: tuple[Array, ...], activations: tuple[str, ...],
                  keep: Array | None = None, groups: Array | None = None) -> Array:
    """Applies to each block its expert: f[n, b, D] -> f[n, b, D]; unused blocks give 0.

    Args:
        rows: f[n, b, D].
        blocks: of the n blocks.
        kernels: f[E, D, F], one or two, and f[E, F, D].
        activations: as many names.
        keep: f[E, G, 1, F], factors of the hidden layer, or None.
        groups: i32[n, b], the group of each row, for `keep`; G in empty slots.
    """
    def dropped(hidden: Array) -> Array:
        return hidden * keep[:, :, 0].at[blocks.experts[:, None], groups].get(mode="fill", fill_value=0)

    return _feed_forward(rows, kernels, activations, None if keep is None else dropped,
                         functools.partial(grouped_product, blocks=blocks))


def _feed_forward(rows: Array, kernels: tuple[Array, ...], activations: tuple[str, ...],
                  dropped: Callable[[Array], Array] | None, product: Product) -> Array:
    *inner, outer = kernels
    hidden = activate(activations, [product(rows, kernel) for kernel in inner])
    return product(hidden if dropped is None else dropped(hidden), outer)


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
        # Cast before gathering: a kernel that is split over the data axis is gathered in `dtype`.
        return constrain(kernel.astype(self.dtype), *self.axes)
