"""Depth of a leaf in its model: its layer number, and the relative depth in its stack of layers."""

import re
from collections.abc import Iterable

_NUMBERED_LAYER = re.compile(r"(layers?|blocks?|h)_([0-9]{1,6})")
_NUMBER = re.compile(r"[0-9]{1,6}")


def layer_of(leaf: str) -> tuple[str, int] | None:
    """The stack and layer number of a leaf, from its name; None for a leaf outside of layers.

    The first number between two components counts, or ours with its name (``layers_3``); a sub-layer's or a
    mixture's expert's comes after it.

    Example:
        >>> layer_of("encoder.block.3.layer.0.SelfAttention.q.weight")
        ('encoder.block', 3)
        >>> layer_of("encoder/layers_3/mlp/wi_0/kernel")
        ('encoder.layers', 3)
    """
    parts = name_parts(leaf)
    for place, part in enumerate(parts[:-1]):
        if place and _NUMBER.fullmatch(part):
            return ".".join(parts[:place]), int(part)
        named = _NUMBERED_LAYER.fullmatch(part)
        if named:
            return ".".join([*parts[:place], named[1]]), int(named[2])
    return None


def depth_of(leaves: Iterable[str]) -> dict[str, float]:
    """Relative depth of each leaf in its own stack: ``layer / (layers - 1)``.

    Args:
        leaves: names; the largest layer among them is taken to be a stack's last.

    Returns:
        By name, from 0 to 1: 0 for leaves outside of layers, 1 in a stack of one layer.
    """
    leaves = list(leaves)
    counts = stack_sizes(leaves)
    places = {leaf: layer_of(leaf) for leaf in leaves}
    return {leaf: relative_depth(place[1], counts[place[0]]) if place else 0.0
            for leaf, place in places.items()}


def stack_sizes(leaves: Iterable[str]) -> dict[str, int]:
    """Number of layers of each stack."""
    counts: dict[str, int] = {}
    for stack, layer in filter(None, map(layer_of, leaves)):
        counts[stack] = max(layer + 1, counts.get(stack, 0))
    return counts


def relative_depth(layer: int, layers: int) -> float:
    """Depth from 0 for the first layer to 1 for the last; 1 if it is the only one."""
    return layer / (layers - 1) if layers > 1 else 1.0


def name_parts(leaf: str) -> list[str]:
    """Components of a leaf's name, separated by dots or slashes."""
    return re.split(r"[./]", leaf)
