"""Experts whose low-rank updates (LoRA) lie in unlike layers, made alike before they are merged.

An update that an expert lacks is the zero update, and a norm that it did not train is the base's. So what the
expert says about a layer in which it has nothing is exact, and every method has a result there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.formats.model import TensorSpec
from elm_jax.merging.stream import LeafSource
from elm_jax.models import families
from elm_jax.models.adapters.kind import AdapterKind, is_adapter_leaf
from elm_jax.models.adapters.low_rank import DOWN, UP, LowRankConfig, merged_config, place_of
from elm_jax.models.network import NORM
from elm_jax.runtime import trees
from elm_jax.workflows.merge.merge_inputs import CastSource

Layers = tuple[int, ...] | None


class FilledSource:
    """An expert's leaves, together with leaves of the base and with updates of rank 0, as a source."""

    def __init__(self, source: LeafSource, base: LeafSource | None, shared: Sequence[str],
                 empty: Mapping[str, tuple[int, ...]]) -> None:
        """Stores the arguments; reads nothing.

        Args:
            source: the expert's leaves.
            base: of which it has some; None if `shared` is empty.
            shared: paths of the base's leaves.
            empty: shapes of leaves without elements, by path.
        """
        self._source, self._shared = source, frozenset(shared)
        # In float32, as an expert's leaves are.
        self._base = None if base is None else CastSource(base, "float32", "the base")
        self.specs = {**source.specs, **{path: self._base.specs[path] for path in shared},
                      **{path: TensorSpec(shape, "float32") for path, shape in empty.items()}}

    def fill(self, path: str, start: int, out: np.ndarray) -> None:
        """Reads whole rows into a flat array [n]."""
        if out.size:
            (self._base if path in self._shared else self._source).fill(path, start, out)


def check_layers(cards: Sequence[ExpertCard]) -> None:
    """Raises InputError if adapters of another kind than LoRA lie in unlike layers: absent is not zero."""
    first, *others = map(_adapter, cards)
    for card, adapter in zip(cards[1:], others, strict=True):
        if first is None or type(adapter) is not type(first) or isinstance(first, LowRankConfig):
            continue
        if adapter.layers != first.layers:
            raise InputError(describe(
                f"Adapters of kind {first.kind} in unlike layers cannot be merged",
                where=f"{cards[0].id} and {card.id}",
                got=f"{_in_words(first.layers)} and {_in_words(adapter.layers)}",
                expected="the same layers: of LoRA alone an absent adapter is an update of zero",
                cure="train the experts with one ADAPTER_LAYERS, or let each answer its own rows "
                "(`elm evaluate --mixed`)"))


def unlike(cards: Sequence[ExpertCard]) -> bool:
    """Whether the experts have low-rank updates, and in unlike layers."""
    adapters = list(map(_adapter, cards))
    return (all(isinstance(adapter, LowRankConfig) for adapter in adapters)
            and len({adapter.layers for adapter in adapters}) > 1)


def _adapter(card: ExpertCard) -> AdapterKind | None:
    """The adapters of an expert; their layers are numbers, or None for all."""
    return families.config_of(card.network).adapter


def absent_norms(cards: Sequence[ExpertCard], leaves: Sequence[Mapping[str, Any]], with_base: bool
                 ) -> set[str]:
    """Paths of the norms that some of the experts did not train because their lowest adapter lies higher.

    Args:
        cards: of the experts.
        leaves: of each, by path.
        with_base: whether there is a base to take them from.

    Returns:
        The paths; none if all have adapters in the same layers.

    Raises:
        InputError: there are such norms, and no base.
    """
    if not unlike(cards):
        return set()
    network = families.network_of(families.config_of(cards[0].network))
    some = set().union(*leaves) - set.intersection(*map(set, leaves))
    norms = {path for path in some if not is_adapter_leaf(path) and network.role_of(path) == NORM}
    if norms and not with_base:
        raise InputError(describe(
            "Norms that some experts trained and others left are merged with the base's", got="no base",
            where=", ".join(sorted(norms)[:3]), expected="the base that the experts were trained on",
            cure="--method task_arithmetic --base BASE, whose own weights give the mean; in Python "
            "merge(..., base=base)"))
    return norms


def completed(cards: Sequence[ExpertCard], sources: Sequence[LeafSource], base: LeafSource | None
              ) -> tuple[list[LeafSource], Layers]:
    """Makes experts alike that have low-rank updates in unlike layers.

    Args:
        cards: of the experts, which fit together.
        sources: their overlays.
        base: leaves of the base, if there is one.

    Returns:
        The sources, which have what they lacked: the base's norms, and in the first one updates of rank 0
        where no expert has any, so that every layer of the result has all of them. And the layers of the
        result: all that an expert has; None for all of the network.
    """
    layers = _joined(list(map(_adapter, cards)))
    if not unlike(cards):
        return list(sources), layers
    specs = [source.specs for source in sources]
    norms = absent_norms(cards, specs, base is not None)
    empty = _nowhere(cards[0], set().union(*specs), layers)
    return [FilledSource(source, base, sorted(norms - source.specs.keys()), {} if number else empty)
            for number, source in enumerate(sources)], layers


def _joined(adapters: Sequence[Any]) -> Layers:
    each = [adapter and adapter.layers for adapter in adapters]
    return None if None in each else tuple(sorted(set().union(*each)))


def _nowhere(card: ExpertCard, paths: set[str], layers: Layers) -> dict[str, tuple[int, ...]]:
    """Shapes of factors of rank 0 for the updates in the result's layers that no expert has."""
    places = {place_of(path): 1 for path in sorted(paths) if is_adapter_leaf(path) and path.endswith(DOWN)}
    config = families.config_of(card.network).with_adapter(merged_config(places, layers=layers))
    leaves = trees.flatten(families.network_of(config).abstract_params())
    found = {path: leaf.shape for path, leaf in leaves.items()
             if is_adapter_leaf(path) and path.endswith((DOWN, UP)) and path not in paths}
    return {path: (shape[0], 0) if path.endswith(DOWN) else (0, shape[1]) for path, shape in found.items()}


def notes_of(cards: Sequence[ExpertCard], leaves: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Says of each expert in which layers it has updates, and what that means; nothing if all are alike."""
    if not unlike(cards):
        return ()
    adapters = list(map(_adapter, cards))
    layers, norms = _joined(adapters), absent_norms(cards, leaves, with_base=True)
    return tuple(
        f"{card.id} has low-rank updates in {_in_words(adapter.layers)}, the result in {_in_words(layers)}: "
        "where it has none, its update counts as zero"
        + (", and norms that it did not train are the base's" if norms - own.keys() else "")
        for card, adapter, own in zip(cards, adapters, leaves, strict=True) if adapter.layers != layers)


def _in_words(layers: Layers) -> str:
    if layers is None:
        return "all layers"
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"

