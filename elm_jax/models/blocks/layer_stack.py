"""Runs a stack of equal layers: one after another or as one scan, with or without rematerialisation.

Neither choice changes the results or the files: on disk and in a training state every layer has its own
subtree (``layers_0``, ``layers_1``, ...). A scan needs all layers' leaves as one array [L, ...]. Frozen
leaves are stacked once, before the first step (`stacked_names` says which); leaves that train are stacked
within the step, their kernels in the dtype in which they are multiplied.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
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
        num_layers: how many there are.
        dtype: in which kernels are multiplied.
        layout: how it is computed.
    """

    layer: nn.Module
    num_layers: int
    dtype: jnp.dtype
    layout: Layout


def run_layers(stack: LayerStack, params: Mapping[str, Any], x: Array, arguments: tuple[Any, ...],
               rng: Array | None) -> Array:
    """Applies all layers of a stack to x f[B, L, D]; returns f[B, L, D].

    Args:
        stack: of N layers.
        params: of the stack: ``layers_0`` and so on; leaves that are stacked already are in ``layers``.
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
    if stack.layout.scan_layers:
        stacked = _stack(params, stack.num_layers, stack.dtype)
        return jax.lax.scan(lambda x, own: (one(x, own), None), x, (stacked, keys))[0]
    for index in range(stack.num_layers):
        x = one(x, (params[f"{STACKED}_{index}"], None if keys is None else keys[index]))
    return x


def run_stack(bound: nn.Module, layer: nn.Module, x: Array, arguments: tuple[Any, ...], deterministic: bool
              ) -> Array:
    """Applies all layers of a bound module to f[B, L, D], as its layout says; returns f[B, L, D].

    Args:
        bound: has ``config``, ``layout`` and ``layers``, which are called one by one while it is initialised.
        layer: one of them, unbound.
        x: f[B, L, D].
        arguments: the same for every layer.
        deterministic: no dropout.
    """
    if bound.is_initializing():
        for each in bound.layers:
            x = each(x, *arguments, deterministic)
        return x
    config = bound.config
    drops = not deterministic and config.dropout_rate > 0.0
    layers = LayerStack(layer, len(bound.layers), config.activation_dtype, bound.layout)
    return run_layers(layers, bound.variables["params"], x, arguments,
                      bound.make_rng("dropout") if drops else None)


def _stack(params: Mapping[str, Any], num_layers: int, dtype: jnp.dtype) -> Params:
    """Stacks all layers' leaves to [L, ...]; leaves that are stacked already stay as they are."""
    whole = params.get(STACKED, {})
    if f"{STACKED}_0" not in params:
        return whole
    layers = [params[f"{STACKED}_{index}"] for index in range(num_layers)]

    def stack(keys: tuple[Any, ...], *leaves: Array) -> Array:
        # The same cast as the layer makes, earlier: a stack of half the bytes.
        is_kernel = keys[-1].key == "kernel"
        return jnp.stack([leaf.astype(dtype) if is_kernel else leaf for leaf in leaves])

    return _merge(whole, jax.tree_util.tree_map_with_path(stack, layers[0], *layers[1:]))


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> Params:
    """Union of two trees without a common leaf."""
    return {
        name: _merge(one[name], other[name]) if name in one and name in other
        else one.get(name, other.get(name))
        for name in [*one, *(name for name in other if name not in one)]
    }
