"""Meshes and logical-axis rules: the same jitted functions from one CPU to a pod.

A parameter's logical axes ('embed', 'mlp', 'heads', ...) are named by the network; the rules map each
name to an axis of the mesh. Source of the idea: T5X, https://arxiv.org/abs/2203.17189, section 2.2.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax import hosts
from elm_jax.errors import InputError, describe
from elm_jax.types import Batch, Params

DEFAULT_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("bottleneck", "model"),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("relpos_buckets", None),
)


class Axes(tuple):
    """Logical axis names of one parameter, one per dimension; a leaf, not a container, of trees."""

    __slots__ = ()


def make_mesh(
    data: int = -1, model: int = 1, experts: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh with axes ('data', 'experts', 'model').

    Args:
        data: size of the data axis; -1 takes all devices that the other two leave.
        model: size of the model axis.
        experts: size of the axis over which stacked experts are split.
        devices: defaults to all devices of all processes. If `data` is given, the first
            ``data * experts * model`` of them are used.

    Raises:
        InputError: the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    inner = model * experts
    if model < 1 or experts < 1 or data == 0 or data < -1 or (data == -1 and len(devices) % inner):
        raise InputError(
            describe("Mesh does not fit the devices", got=f"data={data}, experts={experts}, model={model}",
                     expected=f"a division of {len(devices)} devices")
        )
    data = len(devices) // inner if data == -1 else data
    if data * inner > len(devices):
        raise InputError(
            describe(
                "Mesh is larger than the number of devices",
                got=f"data={data} x experts={experts} x model={model} = {data * inner}",
                expected=f"at most {len(devices)}",
                cure="lower MESH_DATA, MESH_EXPERTS or MESH_MODEL, or start on more devices",
            )
        )
    grid = np.asarray(devices[: data * inner]).reshape(data, experts, model)
    return Mesh(grid, ("data", "experts", "model"))


def leaf_sharding(
    axes: Axes, shape: Sequence[int], mesh: Mesh,
    rules: Sequence[tuple[str, str | None]] = DEFAULT_RULES,
) -> NamedSharding:
    """Sharding of one parameter; a dimension that its mesh axis does not divide stays whole."""
    table = dict(rules)
    if len(axes) != len(shape):
        raise InputError(describe("Logical axes do not fit the shape",
                                  got=f"{tuple(axes)} for {tuple(shape)}"))
    spec: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name not in table:
            raise InputError(
                describe("No sharding rule for a logical axis", got=name, expected=f"one of {sorted(table)}")
            )
        mesh_axis = table[name]
        fits = mesh_axis is not None and mesh_axis not in spec and size % mesh.shape[mesh_axis] == 0
        spec.append(mesh_axis if fits else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def tree_shardings(
    axes_tree: Params, shapes_tree: Params, mesh: Mesh,
    rules: Sequence[tuple[str, str | None]] = DEFAULT_RULES,
) -> Params:
    """Tree of NamedSharding with the structure of `shapes_tree` (arrays or ShapeDtypeStruct)."""
    return jax.tree.map(
        lambda axes, leaf: leaf_sharding(axes, leaf.shape, mesh, rules),
        axes_tree, shapes_tree, is_leaf=lambda node: isinstance(node, Axes),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: axis B split over 'data'."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that keeps the whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a global numpy batch onto the mesh, axis B split over 'data'.

    Raises:
        InputError: B is not divisible by the size of the data axis.
    """
    size = mesh.shape["data"]
    for name, array in batch.items():
        if array.shape[0] % size:
            raise InputError(
                describe(
                    "Batch size must be divisible by the data axis of the mesh",
                    where=name, got=array.shape[0], expected=f"a multiple of {size}",
                )
            )
    target = batch_sharding(mesh)
    return {name: hosts.put(np.asarray(array), target) for name, array in batch.items()}


def put_tree(tree: Params, shardings: Params) -> Params:
    """Puts every leaf where its sharding says."""
    return jax.tree.map(hosts.put, tree, shardings)
