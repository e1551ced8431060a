"""The table of adapter kinds, and the one function with which networks attach adapters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.adapters.kind import PLACES, AdapterKind
from elm_jax.models.adapters.low_rank import LowRankConfig
from elm_jax.models.adapters.scaling import ScalingConfig
from elm_jax.types import Array

KINDS: dict[str, type[AdapterKind]] = {row.kind: row for row in (BottleneckConfig, LowRankConfig,
                                                              ScalingConfig)}
"""Each kind of adapter by its name. A further kind is a file beside this one, and a row here."""
Hook = Callable[[Array, Array], Array]
"""(output f[..., O], input f[..., D]) of a sub-layer or projection -> the output with its adapter."""


def attach(adapter: AdapterKind | None, place: str, dtype: jnp.dtype) -> Hook:
    """Returns the adapter module of one place of a network; the identity if there is none.

    Call it in the `setup` of a Flax module and store the result under a name that ends in ``_adapter``. That
    name is in the leaves' paths and distinguishes adapters from the network.

    Args:
        adapter: of the network, or None.
        place: one of `PLACES`.
        dtype: of the computation.
    """
    if place not in PLACES:
        raise unknown_name("place of an adapter", place, PLACES)
    module = None if adapter is None else adapter.module(place, dtype)
    return _unchanged if module is None else module


def _unchanged(y: Array, x: Array) -> Array:
    del x
    return y


def AdapterConfig(
    bottleneck: int | None = None, kind: str = BottleneckConfig.kind, rank: int | None = None,
    alpha: float | None = None, targets: Sequence[str] | None = None, **others: Any,
) -> AdapterKind:
    """Builds the config of a kind of adapter from settings, as in gin files and on cards.

    A setting that is None takes the kind's own default.

    Args:
        bottleneck: for kind ``bottleneck``, see `BottleneckConfig`.
        kind: a name of `KINDS`.
        rank: for kind ``lora``, see `LowRankConfig`.
        alpha: for kind ``lora``, see `LowRankConfig`.
        targets: for kinds ``lora`` and ``scaling``, see `LowRankConfig` and `ScalingConfig`.
        **others: further settings of a kind, and those of further kinds.

    Raises:
        InputError: an unknown kind or setting, a value out of range, a setting without effect.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown_name("kind of adapter", str(kind), KINDS, "AdapterConfig.kind")
    settings = {"bottleneck": bottleneck, "rank": rank, "alpha": alpha, "targets": targets, **others}
    own = {field.name for field in dataclasses.fields(KINDS[kind])}
    for name in sorted(settings.keys() - own):
        _check_without_effect(name, settings[name], kind)
    return KINDS[kind](**{name: settings[name] for name in own if settings.get(name) is not None})


def settings_of_kinds() -> list[str]:
    """Names of the settings of all kinds of adapters."""
    return sorted({"kind", *(field.name for row in KINDS.values() for field in dataclasses.fields(row))})


def _check_without_effect(name: str, value: Any, kind: str) -> None:
    """Refuses a setting that only other kinds have, unless its value is the default there.

    A file that lists every setting, as gin's operative config does, holds such defaults.

    Raises:
        InputError: no kind has the setting, or its value would be ignored.
    """
    defaults = {row.kind: field.default for row in KINDS.values() for field in dataclasses.fields(row)
                if field.name == name}
    if not defaults:
        raise unknown_name("AdapterConfig field", name, settings_of_kinds())
    if value is not None and value not in defaults.values():
        raise InputError(describe(
            "This setting has no effect on adapters of this kind", where=f"AdapterConfig.{name}",
            got=f"{value!r} with kind {kind!r}", expected=f"kind {' or '.join(map(repr, defaults))}",
            cure="leave the setting out, or choose the other kind"))


def adapter_of(network: Mapping[str, Any]) -> AdapterKind | None:
    """Builds the adapter config in a network's dictionary, such as a card's; None if it has none.

    Raises:
        InputError: as `AdapterConfig`.
    """
    values = network.get("adapter")
    if values is None or isinstance(values, AdapterKind):
        return values
    if not isinstance(values, Mapping):
        raise InputError(describe("The adapters' config is wrong", where="adapter", got=repr(values)[:200],
                                  expected="None or an AdapterConfig"))
    return AdapterConfig(**values)
