"""Meshes and sharding rules: the same jitted functions run on one CPU and on a pod.

A parameter's logical axes ('embed', 'mlp', 'heads', ...) are named by the network, and so are those of
its activations ('batch', 'length', ...); the rules map each name to axes of the mesh. Source of the
idea: T5X, https://arxiv.org/abs/2203.17189, section 2.2.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime import hosts
from elm_jax.types import Array, Batch, Params

MESH_AXES = ("data", "experts", "model")
MeshAxes = str | tuple[str, ...] | None
Rules = tuple[tuple[str, MeshAxes], ...]
"""Rows (logical axis, mesh axis or axes or None): hashable, a static value of compiled functions."""

DEFAULT_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("expert", "experts"),
    ("expert_mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("bottleneck", "model"),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("relpos_buckets", None),
    ("layers", None),
)


class Axes(tuple):
    """Logical axis names of one array, one for each dimension; a leaf, not a container, of trees.

    None names a dimension that is never split.
    """

    __slots__ = ()


def make_rules(overrides: Iterable[Sequence[Any]] = (), where: str = "sharding_rules") -> Rules:
    """Returns `DEFAULT_RULES` with some rows replaced.

    Args:
        overrides: rows (logical axis, mesh axis | several mesh axes | None); lists count as tuples.
        where: the setting that they come from, for errors.

    Raises:
        InputError: a row that is no pair, an unknown or repeated logical axis, an unknown mesh axis.
    """
    table: dict[str, MeshAxes] = dict(DEFAULT_RULES)
    seen: set[str] = set()
    for row in overrides:
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 2:
            raise InputError(describe("A sharding rule is no pair", where=where, got=repr(row),
                                      expected="(logical axis, mesh axis), for example ('embed', 'data')"))
        name, target = row
        if name not in table:
            raise unknown_name("logical axis", str(name), table, where=where)
        if name in seen:
            raise InputError(describe("A logical axis has two sharding rules", where=where, got=name,
                                      expected="one row; several mesh axes are a tuple in it"))
        seen.add(name)
        table[name] = _mesh_axes(target, f"{where}: {name}")
    return tuple(table.items())


def _mesh_axes(target: Any, where: str) -> MeshAxes:
    if target is None:
        return None
    names = (target,) if isinstance(target, str) else tuple(target) if isinstance(target, Sequence) else ()
    if not names or len(set(names)) != len(names):
        raise InputError(describe("A sharding rule names no mesh axis", where=where, got=repr(target),
                                  expected=f"None, one of {MESH_AXES}, or several of them, each once"))
    for name in names:
        if name not in MESH_AXES:
            raise unknown_name("mesh axis", str(name), MESH_AXES, where=where)
    return names[0] if len(names) == 1 else names


def split_rules(rules: Rules = DEFAULT_RULES) -> Rules:
    """Rules that split parameters over the data axis too, for a base that waits in memory.

    A run makes its own copy of a frozen base (its dtype, stacked layers, its shardings). The base that was
    read stays in memory beside that, in float32, and must not be replicated on every device.
    """
    return tuple((name, "data" if name == "embed" and target is None else target) for name, target in rules)


def rules_of_one(rules: Rules = DEFAULT_RULES) -> Rules:
    """Rules of one network of a stack: those given, without the mesh's expert axis, which the stack takes."""
    return tuple((name, _without(target, "experts")) for name, target in rules)


def _without(target: MeshAxes, axis: str) -> MeshAxes:
    rest = tuple(name for name in axes_in(target) if name != axis)
    return rest if len(rest) > 1 else rest[0] if rest else None


def axes_in(target: MeshAxes) -> tuple[str, ...]:
    """The mesh axes that a rule, or an entry of a partition, names: none, one or several."""
    return (target,) if isinstance(target, str) else target or ()


def largest_data_axis(batches: Iterable[int], most: int) -> int:
    """Largest data axis, up to `most`, that divides every batch size.

    >>> largest_data_axis([12, 8], most=6)
    4
    """
    batches = list(batches)
    fitting = [size for size in range(1, most + 1) if not any(batch % size for batch in batches)]
    return max(fitting, default=most)


def make_mesh(
    data: int = -1, model: int = 1, experts: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh with axes ('data', 'experts', 'model').

    Args:
        data: size of the data axis; -1 takes all devices that the other two leave.
        model: size of the model axis.
        experts: size of the axis over which stacked networks, or the experts of sparse layers, are split.
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
    mesh = Mesh(_grid(devices, (data, experts, model)), MESH_AXES)
    used = {device.process_index for device in mesh.devices.flat}
    if len(used) < len({device.process_index for device in devices}):
        raise InputError(describe(
            "The mesh leaves out whole processes of this run", got=f"{len(used)} processes on the mesh",
            expected="devices of every process",
            cure="raise MESH_DATA (-1 takes all), or start fewer processes"))
    return mesh


def _grid(devices: list[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices in mesh order: on a torus, neighbours on a mesh axis are physical neighbours.

    A part of a slice need not be a box of the torus: it keeps the order in which JAX lists it.
    """
    if devices[0].platform == "cpu" or math.prod(shape) != len(devices):
        return np.asarray(devices[: math.prod(shape)]).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def leaf_spec(
    axes: Axes, shape: Sequence[int], mesh: Mesh, rules: Rules = DEFAULT_RULES,
    unused: Iterable[str] = (),
) -> PartitionSpec:
    """Partition spec of one array; see `leaf_sharding`. `unused` names mesh axes that are left out."""
    table = dict(rules)
    if len(axes) != len(shape):
        raise InputError(describe("Logical axes do not fit the shape",
                                  got=f"{tuple(axes)} for {tuple(shape)}"))
    taken, spec = set(unused), []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in table:
            raise InputError(
                describe("No sharding rule for a logical axis", got=name, expected=f"one of {sorted(table)}")
            )
        wanted = table[name] if name is not None else None
        parts: tuple[str, ...] = ()
        for mesh_axis in axes_in(wanted):
            if mesh_axis in taken or size % math.prod(mesh.shape[part] for part in (*parts, mesh_axis)):
                break
            parts = (*parts, mesh_axis)
        taken.update(parts)
        spec.append((parts if len(parts) > 1 else parts[0]) if parts else None)
    return PartitionSpec(*spec)


def leaf_sharding(
    axes: Axes, shape: Sequence[int], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """Sharding of one array by its logical axes and the rules.

    A mesh axis serves one dimension only, the first whose rule names it; a dimension that its mesh axis
    does not divide stays whole. Of several mesh axes a dimension takes those that come before the
    first one that does not fit.
    """
    return NamedSharding(mesh, leaf_spec(axes, shape, mesh, rules))


def tree_shardings(
    axes_tree: Params, shapes_tree: Params, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> Params:
    """Tree of NamedSharding with the structure of `shapes_tree` (arrays or ShapeDtypeStruct)."""
    return jax.tree.map(
        lambda axes, leaf: leaf_sharding(axes, leaf.shape, mesh, rules),
        axes_tree, shapes_tree, is_leaf=lambda node: isinstance(node, Axes),
    )


class Placement(NamedTuple):
    """What `placed` has set.

    Attributes:
        mesh: of the traced function.
        rules: of the mesh.
        stacked: whether the function is mapped over networks by a `jax.vmap` with an ``spmd_axis_name``.
    """

    mesh: Mesh
    rules: Rules
    stacked: bool


_PLACEMENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(mesh: Mesh, rules: Rules, stacked: bool = False) -> Iterator[None]:
    """Sets the mesh and rules that `constrain` uses in a block; enter it inside of the traced function.

    A compiled function must take both as static values: a context is not part of the key under which
    `jax.jit` caches programs.

    Args:
        mesh: of the traced function.
        rules: of the mesh.
        stacked: see `Placement`; the rules then leave the mapped axis out.
    """
    token = _PLACEMENT.set(Placement(mesh, rules, stacked))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def constrain(array: Array, *axes: str | None) -> Array:
    """Constrains an array to the sharding of its logical axes; returns it unchanged outside of `placed`.

    It keeps XLA from choosing another sharding, for example from gathering activations instead of a layer's
    weights. Its gradient is constrained to the same sharding. Under `jax.vmap` the new axis is left to XLA,
    or to ``spmd_axis_name``.
    """
    found = _PLACEMENT.get()
    if found is None:
        return array
    return jax.lax.with_sharding_constraint(
        array, leaf_sharding(Axes(axes), array.shape, found.mesh, found.rules))


def placement() -> Placement | None:
    """What `placed` has set; None outside of it."""
    return _PLACEMENT.get()


def num_placed() -> int:
    """Number of devices of the mesh that `placed` has set; 1 outside of it."""
    found = _PLACEMENT.get()
    return 1 if found is None else found.mesh.size


def platform() -> str:
    """Platform of the mesh that `placed` has set, which need not be here; JAX's default outside of it."""
    found = _PLACEMENT.get()
    return jax.default_backend() if found is None else found.mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: axis B split over 'data', whatever the rules."""
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
    """Puts every leaf on the mesh by its sharding."""
    return jax.tree.map(hosts.put, tree, shardings)
