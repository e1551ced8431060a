"""Layers of networks: dense, RMS norm, embedding, activations, dropout.

Every layer keeps float32 parameters, computes in `dtype`, and names its parameters' logical axes
with `param_with_axes`, as T5X's minimal T5 does.

Source: Raffel et al., https://arxiv.org/abs/1910.10683.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.layers.recompute import recomputed
from elm_jax.runtime.sharding import constrain, num_placed
from elm_jax.types import Array

RMS_EPSILON = 1e-6
LOGITS_PRECISION = jax.lax.Precision.HIGHEST
"""By default TPUs and recent GPUs multiply float32 in passes of fewer bits, and scores of answer choices are
close together. The head is about 2 % of the work at XL."""
FEW_ROWS = 16
"""Steps of so many rows compute the tied head with the table as the left side of the product."""
MASKED = -1e10
"""Added to a masked attention logit. Finite, so that a row without any key stays finite."""
Initializer = Callable[..., Array]


def stream(x: Array) -> Array:
    """Constrains the residual stream f[B, L, D] to its sharding; D is whole on every device."""
    return constrain(x, "batch", "length", None)


fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
fan_in_truncated = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Dense(nn.Module):
    """Dense layer ``y = x W (+ b)``: f[..., I] -> f[..., O], kernel f32[I, O].

    Attributes:
        features: output size O.
        axes: logical axes of the kernel; a bias has the second one.
        dtype: of the computation.
        kernel_init: initialiser of the kernel.
        use_bias: adds a bias that starts at zero.
        precision: of the product; None is the device's own, which in float32 can be bfloat16 passes.
        gradient_by_outputs: the gradient of a kernel with at most half as many outputs as inputs is computed
            as [O, I], on one device. It is the same but for its last bits.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    kernel_init: Initializer = fan_in_truncated
    use_bias: bool = False
    precision: jax.lax.Precision | None = None
    gradient_by_outputs: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the layer to the last axis: f[..., I] -> f[..., O]."""
        kernel = param_with_axes(
            "kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32, axes=self.axes
        )
        # One row a token: XLA's CPU backend copies the gradient of a product of three axes into
        # transposed order, and computes all elementwise parts of it once more for that.
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        # Cast before gathering: a kernel that is split over the data axis is gathered in `dtype`.
        kernel = constrain(kernel.astype(self.dtype), *self.axes)
        if self.gradient_by_outputs and self.features <= x.shape[-1] // 2 and num_placed() == 1:
            # XLA's CPU backend computes the gradient [I, O] of a narrow kernel 2 to 15 times as slowly as
            # [O, I]. The barrier keeps the transposition out of that product.
            kernel = jax.lax.optimization_barrier(kernel.T).T
        y = jnp.dot(rows, kernel, precision=self.precision)
        if self.use_bias:
            bias = param_with_axes(
                "bias", nn.initializers.zeros, (self.features,), jnp.float32, axes=self.axes[1:]
            )
            y = y + bias.astype(self.dtype)[None, :]
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """RMS norm ``y = x / sqrt(mean(x^2) + epsilon) * scale`` in float32, without mean or bias.

    Source: Zhang and Sennrich, https://arxiv.org/abs/1910.07467.

    Attributes:
        dtype: of the result.
        epsilon: added to the mean square.
        axes: logical axis of the scale.
    """

    dtype: jnp.dtype
    epsilon: float = RMS_EPSILON
    axes: tuple[str] = ("embed",)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises f[..., D]; returns it in `dtype`."""
        scale = param_with_axes("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=self.axes)
        return _normaliser(self.epsilon)(x, scale).astype(self.dtype)


@functools.cache
def _normaliser(epsilon: float) -> Callable[[Array, Array], Array]:
    """RMS norm of f[..., D] with scale f32[D] -> f32[..., D]; its gradient keeps the input only."""

    @recomputed(num_tied=1)
    def normalise(x: Array, scale: Array) -> Array:
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
        return x * inverse * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))

    return normalise


class Embed(nn.Module):
    """Token embedding f32[V, D]: lookup by gather, and the tied head.

    Attributes:
        num_embeddings: rows V.
        features: width D.
        dtype: of the looked-up rows.
        stddev: of the rows' initial values.
        rows: logical axis of the rows.
    """

    num_embeddings: int
    features: int
    dtype: jnp.dtype
    stddev: float = 1.0
    rows: str = "vocab"

    def setup(self) -> None:
        """Creates the table f32[V, D]."""
        self.embedding = param_with_axes(
            "embedding", nn.initializers.normal(stddev=self.stddev),
            (self.num_embeddings, self.features), jnp.float32, axes=(self.rows, "embed"),
        )

    def __call__(self, tokens: Array) -> Array:
        """Looks up tokens i32[...] -> [..., D] in `dtype`; a token outside of the vocabulary gives NaN."""
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill")
        return stream(rows.astype(self.dtype))

    def attend(self, x: Array) -> Array:
        """Applies the tied head: f[..., D] -> logits f32[..., V], scaled by ``D ** -0.5``."""
        return self.unscaled(x.astype(jnp.float32) * self.features**-0.5)

    def unscaled(self, x: Array) -> Array:
        """Applies the tied head without scaling: f[..., D] -> logits f32[..., V]."""
        x = x.astype(jnp.float32)
        if x.shape[-2] == 1 and x.size <= FEW_ROWS * self.features:
            # The table on the left: XLA's CPU backend reads it a third faster. The barrier keeps it there.
            rows = x.reshape(-1, self.features)
            logits = jnp.dot(self.embedding, rows.T, precision=LOGITS_PRECISION)
            return jax.lax.optimization_barrier(logits).T.reshape(*x.shape[:-1], self.num_embeddings)
        return jnp.einsum("...d,vd->...v", x, self.embedding, precision=LOGITS_PRECISION)


def activate(names: tuple[str, ...], parts: list[Array]) -> Array:
    """Product of the activations of one or two arrays f[B, L, F]; returns f[B, L, F].

    Its gradient recomputes them: otherwise GELU's derivative would keep several values for each layer.
    """

    def product(*parts: Array) -> Array:
        functions = [ACTIVATION_FUNCTIONS[name] for name in names]
        activated = [function(part) for function, part in zip(functions, parts, strict=True)]
        return functools.reduce(jnp.multiply, activated)

    return recomputed(num_tied=len(parts))(product)(*parts)


class Dropout(nn.Module):
    """Dropout with one mask for all positions: axis -2 has one draw, as in T5X.

    Attributes:
        rate: share of the features that are set to zero.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Drops and rescales features: f[..., L, F] -> f[..., L, F]; the identity if deterministic."""
        if deterministic or self.rate == 0.0:
            return x
        shape = (*x.shape[:-2], 1, x.shape[-1])
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)
        return x * (keep.astype(x.dtype) / (1.0 - self.rate))
