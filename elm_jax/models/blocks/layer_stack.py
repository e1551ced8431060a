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

from elm_jax.models.blocks.sparse_mlp import ROUTER, SUMS
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.network import ROUTER_PART, Layout
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

    Layers of a stack from its first on must have the leaf, without a gap; where others have it, as experts in
    every second layer, it stays alone.
    """
    groups: dict[str, dict[int, str]] = {}
    alone: dict[str, list[str]] = {}
    for path in paths:
        found = stacked_name(path)
        if found is None:
            alone[path] = [path]
        else:
            groups.setdefault(found[0], {})[found[1]] = path
    found = dict(alone)
    for name, members in groups.items():
        whole = sorted(members) == list(range(len(members)))
        found |= {name: [members[index] for index in sorted(members)]} if whole else {
            path: [path] for path in members.values()}
    return found


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
        reports: whether the layers are sparse, and report what their routers did.
    """

    layer: nn.Module
    num_layers: int
    dtype: jnp.dtype
    layout: Layout
    span: tuple[int, int] | None = None
    reports: bool = False

    @property
    def numbers(self) -> range:
        """Numbers of the layers to run."""
        return range(*(self.span or (0, self.num_layers)))


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

    See `run_reporting_layers`.
    """
    return run_reporting_layers(stack, params, x, arguments, rng)[0]


def run_reporting_layers(stack: LayerStack, params: Mapping[str, Any], x: Array, arguments: tuple[Any, ...],
                         rng: Array | None) -> tuple[Array, dict[str, RouterSums]]:
    """Applies the layers of a stack, or those of its span, to x f[B, L, D].

    Args:
        stack: of N layers.
        params: of the stack: ``layers_0`` and so on; leaves that are stacked already are in ``layers``, those
            of layers 0 to n - 1 as [n, ...].
        x: f[B, L, D] of the stack's dtype.
        arguments: the same for every layer.
        rng: of dropout, or None. Each layer's draws follow from it and from the layer's number alone.

    Returns:
        f[B, L, D], and the report of each layer that was run, by its name; none without `stack.reports`.
    """

    def one(x: Array, own: tuple[Params, Array | None]) -> tuple[Array, RouterSums | None]:
        leaves, key = own
        rngs = None if key is None else {"dropout": key}
        variables, rest = {"params": leaves}, (*arguments, key is None)
        if not stack.reports:
            return stack.layer.apply(variables, x, *rest, rngs=rngs), None
        y, found = stack.layer.apply(variables, x, *rest, rngs=rngs, mutable=[ROUTER])
        return y, found[ROUTER]["mlp"][SUMS]

    policy = _POLICIES[stack.layout.remat]
    if policy is not None:
        # A loop separates forward and backward pass by itself; straight-line code needs a barrier.
        one = jax.checkpoint(one, policy=policy, prevent_cse=not stack.layout.scan_layers)
    keys = None if rng is None else jax.random.split(rng, stack.num_layers)
    span, reports = stack.numbers, []
    if stack.layout.scan_layers:
        x, rows = _scan(stack, params, x, one, None if keys is None else keys[span.start:span.stop])
        if stack.reports:
            reports = [jax.tree.map(lambda leaf: leaf[row], rows) for row in range(len(span))]  # noqa: B023
    else:
        for index in span:
            x, report = one(x, (params[f"{STACKED}_{index}"], None if keys is None else keys[index]))
            reports.append(report)
    return x, {f"{STACKED}_{index}": report for index, report in zip(span, reports, strict=False)
               if report is not None}


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
    random = config.dropout_rate > 0.0 or _sparse(config)  # of a sparse layer: whether it trains, and jitter
    drops = not deterministic and random and span[0] < span[1]
    rng = bound.make_rng("dropout") if drops else None
    for own, part in equal_runs([each.config for each in bound.layers], span):
        one = layer if own == layer.config else layer.clone(config=own, parent=None)
        layers = LayerStack(one, count, config.activation_dtype, bound.layout,
                            None if part == (0, count) else part,
                            _sparse(own) and bound.is_mutable_collection(ROUTER))
        x, reports = run_reporting_layers(layers, bound.variables["params"], x, arguments, rng)
        if reports and part[0] >= getattr(bound, "trunk", 0):  # a frozen trunk has no losses
            bound.sow(ROUTER, SUMS, reports, reduce_fn=lambda old, new: {**old, **new}, init_fn=dict)
    return x


def reports_of(variables: Mapping[str, Any]) -> dict[str, RouterSums]:
    """The reports of all sparse layers, in the collection that a network's call gave back.

    Returns:
        By the layer, ``encoder/layers_1``.
    """
    stacks = variables.get(ROUTER, {})
    return {f"{name}/{layer}": sums for name in sorted(stacks) for layer, sums in stacks[name][SUMS].items()}


def _sparse(config: Any) -> bool:
    return getattr(config, "sparse", None) is not None


def _scan(stack: LayerStack, params: Mapping[str, Any], x: Array, one: Callable[..., Any],
          keys: Array | None) -> tuple[Array, RouterSums | None]:
    """Applies the layers of the span as a scan; their reports get an axis of layers."""
    first, end = stack.span or (0, stack.num_layers)
    if first == end:
        return x, None
    whole, own = params.get(STACKED, {}), _stack(params, range(first, end), stack.dtype)
    # A stacked leaf with fewer rows than the span reaches has none of its layers: they are in `own`.
    whole = _with_rows(whole, end)
    if stack.span is None:
        return jax.lax.scan(one, x, (_merge(whole, own), keys))

    def step(x: Array, each: tuple[Array, Params, Array | None]) -> tuple[Array, RouterSums | None]:
        index, leaves, key = each  # a slice of the whole stack would be a copy of it
        shared = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), whole)
        return one(x, (_merge(shared, leaves), key))

    return jax.lax.scan(step, x, (jnp.arange(first, end), own, keys))


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
        names = [key.key for key in keys]
        is_kernel = names[-1] == "kernel" and ROUTER_PART not in names
        return jnp.stack([leaf.astype(dtype) if is_kernel else leaf for leaf in leaves])

    return jax.tree_util.tree_map_with_path(stack, layers[0], *layers[1:])


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> Params:
    """Union of two trees without a common leaf."""
    return {
        name: _merge(one[name], other[name]) if name in one and name in other
        else one.get(name, other.get(name))
        for name in [*one, *(name for name in other if name not in one)]
    }
