"""Which adapters a network has, and of what size."""

import dataclasses
from typing import Any

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime.config_checks import check_dimension

ADAPTER_KINDS = ("bottleneck", "lora")
REDUCTION = 32
"""Default bottleneck is ``emb_dim // REDUCTION``. Source: ELM, arXiv 2302.03202, appendix."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a prompt expert adds: bottleneck adapters, or LoRA's low-rank updates.

    Attributes:
        bottleneck: width R of the adapters after self-attention and feed-forward; None takes
            ``emb_dim // 32``, at least 1.
        kind: ``bottleneck``, or ``lora``: updates of the query and value projections of every attention.
        rank: of LoRA's updates.
        alpha: LoRA's updates are scaled by ``alpha / rank``; None for no scaling.
    """

    bottleneck: int | None = None
    kind: str = "bottleneck"
    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.bottleneck is not None:
            check_dimension("AdapterConfig.bottleneck", self.bottleneck)
        if self.kind not in ADAPTER_KINDS:
            raise unknown_name("kind of adapter", str(self.kind), ADAPTER_KINDS, "AdapterConfig.kind")
        check_dimension("AdapterConfig.rank", self.rank)
        alpha = self.alpha
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if alpha is not None and not (number and alpha > 0):
            raise InputError(describe("The adapters' config is wrong", where="AdapterConfig.alpha",
                                      got=repr(alpha), expected="None or a number above 0"))

    @property
    def scale(self) -> float:
        """What LoRA's updates are multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """The fields that count for the kind; bottleneck adapters as before there were other kinds."""
        if self.kind == "bottleneck":
            return {"bottleneck": self.bottleneck}
        return {"kind": self.kind, "rank": self.rank, "alpha": self.alpha}


def is_adapter_leaf(path: str) -> bool:
    """Whether the leaf belongs to an adapter, e.g. ``encoder/layers_0/mlp_adapter/up/kernel``."""
    return any(part.endswith("_adapter") for part in path.split("/"))
