"""Regions of a model that have their own merge settings: modules, and ranges of layers."""

import dataclasses
import re
from collections.abc import Sequence

from elm_jax.errors import InputError, describe
from elm_jax.merging.recipes.depth import layer_of, name_parts, relative_depth, stack_sizes

_INPUT_LEAF = re.compile(r"(?<!un)embed(?!_out)|\bwte\b|\bwpe\b|\bshared\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Region:
    """A region of a model: one of its modules, or some layers of one stack.

    Attributes:
        module: component of a leaf's name, as in ``encoder.block.0``; None for the whole model.
        layers: first layer and the one after the last; None for all. Gradients run over these layers.
    """

    module: str | None = None
    layers: tuple[int, int] | None = None

    def has(self, name: str) -> bool:
        """Whether a leaf or a stack is in the region's module; mergekit's T5 has the head in ``shared``."""
        parts = name_parts(name)
        return self.module in (None, *parts) or (self.module == "shared" and parts[0] == "lm_head")

    def __str__(self) -> str:
        module = f"module {self.module}" if self.module else ""
        layers = f"layers {self.layers[0]} to {self.layers[1] - 1}" if self.layers else ""
        return " ".join(filter(None, (module, layers))) or "the whole model"


def places_of(leaf: str, depth: float, regions: Sequence[Region]) -> list[tuple[Region | None, float]]:
    """The regions that contain a leaf, each with the leaf's depth in it.

    Args:
        leaf: its name.
        depth: relative depth in its stack, from 0 to 1; regions of layers compute their own.
        regions: none, or parts that together make up the model.

    Raises:
        InputError: the leaf is outside of all regions.
    """
    if not regions:
        return [(None, depth)]
    stack, layer = layer_of(leaf) or (None, None)
    inside = [region for region in regions if region.has(stack or leaf)]
    if layer is None:
        return _outside_of_layers(leaf, inside or regions)
    for region in inside:
        if region.layers is None:
            return [(region, depth)]
        first, stop = region.layers
        if first <= layer < stop:
            return [(region, relative_depth(layer - first, stop - first))]
    raise InputError(describe(
        "A leaf lies outside of all slices and modules", where=f"leaf {leaf}",
        expected=f"a leaf of {', '.join(map(str, regions))}",
        cure="give settings for every module and all layers"))


def _outside_of_layers(leaf: str, regions: Sequence[Region]) -> list[tuple[Region, float]]:
    """Regions of a leaf outside of layers: the module's first for an embedding, else its last."""
    chosen: dict[str | None, Region] = {}
    for region in regions:
        if region.module not in chosen or not _INPUT_LEAF.search(leaf):
            chosen[region.module] = region
    return [(region, 0.0) for region in chosen.values()]


def check_layers(regions: Sequence[Region], leaves: Sequence[str]) -> None:
    """Raises InputError unless each region has leaves and regions of layers cover one whole stack each."""
    stacks = stack_sizes(leaves)
    stops: dict[Region, int] = {}
    for region in regions:
        if not any(map(region.has, leaves)):
            raise InputError(describe("A module has no leaves", where=f"module {region.module}",
                                      expected="a component of leaf names, such as encoder or decoder"))
        if region.layers:
            module = Region(region.module)
            stops[module] = max(region.layers[1], stops.get(module, 0))
    for module, stop in stops.items():
        own = {stack: count for stack, count in stacks.items() if module.has(stack)}
        if len(own) != 1:
            raise InputError(describe(
                "Slices need one stack of layers", where=module,
                got=f"stacks {', '.join(sorted(own)) or 'none'}",
                cure="use modules: with slices of each module" if own else "use models:"))
        (stack, count), = own.items()
        if count != stop:
            raise InputError(describe(
                "Slices do not cover the model's layers", where=stack, got=f"{stop} layers in the slices",
                expected=f"{count}, as the model has"))
