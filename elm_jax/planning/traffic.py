"""Bytes that a step must move between chips, derived from its shardings, not from a compiled program.

Complements `planning.hlo`: what a step *must* send, from the leaves' shardings and the sizes of activations
alone. If a compiled program sends much more, XLA has not partitioned it as the rules intend. Bytes are those
that one chip sends, by the formulas of `hlo.ring_bytes`.

Source of the accounts: FSDP, https://arxiv.org/abs/1910.02054 (section 5, "ZeRO"); tensor parallelism,
https://arxiv.org/abs/1909.08053 (section 3).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.blocks.spread import Spread, planned
from elm_jax.models.layers.gates import capacity
from elm_jax.models.network import Network, has_expert_axis
from elm_jax.planning.hlo import ring_bytes
from elm_jax.runtime import sharding, trees
from elm_jax.runtime.sharding import Axes, Rules
from elm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Need:
    """Traffic of one cause, such as the gathering of split parameters.

    Attributes:
        what: the cause, in words.
        kind: of collective, as `hlo.KINDS`.
        bytes: that one chip sends in a step.
    """

    what: str
    kind: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Mesh, sharding rules and batch sizes: with the network they determine a step's traffic.

    Attributes:
        mesh: axes ('data', 'experts', 'model').
        rules: logical axes to mesh axes.
        rows: B, the global batch.
        source: S.
        target: T.
        num_microbatches: parts of the batch.
    """

    mesh: Mesh
    rules: Rules
    rows: int
    source: int
    target: int
    num_microbatches: int = 1


def needs(network: Network, frozen: Params, overlay: Params, shape: StepShape) -> list[Need]:
    """Lists the traffic that a step must send, by cause; causes without bytes are left out.

    Traffic that is small for any model size is left out too: sums of losses and norms, optimiser rows.

    Args:
        network: config and layout.
        frozen: leaves that do not train, stacked or not, arrays or ShapeDtypeStruct.
        overlay: leaves that train.
        shape: of the step.
    """
    gathered = sum(
        _gather_bytes(network, path, leaf, shape) for tree in (frozen, overlay)
        for path, leaf in trees.flatten(tree).items()
    )
    reduced = {"all-reduce": 0.0, "reduce-scatter": 0.0}
    for path, leaf in trees.flatten(overlay).items():
        for kind, sent in _gradient_bytes(network, path, leaf, shape).items():
            reduced[kind] += sent
    found = [
        Need("weights gathered for the layers that use them", "all-gather", gathered),
        Need("gradients summed where parameters are split", "reduce-scatter", reduced["reduce-scatter"]),
        Need("gradients summed where parameters are whole", "all-reduce", reduced["all-reduce"]),
        *_activation_needs(network, frozen, overlay, shape),
        *_routing_needs(network, shape),
    ]
    return [need for need in found if need.bytes]


def _dtype(network: Network, path: str, leaf: jax.ShapeDtypeStruct) -> np.dtype:
    """Dtype in which a leaf is multiplied: the activations' for kernels, float32 for the head."""
    if path.endswith(("/kernel", "/bias")) and path != network.account(0, 0).head:
        return np.dtype(network.config.activation_dtype)
    return np.dtype(leaf.dtype) if path.endswith("/embedding") else np.dtype(np.float32)


def _spread(network: Network, shape: StepShape) -> Spread:
    """How a sparse network's layers lie on the mesh; of a dense network as if on one device."""
    config = network.config
    if config.sparse is None or shape.mesh.size == 1:
        return Spread()
    groups = shape.rows // shape.num_microbatches / config.sparse.group_rows
    return planned(shape.mesh, shape.rules, int(groups) if groups.is_integer() else 1,
                   (config.sparse.num_experts, config.emb_dim, config.mlp_dim))


def _batch_axes(shape: StepShape) -> set[str]:
    return set(sharding.axes_in(dict(shape.rules)["batch"]))


def streamed_bytes(network: Network, frozen: Params, overlay: Params, shape: StepShape) -> float:
    """Bytes of parameters that a chip reads in one pass: gathered, in the dtype of the products."""
    return sum(_local(network, path, leaf, shape)[0] for tree in (frozen, overlay)
               for path, leaf in trees.flatten(tree).items())


def _local(network: Network, path: str, leaf: jax.ShapeDtypeStruct, shape: StepShape
           ) -> tuple[float, int]:
    """(bytes of a leaf on a chip once gathered for its use, chips it was split over before).

    Dense layers need their leaves whole on the batch's axes; the experts of sparse ones stay apart.
    """
    spec = sharding.leaf_spec(network.axes_of(path), leaf.shape, shape.mesh, shape.rules)
    axes = [axis for entry in spec for axis in sharding.axes_in(entry)]
    apart = set(axes) - _batch_axes(shape)
    if has_expert_axis(path):
        spread = _spread(network, shape)
        apart = {*spread.experts, *spread.hidden}
    group = math.prod(shape.mesh.shape[axis] for axis in axes if axis not in apart)
    others = math.prod(shape.mesh.shape[axis] for axis in axes if axis in apart)
    size = math.prod(leaf.shape) * _dtype(network, path, leaf).itemsize
    return size / others, group


def _gather_bytes(network: Network, path: str, leaf: jax.ShapeDtypeStruct, shape: StepShape) -> float:
    """Bytes that gathering a split leaf sends: for every microbatch, and again for its backward pass.

    A layer's gathered weights are kept between the passes only if layers are neither scanned nor recomputed.
    Leaves outside of layers are gathered once.
    """
    size, group = _local(network, path, leaf, shape)
    once = ring_bytes("all-gather", size, group)
    if not path.endswith("/embedding"):
        layout = network.layout
        twice = "/layers" in path and (layout.scan_layers or layout.remat != "none")
        return (1 + twice) * once * shape.num_microbatches
    # Looking up rows needs no gradient of its inputs; where the table's columns are split, moving the
    # looked-up rows (to every chip's batch, and their gradients back) may be less than moving the table.
    tokens = shape.rows / _data(shape) * (shape.source + shape.target)
    rows = ring_bytes("all-to-all", tokens * leaf.shape[-1] * _dtype(network, path, leaf).itemsize, group)
    return min(once * shape.num_microbatches, rows)


def _gradient_bytes(network: Network, path: str, leaf: jax.ShapeDtypeStruct, shape: StepShape
                    ) -> dict[str, float]:
    """Bytes that summing a gradient over the batch's axes sends: every microbatch if split, else once.

    An expert's gradient is whole where its rows came from.
    """
    size, group = _local(network, path, leaf, shape)
    own = _spread(network, shape).experts if has_expert_axis(path) else ()
    copies = math.prod(shape.mesh.shape[axis] for axis in _batch_axes(shape) if axis not in own)
    return {"reduce-scatter": ring_bytes("reduce-scatter", size, group) * shape.num_microbatches,
            "all-reduce": ring_bytes("all-reduce", size / group, max(1, copies // group))}


def _data(shape: StepShape) -> int:
    return math.prod(shape.mesh.shape[axis] for axis in _batch_axes(shape))


def _activation_needs(
    network: Network, frozen: Params, overlay: Params, shape: StepShape
) -> Iterator[Need]:
    """Traffic of tensor parallelism: sums over the axes that split a product's summed dimension."""
    config, account = network.config, network.account(shape.source, shape.target)
    rows = shape.rows / _data(shape)
    vector = rows * account.width * np.dtype(config.activation_dtype).itemsize

    def over(logical: str, size: int, payload: float) -> float:
        return ring_bytes("all-reduce", payload, _parts(logical, size, shape))

    def heads(vectors: int) -> float:
        return over("joined_kv", account.heads, vectors * vector)

    def mlp(vectors: int) -> float:
        return over("mlp", account.mlp, vectors * vector)

    again = network.layout.remat == "layer"
    forward = heads(account.attention_outputs) + mlp(account.mlp_outputs)
    backward = heads(account.attention_outputs + account.attention_inputs) + mlp(account.mlp_outputs)
    repeated = 0.0
    if again:  # all but a layer's last sum, which nothing in the layer reads, unless its adapter does
        repeated = heads(account.attention_outputs)
    if isinstance(config.adapter, BottleneckConfig):  # LoRA's updates have almost nothing to sum
        adapters = over("bottleneck", config.adapter.width(account.width), 2 * account.mlp_outputs * vector)
        forward += adapters
        backward += adapters
        if again:
            repeated += mlp(account.mlp_outputs) + adapters / 2
    yield Need("outputs of sub-layers summed, forward", "all-reduce", forward)
    yield Need("outputs of sub-layers summed, computed again", "all-reduce", repeated)
    yield Need("gradients of sub-layers' inputs summed", "all-reduce", backward)
    table = {**trees.flatten(frozen), **trees.flatten(overlay)}[account.table]
    looked_up = rows * account.embedded * account.width * np.dtype(table.dtype).itemsize
    head = rows * account.predicted * account.width * 4
    yield Need("embedded tokens summed over the vocabulary's parts", "all-reduce",
               over("vocab", config.vocab_size, looked_up))
    yield Need("gradient of the head's input summed", "all-reduce", over("vocab", config.vocab_size, head))


def _routing_needs(network: Network, shape: StepShape) -> Iterator[Need]:
    """Traffic of sparse layers: rows to their experts and back, or sums of what the experts give.

    Both directions of differentiation send the same. Layers that are computed again move their rows again.
    """
    config, account = network.config, network.account(shape.source, shape.target)
    spread = _spread(network, shape)
    if not account.sparse_outputs or spread.mesh is None:
        return
    rows = shape.rows / _size(shape, spread.groups)
    vector = rows * account.width * np.dtype(config.activation_dtype).itemsize
    again, experts = network.layout.remat != "none", _size(shape, spread.experts)
    outputs = account.sparse_outputs * vector
    if spread.exchanges and capacity(config.sparse, 1, training=True) is not None:
        moved = ring_bytes("all-to-all", account.routed * vector, experts)
        yield Need("rows moved to their experts and back, forward", "all-to-all", 2 * moved)
        yield Need("rows moved again for layers computed again", "all-to-all", 2 * moved * again)
        yield Need("gradients of rows moved to and from their experts", "all-to-all", 2 * moved)
    elif spread.exchanges:
        moved = ring_bytes("all-gather", outputs * experts, experts)
        yield Need("rows gathered where experts are, and their gradients", "all-gather", (2 + again) * moved)
        yield Need("outputs of experts summed where rows are, and gradients", "reduce-scatter", 2 * moved)
    summed = _size(shape, spread.hidden if spread.exchanges else (*spread.hidden, *spread.experts))
    yield Need("outputs of sparse layers and gradients of their inputs summed", "all-reduce",
               2 * ring_bytes("all-reduce", outputs, summed))


def _size(shape: StepShape, axes: Iterable[str]) -> int:
    return math.prod(shape.mesh.shape[axis] for axis in axes)


def _parts(logical: str, size: int, shape: StepShape) -> int:
    """Number of chips over which an activation's dimension is split, without the batch's axes."""
    spec: PartitionSpec = sharding.leaf_spec(
        Axes((logical,)), (size,), shape.mesh, shape.rules, unused=_batch_axes(shape))
    return math.prod(shape.mesh.shape[axis] for axis in sharding.axes_in(spec[0]))


def flops_of(function: jax.extend.core.ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products of a traced function, loops counted in full.

    Recomputation in the backward pass counts too; elementwise work does not.
    """
    return _flops(function.jaxpr)


def _flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            result = math.prod(equation.outvars[0].aval.shape)
            total += 2.0 * result * math.prod(left[axis] for axis in contracted)
            continue
        times = {"scan": _turns, "shard_map": _devices}.get(equation.primitive.name, _once)(equation.params)
        inner = [_flops(part) for part in _inner(equation.params)]
        total += times * (max(inner, default=0.0) if equation.primitive.name == "cond" else sum(inner))
    return total


def _once(_: dict) -> int:
    return 1


def _turns(params: dict) -> int:
    return params["length"]


def _devices(params: dict) -> int:
    """Devices with a part of their own in a `jax.shard_map`, whose inner shapes are those of one device."""
    axes = {axis for spec in params["in_specs"] for entry in spec for axis in sharding.axes_in(entry)}
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _inner(params: dict) -> Iterator[jax.extend.core.Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr") and hasattr(part.jaxpr, "eqns"):
                yield part.jaxpr


def bytes_on_a_chip(tree: Params, shardings: Params) -> int:
    """Bytes of a tree's leaves on one chip."""
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
        tree, shardings)
    return sum(jax.tree.leaves(sizes))
