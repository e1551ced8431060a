"""Facts of a network's leaves, found by tracing its initialisation: shapes, logical axes, stacked layers."""

import functools

import jax

from elm_jax.models.blocks import layer_stack
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import sharding, trees
from elm_jax.types import Array, Params

_AXES_SUFFIX = "_axes"


class TracedLeaves:
    """The part of a Flax network that makes and describes its leaves (see `models.network.Network`).

    A subclass is made as ``kind(config)`` and offers `_init_variables`, whose trees other settings than the
    config do not change.
    """

    config: NetworkConfig

    def _init_variables(self, rng: Array) -> Params:
        """Flax's collections of fresh variables, ``params`` and ``params_axes``."""
        raise NotImplementedError

    def init(self, rng: Array) -> Params:
        """Initialises parameters in float32. Pure: jit it with `out_shardings` to create them sharded."""
        return self._init_variables(rng)["params"]

    def abstract_params(self) -> Params:
        """Returns the tree of `init` as `jax.ShapeDtypeStruct`; allocates nothing."""
        return trees.unflatten(dict(_traced(type(self), self.config)[0]))

    def logical_axes(self) -> Params:
        """Returns the tree of `init` as `sharding.Axes` (logical axis names by dimension)."""
        return trees.unflatten(dict(_traced(type(self), self.config)[1]))

    def axes_of(self, path: str) -> sharding.Axes | None:
        """Logical axes of one leaf, also of a stacked one (``encoder/layers/...``); None if there is none."""
        axes = _traced(type(self), self.config)[1].get(layer_stack.first_layer(path))
        if axes is None or not layer_stack.is_stacked(path):
            return axes
        return sharding.Axes((layer_stack.STACKED, *axes))


@functools.lru_cache(maxsize=128)
def _traced(kind: type[TracedLeaves], config: NetworkConfig
            ) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, sharding.Axes]]:
    """Shape and logical axes of each leaf by path; cached, since tracing a deep `init` takes seconds."""
    variables = jax.eval_shape(kind(config)._init_variables, jax.random.key(0))
    axes = trees.flatten(variables["params_axes"])
    return trees.flatten(variables["params"]), {
        path.removesuffix(_AXES_SUFFIX): sharding.Axes(metadata.names) for path, metadata in axes.items()}
