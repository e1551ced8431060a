"""Learned factors of activations, (IA)^3: each feature of a projection times a number of its own.

Source: Liu et al., https://arxiv.org/abs/2205.05638, section 3.3.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.adapters.kind import HIDDEN, PROJECTIONS, AdapterKind, check_targets
from elm_jax.types import Array

FACTORS = "scaling"
"""End of the path of a place's factors."""
_PLACES = (*PROJECTIONS, HIDDEN)
_AXES = {"query": "joined_kv", "key": "joined_kv", "value": "joined_kv", "out": "embed", "wi": "mlp",
         "wi_0": "mlp", "wi_1": "mlp", "wo": "embed", HIDDEN: "mlp"}
"""Logical axis of what is scaled, by place."""


@dataclasses.dataclass(frozen=True)
class ScalingConfig(AdapterKind):
    """Config of learned factors, (IA)^3.

    Attributes:
        targets: what is scaled: outputs of projections, and ``hidden``, the input of a feed-forward's last.
    """

    kind: ClassVar[str] = "scaling"
    neutral: ClassVar[float] = 1.0
    targets: tuple[str, ...] = ("key", "value", HIDDEN)

    def __post_init__(self) -> None:
        """Sorts the targets; raises InputError for one that there is not."""
        object.__setattr__(self, "targets", check_targets(
            self.targets, _PLACES, "target", f"some of {_PLACES}"))

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        """The factors of a place, if it is a target."""
        return Scaling(_AXES[place]) if place in self.targets else None

    def to_dict(self) -> dict[str, Any]:
        """Settings as a JSON-ready dictionary."""
        return self.with_layers({"kind": self.kind, "targets": list(self.targets)})


class Scaling(nn.Module):
    """Factors of the last axis, which start from 1.

    Attributes:
        axis: logical axis of what is scaled.
    """

    axis: str

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        """Scales f[..., O]; x is not used."""
        del x
        factors = param_with_axes(FACTORS, nn.initializers.ones, y.shape[-1:], jnp.float32, axes=(self.axis,))
        return y * jnp.expand_dims(factors, tuple(range(y.ndim - 1))).astype(y.dtype)
