"""Bottleneck adapter, or low-rank update: what a prompt expert trains beside the norms.

Source: Houlsby et al., https://arxiv.org/abs/1902.00751; place and size as in ELM,
https://arxiv.org/abs/2302.03202.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.models.layers import Dense, stream
from elm_jax.models.t5_config import AdapterConfig
from elm_jax.types import Array

__all__ = ["Adapter", "AdapterConfig", "LowRank"]

INIT_STDDEV = 0.01


class Adapter(nn.Module):
    """``y = x + W_up . gelu_tanh(W_down x + b_down) + b_up``.

    Weights start from N(0, 0.01) and biases from zero: a fresh adapter is almost the identity.

    Attributes:
        bottleneck: width R.
        dtype: of the computation.
    """

    bottleneck: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """f[..., D] -> f[..., D]."""
        init = nn.initializers.normal(stddev=INIT_STDDEV)
        hidden = Dense(
            self.bottleneck, ("embed", "bottleneck"), self.dtype, init, use_bias=True, name="down"
        )(x)
        hidden = jax.nn.gelu(hidden, approximate=True)
        return x + stream(Dense(
            x.shape[-1], ("bottleneck", "embed"), self.dtype, init, use_bias=True, name="up"
        )(hidden))


class LowRank(nn.Module):
    """``scale . W_up W_down x``: LoRA's update of a projection, without biases.

    W_down starts random and W_up from zero, so a fresh update changes nothing.
    Source: Hu et al., https://arxiv.org/abs/2106.09685, section 4.

    Attributes:
        features: output size of the projection.
        rank: R.
        scale: alpha / R.
        dtype: of the computation.
    """

    features: int
    rank: int
    scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """f[..., D] -> f[..., features]."""
        hidden = Dense(self.rank, ("embed", "bottleneck"), self.dtype, name="down")(x)
        zeros = nn.initializers.zeros
        axes = ("bottleneck", "joined_kv")
        return self.scale * Dense(self.features, axes, self.dtype, zeros, name="up")(hidden)
