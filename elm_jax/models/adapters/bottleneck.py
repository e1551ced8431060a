"""Bottleneck adapter: what a prompt expert trains beside the norms.

Source: Houlsby et al., https://arxiv.org/abs/1902.00751; place and size as in ELM,
https://arxiv.org/abs/2302.03202.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.models.layers.dense import Dense, stream
from elm_jax.types import Array

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
