"""The state that a training run carries from step to step, and its sharding on the mesh."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import InputError, describe
from elm_jax.models.blocks import layer_stack
from elm_jax.models.network import Network, has_expert_axis, is_multiplied
from elm_jax.runtime import hosts, sharding, trees
from elm_jax.runtime.sharding import Rules
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
    """Makes the state before the first update."""
    # The number of steps shapes only the learning rate, not the state.
    opt_state = make_optimizer(optimizer, train_steps=1).init(overlay)
    return TrainState(step=jnp.zeros((), jnp.int32), overlay=overlay, opt_state=opt_state)


def abstract_state(overlay: Params, optimizer: OptimizerConfig) -> TrainState:
    """State before the first update as a tree of ShapeDtypeStruct; `overlay` may be abstract."""
    return jax.eval_shape(lambda tree: create_state(tree, optimizer), abstract(overlay))


def abstract(tree: Params) -> Params:
    """Shapes and dtypes of a tree of arrays, as ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def check_params(network: Network, frozen: Params, overlay: Params) -> None:
    """Raises InputError if frozen leaves and overlay together are not the network's parameters."""
    difference = trees.first_difference(trees.merge(frozen, overlay), network.abstract_params())
    if difference:
        raise InputError(
            describe("Base and overlay are not the network's parameters", where=difference,
                     cure="give a base and an overlay that were made for this network config")
        )


def shardings_of_params(
    network: Network, params: Params, mesh: Mesh, rules: Rules = sharding.DEFAULT_RULES
) -> Params:
    """Shardings of any subset of a network's leaves (the frozen ones, stacked or not, or an overlay).

    Raises:
        InputError: a leaf that the network does not have.
    """
    flat = trees.flatten(params)
    axes = {path: network.axes_of(path) for path in flat}
    unknown = [path for path in flat if axes[path] is None]
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


def frozen_leaves(
    network: Network, frozen: Params, mesh: Mesh, rules: Rules = sharding.DEFAULT_RULES,
    dtype: str | None = None,
) -> Params:
    """Puts frozen leaves on the mesh as the step takes them; stacks all layers of a kind if it scans them.

    Goes leaf by leaf, so that a base from the host is never held twice.

    Args:
        network: its layout says whether layers are stacked.
        frozen: arrays [...] of this host or on the mesh, one subtree for each layer; or all ShapeDtypeStruct,
            which gives ShapeDtypeStructs.
        mesh: axes ('data', 'experts', 'model').
        rules: logical axes to mesh axes.
        dtype: of kernels and embeddings; None leaves them as they are. Norms and position biases stay.
    """
    flat, found = trees.flatten(frozen), {}
    names = {path: [path] for path in flat}
    for name, members in (layer_stack.stacked_names(flat) if network.layout.scan_layers else names).items():
        leaves = [flat[path] for path in members]
        target = leaves[0].dtype
        if dtype is not None and is_multiplied(name):
            target = jnp.dtype(dtype)
        shape = (len(leaves),) * layer_stack.is_stacked(name) + tuple(leaves[0].shape)
        where = sharding.leaf_sharding(network.axes_of(name), shape, mesh, rules)
        found[name] = _one_leaf(leaves, target, shape, where)
    return trees.unflatten(found)


def _one_leaf(
    leaves: Sequence[Any], dtype: jnp.dtype, shape: tuple[int, ...], where: NamedSharding
) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, dtype)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        if shape == leaves[0].shape and dtype == leaves[0].dtype:
            return hosts.put(leaves[0], where)

        def stack(*leaves: Array) -> Array:
            return jnp.stack([leaf.astype(dtype) for leaf in leaves]).reshape(shape)

        return hosts.in_order(jax.jit(stack, out_shardings=where)(*leaves))
    parts = [np.asarray(leaf).astype(dtype, copy=False) for leaf in leaves]
    return hosts.put(np.stack(parts) if len(shape) > parts[0].ndim else parts[0], where)


def shardings_of_state(
    network: Network, overlay: Params, optimizer: OptimizerConfig, mesh: Mesh,
    rules: Rules = sharding.DEFAULT_RULES,
) -> TrainState:
    """Shardings of a whole training state: optimiser statistics are split as their parameters are.

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
        spec = _statistic_spec(names, leaf.shape, shapes[path], specs[path], has_expert_axis(path))
        return NamedSharding(mesh, spec)

    opt_state = jax.tree_util.tree_map_with_path(
        place, abstract_state(overlay, optimizer).opt_state
    )
    return TrainState(
        step=sharding.replicated(mesh), overlay=overlay_shardings, opt_state=opt_state
    )


def _statistic_spec(
    names: set[str], shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec,
    of_experts: bool = False,
) -> PartitionSpec:
    """Partition spec of an optimiser statistic: its parameter's, less the dimension it averages over.

    No statistic averages over the axis of experts.
    """
    entries = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    if shape == param_shape:
        return PartitionSpec(*entries)
    if len(shape) == len(param_shape) - 1:
        # optax's Adafactor: rows average over the largest dimension, columns over the second.
        second, largest = np.argsort(param_shape[of_experts:])[-2:] + of_experts
        gone = int(largest if "v_row" in names else second)
        if shape == param_shape[:gone] + param_shape[gone + 1 :]:
            return PartitionSpec(*(entries[:gone] + entries[gone + 1 :]))
    return PartitionSpec()
