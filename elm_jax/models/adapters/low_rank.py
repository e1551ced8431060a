"""Low-rank updates of projections (LoRA).

Source: Hu et al., https://arxiv.org/abs/2106.09685, section 4.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.layers.dense import Dense
from elm_jax.runtime.config_checks import check_dimension
from elm_jax.types import Array

DOWN, UP = "down/kernel", "up/kernel"
"""Ends of the paths of an update's two factors."""


@dataclasses.dataclass(frozen=True)
class LowRankConfig(AdapterKind):
    """Config of low-rank updates (LoRA) of the query and value projections of every attention.

    Attributes:
        rank: R of an update.
        alpha: updates are scaled by ``alpha / rank``; None for no scaling.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        check_dimension("AdapterConfig.rank", self.rank)
        alpha = self.alpha
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if alpha is not None and not (number and alpha > 0):
            raise InputError(describe("The adapters' config is wrong", where="AdapterConfig.alpha",
                                      got=repr(alpha), expected="None or a number above 0"))

    @property
    def scale(self) -> float:
        """Factor of the updates: ``alpha / rank``, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        """The update module of a place: queries and values of each attention."""
        return LowRank(self.rank, self.scale, dtype) if place in ("query", "value") else None


class LowRank(nn.Module):
    """Low-rank update of a projection y of x: ``y + scale . W_up W_down x``, without biases.

    W_down starts random and W_up from zero, so a fresh update changes nothing.

    Attributes:
        rank: R.
        scale: alpha / R.
        dtype: of the computation.
    """

    rank: int
    scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        """Applies the update: projection y f[..., O] and its input x f[..., D] -> f[..., O]."""
        hidden = Dense(self.rank, ("embed", "bottleneck"), self.dtype, name="down")(x)
        zeros = nn.initializers.zeros
        axes = ("bottleneck", "joined_kv")
        return y + self.scale * Dense(y.shape[-1], axes, self.dtype, zeros, name="up")(hidden)
