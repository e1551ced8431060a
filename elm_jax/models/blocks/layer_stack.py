"""Runs a stack of equal layers: one after another or as one scan, with or without rematerialisation.

Neither choice changes the results or the files: on disk and in a training state every layer has its own
subtree (``layers_0``, ``layers_1``, ...). A scan needs all layers' leaves as one array [L, ...]. Frozen
leaves are stacked once, before the first step (`stacked_names` says which); leaves that train are stacked
within the step, their kernels in the dtype in which they are multiplied.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.models.network import Layout
from elm_jax.types import Array, Params

STACKED = "layers"
_LAYER = re.compile(r"(?P<stack>\w+)/layers_(?P<index>\d+)/(?P<leaf>.+)")
_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass keeps, for each name of `network.REMAT`."""


def stacked_name(path: str) -> tuple[str, int] | None:
    """Stacked path and layer of a leaf: ``encoder/layers_3/...`` -> (``encoder/layers/...``, 3), or None."""
    found = _LAYER.fullmatch(path)
    return found and (f"{found['stack']}/{STACKED}/{found['leaf']}", int(found["index"]))


def stacked_names(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths of the leaves that make up each stacked leaf, in layer order; other leaves stay alone.

    Every layer of a stack must have the leaf, as in a network's leaves or in its frozen ones.
    """
    groups: dict[str, dict[int, str]] = {}
    alone: dict[str, list[str]] = {}
    for path in paths:
        found = stacked_name(path)
        if found is None:
            alone[path] = [path]
        else:
            groups.setdefault(found[0], {})[found[1]] = path
    return alone | {name: [members[index] for index in sorted(members)] for name, members in groups.items()}


def first_layer(path: str) -> str:
    """Path in layer 0 of a stacked leaf: ``encoder/layers/mlp/...`` -> ``encoder/layers_0/mlp/...``."""
    return path.replace(f"/{STACKED}/", f"/{STACKED}_0/", 1)


def is_stacked(path: str) -> bool:
    """Whether a leaf path is a stacked one, with the values of all layers."""
    return f"/{STACKED}/" in path


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """A stack of equal layers to run, without its parameters.

    Attributes:
        layer: one of them, unbound; called with (x, *arguments, deterministic).
        num_layers: how many the whole stack has.
        dtype: in which kernels are multiplied.
        layout: how it is computed.
        span: (first, end) of the layers to run, numbered in the whole stack; None for all.
    """

    layer: nn.Module
    num_layers: int
    dtype: jnp.dtype
    layout: Layout
    span: tuple[int, int] | None = None


def equal_runs(configs: Sequence[Any], span: tuple[int, int]) -> list[tuple[Any, tuple[int, int]]]:
    """Runs of layers of equal config in a span: (config, (first, end)), in order.

    Args:
        configs: of every layer of a stack.
        span: (first, end) of the layers to run.
    """
    starts = [number for number in range(*span)
              if number == span[0] or configs[number] != configs[number - 1]]
    return [(configs[start], (start, end))
            for start, end in zip(starts, [*starts[1:], span[1]], strict=True)]


def run_layers(stack: LayerStack, params: Mapping[str, Any], x: Array, arguments: tuple[Any, ...],
               rng: Array | None) -> Array:
    """Applies the layers of a stack, or those of its span, to x f[B, L, D]; returns f[B, L, D].

    Args:
        stack: of N layers.
        params: of the stack: ``layers_0`` and so on; leaves that are stacked already are in ``layers``, those
            of layers 0 to n - 1 as [n, ...].
        x: f[B, L, D] of the stack's dtype.
        arguments: the same for every layer.
        rng: of dropout, or None. Each layer's draws follow from it and from the layer's number alone.
    """

    def one(x: Array, own: tuple[Params, Array | None]) -> Array:
        leaves, key = own
        rngs = None if key is None else {"dropout": key}
        return stack.layer.apply({"params": leaves}, x, *arguments, key is None, rngs=rngs)

    policy = _POLICIES[stack.layout.remat]
    if policy is not None:
        # A loop separates forward and backward pass by itself; straight-line code needs a barrier.
        one = jax.checkpoint(one, policy=policy, prevent_cse=not stack.layout.scan_layers)
    keys = None if rng is None else jax.random.split(rng, stack.num_layers)
    span = range(*(stack.span or (0, stack.num_layers)))
    if stack.layout.scan_layers:
        return _scan(stack, params, x, one, None if keys is None else keys[span.start:span.stop])
    for index in span:
        x = one(x, (params[f"{STACKED}_{index}"], None if keys is None else keys[index]))
    return x


def run_stack(bound: nn.Module, layer: nn.Module, x: Array, arguments: tuple[Any, ...], deterministic: bool,
              span: tuple[int, int] | None = None) -> Array:
    """Applies layers of a bound module to f[B, L, D], as its layout says; returns f[B, L, D].

    Layers of unlike config (with adapters and without) run apart, each group a loop if the layout scans.

    Args:
        bound: has ``config``, ``layout`` and ``layers``, which are called one by one while it is initialised.
        layer: one of them, unbound.
        x: f[B, L, D].
        arguments: the same for every layer.
        deterministic: no dropout.
        span: (first, end) of the layers; None for all.
    """
    count = len(bound.layers)
    span = span or (0, count)
    if bound.is_initializing():
        for each in bound.layers[slice(*span)]:
            x = each(x, *arguments, deterministic)
        return x
    config = bound.config
    drops = not deterministic and config.dropout_rate > 0.0 and span[0] < span[1]
    rng = bound.make_rng("dropout") if drops else None
    for own, part in equal_runs([each.config for each in bound.layers], span):
        one = layer if own == layer.config else layer.clone(config=own, parent=None)
        layers = LayerStack(one, count, config.activation_dtype, bound.layout,
                            None if part == (0, count) else part)
        x = run_layers(layers, bound.variables["params"], x, arguments, rng)
    return x


def _scan(stack: LayerStack, params: Mapping[str, Any], x: Array, one: Callable[..., Array],
          keys: Array | None) -> Array:
    """Applies the layers of the span as a scan."""
    first, end = stack.span or (0, stack.num_layers)
    if first == end:
        return x
    whole, own = params.get(STACKED, {}), _stack(params, range(first, end), stack.dtype)
    # A stacked leaf with fewer rows than the span reaches has none of its layers: they are in `own`.
    whole = _with_rows(whole, end)
    if stack.span is None:
        return jax.lax.scan(lambda x, each: (one(x, each), None), x, (_merge(whole, own), keys))[0]

    def step(x: Array, each: tuple[Array, Params, Array | None]) -> tuple[Array, None]:
        index, leaves, key = each  # a slice of the whole stack would be a copy of it
        shared = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), whole)
        return one(x, (_merge(shared, leaves), key)), None

    return jax.lax.scan(step, x, (jnp.arange(first, end), own, keys))[0]


def _with_rows(tree: Mapping[str, Any], least: int) -> Params:
    """The stacked leaves [n, ...] of a tree with n of at least `least`."""
    kept = {name: _with_rows(leaf, least) if isinstance(leaf, Mapping) else leaf
            for name, leaf in tree.items() if isinstance(leaf, Mapping) or leaf.shape[0] >= least}
    return {name: leaf for name, leaf in kept.items() if not isinstance(leaf, Mapping) or leaf}


def _stack(params: Mapping[str, Any], span: range, dtype: jnp.dtype) -> Params:
    """Stacks the leaves that the layers of a span have of their own to [N, ...]."""
    if f"{STACKED}_{span.start}" not in params:
        return {}
    layers = [params[f"{STACKED}_{index}"] for index in span]

    def stack(keys: tuple[Any, ...], *leaves: Array) -> Array:
        # The same cast as the layer makes, earlier: a stack of half the bytes.
        is_kernel = keys[-1].key == "kernel"
        return jnp.stack([leaf.astype(dtype) if is_kernel else leaf for leaf in leaves])

    return jax.tree_util.tree_map_with_path(stack, layers[0], *layers[1:])


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> Params:
    """Union of two trees without a common leaf."""
    return {
        name: _merge(one[name], other[name]) if name in one and name in other
        else one.get(name, other.get(name))
        for name in [*one, *(name for name in other if name not in one)]
    }
