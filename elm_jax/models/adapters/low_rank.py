"""Low-rank updates of projections (LoRA), with a rank and a scale of their own for each kind of projection.

Source: Hu et al., https://arxiv.org/abs/2106.09685, section 4.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.adapters.kind import PROJECTIONS, AdapterKind, check_targets
from elm_jax.models.layers.dense import Dense
from elm_jax.models.network import has_expert_axis
from elm_jax.runtime.config_checks import check_dimension
from elm_jax.types import Array

DOWN, UP = "down/kernel", "up/kernel"
"""Ends of the paths of an update's two factors."""
TARGETS = ("query", "value")
"""Projections that are updated by default: those of the paper's experiments."""
_AXES = {"query": ("embed", "joined_kv"), "key": ("embed", "joined_kv"), "value": ("embed", "joined_kv"),
         "out": ("joined_kv", "embed"), "wi": ("embed", "mlp"), "wi_0": ("embed", "mlp"),
         "wi_1": ("embed", "mlp"), "wo": ("mlp", "embed")}
"""Logical axes of a projection's input and output, by place."""


@dataclasses.dataclass(frozen=True)
class LowRankConfig(AdapterKind):
    """Config of low-rank updates (LoRA) of projections, the same in every layer.

    Attributes:
        rank: R of an update.
        alpha: updates are scaled by ``alpha / rank``; None for no scaling.
        targets: the projections that are updated, names of `kind.PROJECTIONS`; or ``'all'``, of which a
            network takes those that it has.
        ranks: ranks by projection where they differ from `rank`; a dictionary becomes sorted pairs.
        alphas: likewise where they differ from `alpha`.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Sorts targets and pairs; raises InputError for a value out of range or without effect."""
        check_dimension("AdapterConfig.rank", self.rank)
        _check_alpha("AdapterConfig.alpha", self.alpha)
        names = PROJECTIONS if self.targets == "all" else self.targets
        targets = check_targets(names, PROJECTIONS, "projection", f"'all', or some of {PROJECTIONS}")
        object.__setattr__(self, "targets", targets)
        for field in ("ranks", "alphas"):
            object.__setattr__(self, field, _pairs(field, getattr(self, field), self.targets))
        for place, rank in self.ranks:
            check_dimension(f"AdapterConfig.ranks, {place}", rank)
        for place, alpha in self.alphas:
            _check_alpha(f"AdapterConfig.alphas, {place}", alpha, or_none=False)

    @property
    def scale(self) -> float:
        """Factor of the updates of projections without a setting of their own: ``alpha / rank``, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def rank_of(self, place: str) -> int:
        """Rank of the updates of a projection."""
        return dict(self.ranks).get(place, self.rank)

    def scale_of(self, place: str) -> float:
        """Factor of the updates of a projection: its alpha over its rank, or 1."""
        alpha = dict(self.alphas).get(place, self.alpha)
        return 1.0 if alpha is None else alpha / self.rank_of(place)

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        """The update module of a place, if it is a target."""
        if place not in self.targets:
            return None
        return LowRank(self.rank_of(place), self.scale_of(place), dtype, _AXES[place])

    def check_used(self, paths: Collection[str]) -> None:
        """Raises InputError if a network with these leaves has no projection of a target's name."""
        named = () if self.targets == PROJECTIONS else self.targets
        unused = [place for place in named if not any(f"/{place}_adapter/" in path for path in paths)]
        if unused:
            has = [place for place in PROJECTIONS
                   if any(f"/{place}/kernel" in path and not has_expert_axis(path) for path in paths)]
            raise InputError(describe("The network has no such projection", where="AdapterConfig.targets",
                                      got=", ".join(unused), expected=f"some of {', '.join(has)}"))
        super().check_used(paths)

    def to_dict(self) -> dict[str, Any]:
        """Settings as a JSON-ready dictionary; those by projection only where they are not the default."""
        more: dict[str, Any] = {}
        if self.targets != TARGETS:
            more["targets"] = list(self.targets)
        for field in ("ranks", "alphas"):
            if getattr(self, field):
                more[field] = dict(getattr(self, field))
        return self.with_layers({"kind": self.kind, "rank": self.rank, "alpha": self.alpha, **more})


def place_of(path: str) -> str:
    """The projection of an update's leaf: ``encoder/layers_0/mlp/wo_adapter/down/kernel`` -> ``wo``."""
    return path.split("/")[-3].removesuffix("_adapter")


def merged_config(ranks: Mapping[str, int], **others: Any) -> LowRankConfig:
    """Config of unscaled updates with these ranks by projection, of which there is at least one.

    Args:
        ranks: by projection.
        **others: settings of every kind of adapter.
    """
    rank = max(ranks.values())
    return LowRankConfig(rank=rank, targets=tuple(ranks),
                         ranks={place: own for place, own in ranks.items() if own != rank}, **others)


def _check_alpha(where: str, alpha: Any, or_none: bool = True) -> None:
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not (number and alpha > 0) and not (alpha is None and or_none):
        raise InputError(describe("The adapters' config is wrong", where=where, got=repr(alpha),
                                  expected="None or a number above 0" if or_none else "a number above 0"))


def _pairs(field: str, values: Any, targets: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    where = f"AdapterConfig.{field}"
    try:
        found = dict(values)
    except (TypeError, ValueError):
        found = None
    if found is None or not (isinstance(values, Mapping) or len(found) == len(values)):
        raise InputError(describe("The adapters' config is wrong", where=where, got=repr(values)[:200],
                                  expected="a dictionary by projection"))
    for place in found:
        if place not in targets:
            raise unknown_name("target", str(place), targets, where)
    return tuple((place, found[place]) for place in PROJECTIONS if place in found)


class LowRank(nn.Module):
    """Low-rank update of a projection y of x: ``y + scale . W_up W_down x``, without biases.

    W_down starts random and W_up from zero, so a fresh update changes nothing.

    Attributes:
        rank: R.
        scale: alpha / R.
        dtype: of the computation.
        axes: logical axes of x and y.
    """

    rank: int
    scale: float
    dtype: jnp.dtype
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        """Applies the update: projection y f[..., O] and its input x f[..., D] -> f[..., O]."""
        hidden = Dense(self.rank, (self.axes[0], "bottleneck"), self.dtype, gradient_by_outputs=True,
                       name="down")(x)
        zeros = nn.initializers.zeros
        axes = ("bottleneck", self.axes[1])
        # The hidden values are scaled, not the update and its gradient, which are many times as large.
        return y + Dense(y.shape[-1], axes, self.dtype, zeros, name="up")(self.scale * hidden)
