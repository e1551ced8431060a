"""What a training run carries from step to step, and where on the mesh it lies."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax import sharding, trees
from elm_jax.errors import InputError, describe
from elm_jax.models.t5 import T5Network
from elm_jax.sharding import Rules
from elm_jax.training.optimizers import OptimizerConfig, make_optimizer
from elm_jax.types import Array, Params


@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Frozen leaves are never part of it.

    Attributes:
        step: i32[], finished updates; it is also the position in the data.
        overlay: the trained leaves, float32.
        opt_state: optax state of the overlay's leaves, and of no others.
    """

    step: Array
    overlay: Params
    opt_state: Any


def create_state(overlay: Params, optimizer: OptimizerConfig) -> TrainState:
    """State before the first update."""
    # The number of steps shapes only the learning rate, not the state.
    opt_state = make_optimizer(optimizer, train_steps=1).init(overlay)
    return TrainState(step=jnp.zeros((), jnp.int32), overlay=overlay, opt_state=opt_state)


def abstract_state(overlay: Params, optimizer: OptimizerConfig) -> TrainState:
    """`create_state` as a tree of ShapeDtypeStruct; `overlay` may be abstract."""
    return jax.eval_shape(lambda tree: create_state(tree, optimizer), abstract(overlay))


def abstract(tree: Params) -> Params:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def shardings_of_params(
    network: T5Network, params: Params, mesh: Mesh, rules: Rules = sharding.DEFAULT_RULES
) -> Params:
    """Shardings of any subset of a network's leaves (the frozen ones, or an overlay).

    Raises:
        InputError: a leaf that the network does not have.
    """
    axes = trees.flatten(network.logical_axes())
    flat = trees.flatten(params)
    unknown = [path for path in flat if path not in axes]
    if unknown:
        raise InputError(
            describe("The network has no such leaf", where=unknown[0],
                     got=f"{len(unknown)} unknown leaves",
                     expected=f"leaves of {type(network).__name__}",
                     cure="check the config's adapter")
        )
    return trees.unflatten(
        {path: sharding.leaf_sharding(axes[path], leaf.shape, mesh, rules)
         for path, leaf in flat.items()}
    )


def shardings_of_state(
    network: T5Network, overlay: Params, optimizer: OptimizerConfig, mesh: Mesh,
    rules: Rules = sharding.DEFAULT_RULES,
) -> TrainState:
    """Shardings of a whole state: optimiser statistics are split as their parameters are.

    Args:
        network: gives the logical axes.
        overlay: the trained leaves, arrays or ShapeDtypeStruct.
        optimizer: fixes the structure of the optimiser's state.
        mesh: axes ('data', 'experts', 'model').
        rules: logical axes to mesh axes.

    Returns:
        A TrainState whose leaves are NamedSharding.
    """
    overlay_shardings = shardings_of_params(network, overlay, mesh, rules)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(overlay).items()}
    specs = {path: leaf.spec for path, leaf in trees.flatten(overlay_shardings).items()}

    def place(keys: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        names = {key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey)}
        if path not in shapes:
            return sharding.replicated(mesh)
        spec = _statistic_spec(names, leaf.shape, shapes[path], specs[path])
        return NamedSharding(mesh, spec)

    opt_state = jax.tree_util.tree_map_with_path(
        place, abstract_state(overlay, optimizer).opt_state
    )
    return TrainState(
        step=sharding.replicated(mesh), overlay=overlay_shardings, opt_state=opt_state
    )


def _statistic_spec(
    names: set[str], shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    """Spec of an optimiser statistic: its parameter's, less the dimension it averages over."""
    entries = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    if shape == param_shape:
        return PartitionSpec(*entries)
    if len(shape) == len(param_shape) - 1:
        # optax's Adafactor: rows average over the largest dimension, columns over the second.
        second, largest = np.argsort(param_shape)[-2:]
        gone = int(largest if "v_row" in names else second)
        if shape == param_shape[:gone] + param_shape[gone + 1 :]:
            return PartitionSpec(*(entries[:gone] + entries[gone + 1 :]))
    return PartitionSpec()
