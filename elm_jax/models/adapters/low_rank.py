"""Low-rank updates of projections (LoRA).

Source: Hu et al., https://arxiv.org/abs/2106.09685, section 4.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.adapters.kind import PROJECTIONS, AdapterKind
from elm_jax.models.layers.dense import Dense
from elm_jax.runtime.config_checks import check_dimension
from elm_jax.types import Array

DOWN, UP = "down/kernel", "up/kernel"
"""Ends of the paths of an update's two factors."""
TARGETS = ("query", "value")
"""Projections that carry updates unless the config names others."""
_AXES = {"out": ("joined_kv", "embed"), "wo": ("mlp", "embed")} | dict.fromkeys(
    ("query", "key", "value"), ("embed", "joined_kv")) | dict.fromkeys(
    ("wi", "wi_0", "wi_1"), ("embed", "mlp"))
"""Logical axes of the kernel of each projection."""


@dataclasses.dataclass(frozen=True)
class LowRankConfig(AdapterKind):
    """Config of low-rank updates (LoRA) of projections.

    Attributes:
        rank: R of an update.
        alpha: updates are scaled by ``alpha / rank``; None for no scaling.
        targets: the projections that carry an update, names of `kind.PROJECTIONS`, or ``'all'``; a name that
            a network does not have is without effect there.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        check_dimension("AdapterConfig.rank", self.rank)
        alpha = self.alpha
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if alpha is not None and not (number and alpha > 0):
            raise InputError(describe("The adapters' config is wrong", where="AdapterConfig.alpha",
                                      got=repr(alpha), expected="None or a number above 0"))
        targets = PROJECTIONS if self.targets == "all" else self.targets
        if not isinstance(targets, list | tuple) or not targets:
            raise InputError(describe("The adapters' config is wrong", where="AdapterConfig.targets",
                                      got=repr(self.targets), expected="names of projections, or 'all'"))
        for name in targets:
            if name not in PROJECTIONS:
                raise unknown_name("projection", str(name), PROJECTIONS, "AdapterConfig.targets")
        object.__setattr__(self, "targets", tuple(targets))

    @property
    def scale(self) -> float:
        """Factor of the updates: ``alpha / rank``, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        """The update module of a place: a projection among the targets."""
        return LowRank(self.rank, self.scale, dtype, _AXES[place]) if place in self.targets else None

    def to_dict(self) -> dict[str, Any]:
        """Settings as a JSON-ready dictionary; targets only if they are others than `TARGETS`."""
        values = super().to_dict()
        targets = values.pop("targets")
        return values if targets == TARGETS else {**values, "targets": list(targets)}


class LowRank(nn.Module):
    """Low-rank update of a projection y of x: ``y + scale . W_up W_down x``, without biases.

    W_down starts random and W_up from zero, so a fresh update changes nothing.

    Attributes:
        rank: R.
        scale: alpha / R.
        dtype: of the computation.
        axes: logical axes of the projection's kernel.
    """

    rank: int
    scale: float
    dtype: jnp.dtype
    axes: tuple[str, str] = ("embed", "joined_kv")

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        """Applies the update: projection y f[..., O] and its input x f[..., D] -> f[..., O]."""
        inside, outside = self.axes
        hidden = Dense(self.rank, (inside, "bottleneck"), self.dtype, name="down")(x)
        zeros = nn.initializers.zeros
        update = Dense(y.shape[-1], ("bottleneck", outside), self.dtype, zeros, name="up")(hidden)
        return y + self.scale * update
