"""Low-rank update of a projection (LoRA)."""

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.models.layers.dense import Dense
from elm_jax.types import Array


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
