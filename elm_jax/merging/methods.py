"""Merging methods: pure functions on overlays as flat dictionaries from path to array.

Leaves may be numpy or JAX arrays (also traced ones). A sum over experts is accumulated in float64
for numpy leaves and in float32 for JAX leaves, and rounded once, to the leaves' own dtype.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax import trees
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.types import Array, FlatParams

MergeMethod = Callable[[Sequence[FlatParams], Sequence[float] | None], FlatParams]
"""(overlays of one shape, weights or None) -> overlay of the same shape and dtypes."""


def mean_leaf(leaves: Sequence[Array] | Array, weights: Sequence[float] | Array) -> Array:
    """``y = sum_i w_i x_i`` of one leaf of E experts.

    Args:
        leaves: E arrays of one shape and dtype, or one stacked array [E, ...].
        weights: f[E], taken as they are.

    Returns:
        The sum, in the leaves' dtype.
    """
    total = _wide(leaves[0]) * weights[0]
    for number in range(1, len(leaves)):
        total = total + _wide(leaves[number]) * weights[number]
    return total.astype(leaves[0].dtype)


def weighted_mean(
    overlays: Sequence[FlatParams], weights: Sequence[float] | None = None
) -> FlatParams:
    """``theta = sum_i w_i theta_i / sum_i w_i``, leaf by leaf.

    Args:
        overlays: E flat overlays.
        weights: one an expert, normalised here to sum 1; None means 1/E each.

    Returns:
        A flat overlay with the same leaves, shapes and dtypes.

    Raises:
        InputError: weights that do not fit, or overlays that differ in leaf, shape or dtype.

    Source: Jang et al., https://arxiv.org/abs/2302.03202, section 3.3; Wortsman et al.,
        https://arxiv.org/abs/2203.05482.
    """
    weights = normalised_weights(weights, len(overlays))
    check_mergeable(_numbered(overlays))
    return {path: mean_leaf([each[path] for each in overlays], weights) for path in overlays[0]}


def task_arithmetic_mean(
    base: FlatParams, overlays: Sequence[FlatParams], lambdas: Sequence[float] | None = None
) -> FlatParams:
    """``theta = theta_pre + sum_i lambda_i (theta_i - theta_pre)``, leaf by leaf.

    With lambdas of sum 1 this is the weighted mean, whatever the base.

    Args:
        base: theta_pre, flat; its leaves that the overlays lack are not looked at.
        overlays: E flat overlays.
        lambdas: one an expert, NOT normalised; None means 1/E each.

    Returns:
        A flat overlay with the overlays' leaves, shapes and dtypes.

    Raises:
        InputError: another number of lambdas than of overlays, or a leaf that differs between
            overlays or from the base's.

    Source: Ilharco et al., https://arxiv.org/abs/2212.04089; Jang et al., section 3.3.
    """
    lambdas = normalised_weights(None, len(overlays)) if lambdas is None else list(lambdas)
    _check_weights(lambdas, len(overlays))
    part = {path: base[path] for path in overlays[0] if path in base}
    check_mergeable({"base": part, **_numbered(overlays)})
    merged = {}
    for path, start in part.items():
        total = _wide(start)
        for overlay, factor in zip(overlays, lambdas, strict=True):
            total = total + (_wide(overlay[path]) - _wide(start)) * factor
        merged[path] = total.astype(start.dtype)
    return merged


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights divided by their sum; 1/n each for None.

    Raises:
        InputError: no expert, another number of weights than experts, a weight that is negative or
            not finite, or a sum of zero.
    """
    if weights is None:
        weights = [1.0] * count
    _check_weights(weights, count)
    total = math.fsum(weights)
    if min(weights) < 0 or total <= 0:
        raise InputError(
            describe("Weights must be finite, none negative, not all zero", got=list(weights))
        )
    return [float(weight) / total for weight in weights]


def _check_weights(weights: Sequence[float], count: int) -> None:
    """Raises InputError unless there are `count` (1 or more) finite weights."""
    if count < 1:
        raise InputError(describe("Merging needs experts", got=count, expected="1 or more"))
    if len(weights) != count:
        raise InputError(
            describe(
                "There must be one weight an expert",
                got=f"{len(weights)} weights",
                expected=f"{count}",
            )
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(
            describe("Weights must be finite, none negative, not all zero", got=list(weights))
        )


def check_mergeable(overlays: Mapping[str, FlatParams]) -> None:
    """Checks that named overlays agree in their leaves, and that these are of floating point.

    Raises:
        InputError: names both experts and the first leaf whose presence, shape or dtype differs.
    """
    names = list(overlays)
    for path, leaf in sorted(overlays[names[0]].items()) if names else ():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                describe(
                    "Only leaves of floating point can be merged",
                    where=names[0],
                    got=f"leaf {path}: {leaf.dtype}",
                )
            )
    for other in names[1:]:
        difference = trees.first_difference(overlays[names[0]], overlays[other])
        if difference:
            raise InputError(
                describe(
                    "Experts of unlike leaves cannot be merged",
                    where=f"{names[0]} and {other}",
                    got=f"first differing leaf {difference}",
                    expected="the same leaves for all",
                )
            )


METHODS: dict[str, MergeMethod] = {"mean": weighted_mean}
"""Methods by name. A method that needs more (a base, exactly two experts, parameters with ranges)
turns the values into rows that say so."""


def get_method(name: str) -> MergeMethod:
    """A method by name; an unknown one is an InputError with the nearest names."""
    if name not in METHODS:
        raise unknown_name("merging method", name, METHODS)
    return METHODS[name]


def _wide(leaf: Array) -> Array:
    """The leaf in the dtype in which sums are accumulated."""
    if isinstance(leaf, jax.Array):
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return np.asarray(leaf).astype(np.float64)


def _numbered(overlays: Sequence[FlatParams]) -> dict[str, FlatParams]:
    return {f"expert {number}": overlay for number, overlay in enumerate(overlays, start=1)}
