"""Bottleneck adapters, which a prompt expert trains beside the norms.

Source: Houlsby et al., https://arxiv.org/abs/1902.00751; place and size as in ELM,
https://arxiv.org/abs/2302.03202.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.layers.dense import Dense, stream
from elm_jax.runtime.config_checks import check_dimension
from elm_jax.types import Array

INIT_STDDEV = 0.01
REDUCTION = 32
"""Default bottleneck is ``emb_dim // REDUCTION``. Source: ELM, arXiv 2302.03202, appendix."""


@dataclasses.dataclass(frozen=True)
class BottleneckConfig(AdapterKind):
    """Config of bottleneck adapters: small feed-forward networks after self-attention and feed-forward.

    Attributes:
        bottleneck: width R; None takes ``emb_dim // 32``, at least 1.
    """

    kind: ClassVar[str] = "bottleneck"
    bottleneck: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError unless the width is None or positive."""
        if self.bottleneck is not None:
            check_dimension("AdapterConfig.bottleneck", self.bottleneck)

    def width(self, emb_dim: int) -> int:
        """Bottleneck width R in a network of width D."""
        return self.bottleneck or max(1, emb_dim // REDUCTION)

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        """The adapter module of a place: after self-attention and after feed-forward; else None."""
        return Bottleneck(self, dtype) if place in ("attention", "mlp") else None

    def to_dict(self) -> dict[str, Any]:
        """Settings as a JSON-ready dictionary, without the kind: the format of older cards."""
        return self.with_layers({"bottleneck": self.bottleneck})


def bottleneck_of(adapter: AdapterKind | None, emb_dim: int, where: str) -> int:
    """Width R of the bottleneck adapters of a network of width D.

    Args:
        adapter: of the network.
        emb_dim: D.
        where: the config's field, for the error.

    Raises:
        InputError: the network has no adapters, or adapters of another kind.
    """
    if adapter is None:
        raise InputError(describe("This network has no adapters", where=where, expected="an AdapterConfig",
                                  cure="config.with_adapter(AdapterConfig())"))
    if not isinstance(adapter, BottleneckConfig):
        raise InputError(describe("This network has no bottleneck adapters", where=where,
                                  got=f"adapters of kind {adapter.kind!r}", expected="kind 'bottleneck'"))
    return adapter.width(emb_dim)


class Bottleneck(nn.Module):
    """Bottleneck adapter: ``y + W_up . gelu_tanh(W_down y + b_down) + b_up``.

    Weights start from N(0, 0.01) and biases from zero: a fresh adapter is almost the identity.

    Attributes:
        config: its width.
        dtype: of the computation.
    """

    config: BottleneckConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        """Applies the adapter: f[..., D] -> f[..., D]; the sub-layer's input x is not used."""
        del x
        init = nn.initializers.normal(stddev=INIT_STDDEV)
        hidden = Dense(
            self.config.width(y.shape[-1]), ("embed", "bottleneck"), self.dtype, init, use_bias=True,
            name="down",
        )(y)
        hidden = jax.nn.gelu(hidden, approximate=True)
        return y + stream(Dense(
            y.shape[-1], ("bottleneck", "embed"), self.dtype, init, use_bias=True, name="up"
        )(hidden))
