"""Layer norm with a bias, as in GPT-2."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.layers.recompute import recomputed
from elm_jax.types import Array


class LayerNorm(nn.Module):
    """Layer norm ``y = (x - mean) / sqrt(variance + epsilon) * scale + bias`` in float32.

    Source: Ba et al., https://arxiv.org/abs/1607.06450.

    Attributes:
        dtype: of the result.
        epsilon: added to the variance.
    """

    dtype: jnp.dtype
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises f[..., D]; returns it in `dtype`."""
        size = (x.shape[-1],)
        scale = param_with_axes("scale", nn.initializers.ones, size, jnp.float32, axes=("embed",))
        bias = param_with_axes("bias", nn.initializers.zeros, size, jnp.float32, axes=("embed",))
        return _normaliser(self.epsilon)(x, scale, bias).astype(self.dtype)


@functools.cache
def _normaliser(epsilon: float) -> Callable[[Array, Array, Array], Array]:
    """Layer norm of f[..., D] -> f32[..., D], scale and bias f32[D]; its gradient keeps the input only."""

    @recomputed(num_tied=1)
    def normalise(x: Array, scale: Array, bias: Array) -> Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
        last = tuple(range(x.ndim - 1))
        return x * jnp.expand_dims(scale, last) + jnp.expand_dims(bias, last)

    return normalise
