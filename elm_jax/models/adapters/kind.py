"""The base class of adapter kinds: settings, places in a network, roles of leaves.

A kind is a subclass of `AdapterKind` in a file of its own, beside its Flax module, and a row in
`config.KINDS`. Networks know places only: they call `config.attach` at each, whatever the kind.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.network import ADAPTER

SUBLAYERS = ("attention", "cross_attention", "mlp")
"""Places on a sub-layer's output, before its dropout and residual add."""
PROJECTIONS = ("query", "key", "value", "out", "wi", "wi_0", "wi_1", "wo")
"""Places on the output of a projection: of attention, all heads in one axis, and of a dense feed-forward.
The experts of a sparse one have no places; the sub-layer has."""
HIDDEN = "hidden"
"""Place on the input of a feed-forward's last projection, which is both arguments of the hook there."""
PLACES = (*SUBLAYERS, *PROJECTIONS, HIDDEN)
_SUFFIX = "_adapter"


def is_adapter_leaf(path: str) -> bool:
    """Whether a leaf path is an adapter's, e.g. ``encoder/layers_0/mlp_adapter/up/kernel``.

    Networks give what `config.attach` returns names that end in ``_adapter``, so this holds for every kind.
    """
    return any(part.endswith(_SUFFIX) for part in path.split("/"))


def check_targets(names: Any, known: Sequence[str], what: str, expected: str) -> tuple[str, ...]:
    """Returns the places that an adapter's setting ``targets`` names, in the order of `known`.

    Args:
        names: of the places.
        known: places that the kind of adapter has.
        what: a name is called so in the error, e.g. 'projection'.
        expected: says in words what there is.

    Raises:
        InputError: no tuple or list of names, none in it, or one that is not known.
    """
    if not isinstance(names, tuple | list) or not names:
        raise InputError(describe("The adapters' config is wrong", where="AdapterConfig.targets",
                                  got=repr(names)[:200], expected=expected))
    for name in names:
        if name not in known:
            raise unknown_name(what, str(name), known, "AdapterConfig.targets")
    return tuple(name for name in known if name in names)


@dataclasses.dataclass(frozen=True)
class AdapterKind:
    """Base class of adapter configs; a subclass's fields are its settings, all with defaults.

    Frozen and hashable, because it is part of a network's config.

    Attributes:
        kind: name in gin files and on cards.
        neutral: value of all its leaves with which it changes nothing.
        layers: layers that carry adapters, as `carriers` reads them; None for all. Norms below the lowest of
            them do not train.
    """

    kind: ClassVar[str]
    neutral: ClassVar[float] = 0.0
    layers: str | tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        """Returns the Flax module of a place (see `config.attach`); None if this kind has none there."""
        raise NotImplementedError

    def role_of(self, path: str) -> str | None:
        """Returns `ADAPTER` or `GATE` for a leaf of this kind; None for a leaf of the network itself."""
        return ADAPTER if is_adapter_leaf(path) else None

    def check_used(self, paths: Collection[str]) -> None:
        """Raises InputError if a setting has no effect in a network with these leaves, its adapters' too."""
        if not any(map(is_adapter_leaf, paths)):
            raise InputError(describe(
                "The network has none of the places that the adapters attach to", where="AdapterConfig",
                got=f"adapters of kind {self.kind!r}", cure="give other targets or layers",
                expected="a place of attention, of a sub-layer, or of a dense feed-forward: the experts of a "
                "sparse one have none"))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a JSON-ready dictionary of arguments of `config.AdapterConfig`."""
        return self.with_layers({"kind": self.kind, **dataclasses.asdict(self)})

    def with_layers(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Adds ``layers`` to a dictionary of settings; leaves it out, as older cards do, if it is None."""
        settings.pop("layers", None)
        if self.layers is None:
            return settings
        return {**settings, "layers": self.layers if isinstance(self.layers, str) else list(self.layers)}
