"""Computes merges: pure functions of the leaves of several experts.

All of them work on numpy and on JAX arrays, eagerly or under jit, on one device or on leaves that are
spread over a mesh (nothing but sums and counts then leaves a device), and have gradients in the weights.
Sums are taken in float32, whatever the experts' dtype.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.merging.methods import alike, method_table, sparsify
from elm_jax.merging.methods.method_table import Method
from elm_jax.types import Array, FlatParams

DOT_THRESHOLD = 0.9995
"""Above this |cosine| slerp interpolates linearly; the bound is mergekit's."""

SMALLEST = 1e-30
"""A leaf with a Euclidean norm up to this has no direction: slerp interpolates linearly."""


ROUNDING = 2.0**-24
"""Largest relative error of one rounding to float32."""


class Numbers(NamedTuple):
    """Values that describe a whole leaf and the settings; with them any slice of the leaf can be merged.

    Attributes:
        weights: f32[E].
        scale: f32, factor of the merged task vector.
        cuts: of each expert, for ``magnitude``.
        keys: u32[E, 2], for ``random``.
        density: f32[E], for ``random``.
        factors: f32[E], factors of the sparsified task vectors.
        start: u32, index of the slice's first element in the flattened leaf.
    """

    weights: Array
    scale: Array | float = 1.0
    cuts: tuple[sparsify.Cut, ...] = ()
    keys: Array | None = None
    density: Array | None = None
    factors: Array | None = None
    start: Array | int = 0


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a merge; static when a program is compiled.

    Attributes:
        method: a key of `method_table.METHODS`.
        normalize: whether the sum is divided by that of the weights that take part.
        dtype: of the result; None for the experts' own.
        absolute: whether absolute weights are summed for the divisor.
    """

    method: str
    normalize: bool = False
    dtype: str | None = None
    absolute: bool = False


def steps_of(method: Method, settings: Mapping[str, Any], dtype: str | None) -> Steps:
    """The steps of a method under its settings (see `Method.settings`)."""
    return Steps(method.name, method.divides(settings), dtype, settings.get("divisor") == "absolute")


def combine(steps: Steps, experts: Sequence[Array], base: Array | None, numbers: Numbers) -> Array:
    """Merges a leaf, or whole rows of it, given the `Numbers` of the whole leaf.

    Args:
        steps: the steps of the method; static.
        experts: E arrays f[...] of one shape.
        base: f[...] of that shape, for a method that works on task vectors.
        numbers: of the whole leaf.

    Returns:
        f[...], of the same shape and of `steps.dtype` or the first expert's.
    """
    method = method_table.get_method(steps.method)
    terms = [_thinned(method, _delta(expert, base), numbers, i) for i, expert in enumerate(experts)]
    terms = [term * numbers.weights[i] for i, term in enumerate(terms)]
    shares = [numbers.weights[i] for i in range(len(terms))]
    if method.consensus:
        positive = _total(terms) >= 0
        agree = [(term != 0) & ((term > 0) == positive) for term in terms]
        terms = [jnp.where(ours, term, 0.0) for ours, term in zip(agree, terms, strict=True)]
        shares = [jnp.where(ours, share, 0.0) for ours, share in zip(agree, shares, strict=True)]
    merged = _total(terms)
    if steps.normalize:
        # Elementwise: XLA compiles division by a scalar to a product, which rounds differently.
        total = _total([jnp.abs(share) for share in shares] if steps.absolute else shares)
        divisor = jnp.where(merged == merged, total, 1.0)
        cancels = divisor == 0
        if method.consensus and not steps.absolute:
            # Weights that cancel leave a rounding error of their sum, which is no divisor.
            sizes = _total([jnp.abs(share) for share in shares])
            cancels = jnp.abs(divisor) <= len(shares) * ROUNDING * sizes
        merged = merged / jnp.where(cancels, 1.0, divisor)
    if base is not None:
        merged = base.astype(jnp.float32) + merged * numbers.scale
    return merged.astype(steps.dtype or experts[0].dtype)


def _delta(expert: Array, base: Array | None) -> Array:
    """The task vector f32[...]; without a base the expert itself."""
    wide = expert.astype(jnp.float32)
    return wide if base is None else wide - base.astype(jnp.float32)


def _thinned(method: Method, delta: Array, numbers: Numbers, i: int) -> Array:
    """The task vector f32[...] after sparsification and rescaling."""
    if method.sparsify is None:
        return delta
    kept = jnp.where(mask(method, delta, numbers, i), delta, 0.0)
    return kept if numbers.factors is None else kept * numbers.factors[i]


def mask(method: Method, delta: Array, numbers: Numbers, i: int) -> Array:
    """Mask bool[...] of the elements of a task vector f32[...], or of a slice of it, that are kept."""
    if method.sparsify == "magnitude":
        return sparsify.keep_largest(delta, numbers.cuts[i], numbers.start)
    return sparsify.keep_random(numbers.keys[i], numbers.density[i], delta.shape, numbers.start)


def _total(terms: Sequence[Array]) -> Array:
    """Sum of arrays f32[...], added one after another in their order.

    The new term is the first operand, so that a fused multiply-add adds each product unrounded to the sum so
    far, as other programs do.
    """
    return functools.reduce(lambda total, term: term + total, terms)


def arc_weights(cosine: Array, t: Array, xp: ModuleType = jnp) -> Array:
    """Factors f[2] of two experts for spherical interpolation (slerp).

    Args:
        cosine: f[], of the angle between them.
        t: f[], share of the second one.
        xp: `jax.numpy`, or `numpy` for what is known in float64.

    Returns:
        f[2]; those of the straight line where the two are nearly parallel.
    """
    straight = xp.abs(cosine) > DOT_THRESHOLD
    angle = xp.arccos(xp.where(straight, 0.0, cosine))
    line = xp.stack([1 - t, t])
    on_arc = xp.sin(line * angle) / xp.sin(angle)
    # The ends are the experts themselves, whatever the quotient of two equal sines is rounded to.
    at_end = (t == 0) | (t == 1)
    correction = xp.where(at_end, line - on_arc, 0.0)
    on_arc = on_arc + (correction if xp is np else jax.lax.stop_gradient(correction))
    return xp.where(straight, line, on_arc)


def merge_leaf(
    method: str, experts: Sequence[Array] | Array, weights: Array | Sequence[float] | None = None,
    base: Array | None = None, *, keys: Array | None = None, dtype: str | None = None, **parameters: Any,
) -> Array:
    """Merges one leaf of E experts; returns an array of the leaf's shape.

    Args:
        method: a key of `method_table.METHODS`, whose row says the equation and its source.
        experts: E arrays of one shape, or one stacked array [E, ...].
        weights: f[E]; of traced ones the shape is checked, of others the values. None for the method's own.
        base: the base's leaf, for methods that need it.
        keys: u32[E, 2], for the random ones (see `sparsify.random_key`); None takes the experts' numbers.
        dtype: of the result; None for the first expert's.
        parameters: of the method, fixed when a program is compiled.

    Raises:
        InputError: parameters or weights that the method does not take.
    """
    row = method_table.get_method(method)
    experts = [jnp.asarray(expert) for expert in experts]
    settings = row.settings(parameters, len(experts))
    weights = _weights(row, weights, len(experts), settings)
    if row.needs_base and base is None:
        raise method_table.no_base(row)
    base = jnp.asarray(base) if row.needs_base else None
    if row.spherical:
        weights = _arc(experts, weights)
    if row.sparsify == "random" and keys is None:
        keys = jnp.stack([sparsify.random_key(settings["seed"], str(i)) for i in range(len(experts))])
    numbers = _numbers(row, experts, base, weights, settings, keys)
    return combine(steps_of(row, settings, dtype), experts, base, numbers)


def _weights(row: Method, weights: Any, count: int, settings: dict[str, Any]) -> Array:
    """The weights as f32[E]; checked unless they are traced."""
    if isinstance(weights, jax.core.Tracer):
        method_table.check_count(row, count)
        if weights.shape != (count,):
            raise InputError(describe("There must be one weight an expert", got=weights.shape,
                                      expected=(count,)))
        return weights.astype(jnp.float32)
    weights = weights if weights is None else [float(weight) for weight in weights]
    return jnp.asarray(method_table.resolve_weights(row, weights, count, settings), jnp.float32)


def _arc(experts: Sequence[Array], weights: Array) -> Array:
    first, second = (expert.astype(jnp.float32) for expert in experts)
    norms = [_norm(each) for each in (first, second)]
    # Divided before they are multiplied, so that large values do not overflow.
    units = [each / jnp.maximum(norm, SMALLEST) for each, norm in zip((first, second), norms, strict=True)]
    cosine = jnp.where(jnp.minimum(*norms) > SMALLEST, jnp.sum(units[0] * units[1]), 1.0)
    return arc_weights(jnp.clip(cosine, -1.0, 1.0), weights[1] / (weights[0] + weights[1]))


def _norm(values: Array) -> Array:
    """Euclidean norm f32[] of f32[...], scaled by the largest value first against overflow and underflow."""
    largest = jnp.maximum(jnp.max(jnp.abs(values), initial=0.0), SMALLEST)
    return largest * jnp.sqrt(jnp.sum(jnp.square(values / largest)))


def _numbers(row: Method, experts: Sequence[Array], base: Array | None, weights: Array,
             settings: dict[str, Any], keys: Array | None) -> Numbers:
    """Computes the `Numbers` of a leaf that is in memory as a whole."""
    numbers = Numbers(weights, jnp.float32(settings.get("scale", 1.0)))
    if row.sparsify is None:
        return numbers
    density = settings["density"]
    deltas = [_delta(expert, base) for expert in experts]
    if row.sparsify == "magnitude":
        numbers = numbers._replace(cuts=tuple(
            sparsify.find_cut(delta, sparsify.num_kept(share, delta.size))
            for delta, share in zip(deltas, density, strict=True)))
    else:
        numbers = numbers._replace(keys=keys, density=jnp.asarray(density, jnp.float32))
    return numbers._replace(factors=_factors(row, deltas, numbers, settings))


def _factors(row: Method, deltas: Sequence[Array], numbers: Numbers,
             settings: dict[str, Any]) -> Array | None:
    rescale = settings.get("rescale", "none")
    if rescale == "none":
        return None
    if rescale == "density":
        return density_factors(row, settings["density"], deltas[0].size)
    masks = [mask(row, delta, numbers, i) for i, delta in enumerate(deltas)]
    return jnp.stack([
        jnp.where(share >= 1, 1.0, sparsify.norm_factor(
            jnp.sum(jnp.abs(delta)), jnp.sum(jnp.where(kept, jnp.abs(delta), 0.0))))
        for share, delta, kept in zip(settings["density"], deltas, masks, strict=True)])


def density_factors(row: Method, density: Sequence[float], size: int) -> Array:
    """Factors f32[E] that undo a density: 1 / (kept share); 1 for a density of 0, which keeps nothing.

    The share that random masks keep is the density; the largest elements are a whole number of the `size`.
    """
    if row.sparsify == "magnitude":
        density = [sparsify.num_kept(share, size) / max(1, size) for share in density]
    return jnp.asarray([1.0 / share if share > 0 else 1.0 for share in density], jnp.float32)


def merge_params(
    method: str, experts: Sequence[FlatParams], weights: Array | Sequence[float] | None = None,
    base: FlatParams | None = None, *, names: Sequence[str] | None = None, dtype: str | None = None,
    **parameters: Any,
) -> FlatParams:
    """Merges flat trees of parameters leaf by leaf (see `merge_leaf`); can be jitted and differentiated.

    Args:
        method: a key of `method_table.METHODS`.
        experts: E flat trees with the same leaves.
        weights: f[E].
        base: flat; a leaf that it lacks, such as an adapter's, counts as zero.
        names: of the experts, on which random masks depend; None takes their numbers.
        dtype: of the result.
        parameters: of the method.

    Raises:
        InputError: as `merge_leaf`; leaves that differ between experts, or from the base's.
    """
    row = method_table.get_method(method)
    names = [str(i) for i in range(len(experts))] if names is None else names
    alike.check_alike(experts, names)
    if row.needs_base:
        if base is None:
            raise method_table.no_base(row)
        base = {path: base.get(path, jnp.zeros_like(leaf)) for path, leaf in experts[0].items()}
        alike.check_alike([experts[0], base], [names[0], "the base"], dtypes=False)
    seed = row.settings(parameters, len(experts)).get("seed")
    return {path: merge_leaf(
        method, [expert[path] for expert in experts], weights, base[path] if row.needs_base else None,
        keys=leaf_keys(seed, path, names) if row.sparsify == "random" else None, dtype=dtype, **parameters)
        for path in experts[0]}


def leaf_keys(seed: int, path: str, names: Sequence[str]) -> Array:
    """Random keys u32[E, 2] for the masks of a leaf, one an expert; experts of one name get one mask."""
    return jnp.stack([sparsify.random_key(seed, path, name) for name in names])
