"""The settings that a merge was carried out by, as its card keeps them."""

from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.merging import methods


def settings_of(leaves: Sequence[Any]) -> list[dict[str, Any]]:
    """Method, weights and parameters, and the leaves that they hold for: one entry where all are alike."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for leaf in leaves:
        if hasattr(leaf, "settings"):
            groups.setdefault(repr(leaf.settings), (leaf.settings, []))[1].append(leaf.path)
    return [{**settings, "leaves": "all" if len(groups) == 1 else paths}
            for settings, paths in groups.values()]


def shares_of(settings: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Each parent's weight, divided by their sum where the merge divides; None where it differs by leaf."""
    each = []
    for own in settings:
        method = methods.get_method(own["method"])
        total = sum(own["weights"]) if own.get("normalize", method.normalize) or method.spherical else 1.0
        each.append([weight / total for weight in own["weights"]])
    return [weights[0] if len(set(weights)) == 1 else None for weights in zip(*each, strict=True)]
