"""One step of E experts in one program: the solo step mapped over a leading axis E.

The base is shared and has no axis E, so its matrix products run over the E * B rows of all experts at
once; adapters and norms become batched products and sums. Each expert keeps its own step, seed, length and
learning rate, and draws the dropout of its solo run: the key is folded from its own seed and step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from elm_jax.errors import InputError, describe
from elm_jax.runtime import hosts, sharding
from elm_jax.training import state as states
from elm_jax.training.state import TrainState
from elm_jax.training.step import Metrics, StepSpec, abstract_of, compiler_options, train_step
from elm_jax.types import Array, Batch, Params

AXIS = "experts"


class Slots(NamedTuple):
    """Values that differ between the slots of a stack, each with a leading axis E.

    Attributes:
        seed: u32[E], seed of dropout.
        train_steps: i32[E], length of the run.
        learning_rate: f32[E], peak of the schedule.
        active: bool[E]; the state of a slot that is not active stays as it is, to the bit.
    """

    seed: Array
    train_steps: Array
    learning_rate: Array
    active: Array


class StackSpec(NamedTuple):
    """Everything that the programs of a stack depend on; equal specs share their programs.

    Attributes:
        step: spec of one expert's step; its optimiser's learning rate is not used.
        size: E.
        at_once: how many of them each part of the mesh's expert axis computes at once; a divisor of the part.
    """

    step: StepSpec
    size: int
    at_once: int


def make_stack_spec(step: StepSpec, size: int, at_once: int | None = None) -> StackSpec:
    """Makes the spec of a stack of E experts, each with the shapes of `step`.

    At most `at_once` experts of each part of the mesh's expert axis are computed at once, the others in turn:
    a step needs the activations of these only. None is for all.

    The optimiser's learning rate comes in with the slots, so specs that differ in it alone are equal. Rules
    lose the mesh's expert axis, which the stack's own axis takes.

    Raises:
        InputError: E is no multiple of the mesh's expert axis.
    """
    axis = step.mesh.shape[AXIS]
    if size < 1 or size % axis:
        raise InputError(
            describe("The stack does not divide over the mesh", got=f"{size} experts",
                     expected=f"a multiple of {axis}, the size of the mesh's expert axis",
                     cure="change STACK_EXPERTS or MESH_EXPERTS")
        )
    optimizer = dataclasses.replace(step.optimizer, learning_rate=1.0)
    part = size // axis
    width = max(number for number in range(1, min(at_once or part, part) + 1) if part % number == 0)
    return StackSpec(step._replace(optimizer=optimizer, rules=sharding.rules_of_one(step.rules)), size, width)


def stacked_step(
    spec: StackSpec, frozen: Params, state: TrainState, batch: Batch, slots: Slots
) -> tuple[TrainState, Metrics]:
    """One update of every active expert.

    Args:
        spec: static.
        frozen: leaves of the base that do not train, without an axis E.
        state: every leaf with a leading axis E; step i32[E].
        batch: arrays [E, B, ...].
        slots: seeds, lengths, learning rates, which slots are active.

    Returns:
        The state after the update, and metrics [E, ...] as `train_step` gives them; those of a slot
        that is not active mean nothing.
    """
    one = spec.step

    def solo(state: TrainState, batch: Batch, slot: Slots) -> tuple[TrainState, Metrics]:
        after, metrics = train_step(
            one.config, frozen, state, batch, slot.seed, slot.train_steps, slot.learning_rate)
        kept = jax.tree.map(lambda new, old: jnp.where(slot.active, new, old), after, state)
        return kept, metrics

    with sharding.placed(one.mesh, one.rules, stacked=True):
        return _in_turns(solo, spec, (state, batch, slots))


def _in_turns(solo: Callable[..., Any], spec: StackSpec, arguments: Any) -> Any:
    """Maps one expert's function over leaves [E, ...], `at_once` of each part of the mesh at a time."""
    parts = spec.step.mesh.shape[AXIS]
    turns = spec.size // parts // spec.at_once
    if parts == spec.at_once == 1:
        return jax.lax.map(lambda some: solo(*some), arguments)
    function = jax.vmap(solo, spmd_axis_name=AXIS)
    if turns == 1:
        return function(*arguments)

    def cut(leaf: Array) -> Array:
        # A device's experts lie together: each turn takes some of every device, and none moves.
        leaf = leaf.reshape(parts, turns, spec.at_once, *leaf.shape[1:])
        return jnp.swapaxes(leaf, 0, 1).reshape(turns, parts * spec.at_once, *leaf.shape[3:])

    def join(leaf: Array) -> Array:
        leaf = leaf.reshape(turns, parts, spec.at_once, *leaf.shape[2:])
        return jnp.swapaxes(leaf, 0, 1).reshape(spec.size, *leaf.shape[3:])

    _, found = jax.lax.scan(lambda _, some: (None, function(*some)), None, jax.tree.map(cut, arguments))
    return jax.tree.map(join, found)


def with_experts(target: NamedSharding) -> NamedSharding:
    """Sharding of a leaf [E, ...] from that of [...]: E over 'experts', the other axes as before."""
    return NamedSharding(target.mesh, PartitionSpec(AXIS, *target.spec))


def stack_shardings(spec: StackSpec) -> TrainState:
    """Shardings of a stack's state [E, ...]: E over 'experts', the other axes by the solo rules."""
    one = spec.step
    solo = states.shardings_of_state(one.network, abstract_of(one.overlay), one.optimizer, one.mesh,
                                     one.rules)
    return jax.tree.map(with_experts, solo)


def abstract_stack(spec: StackSpec) -> TrainState:
    """State of a stack as ShapeDtypeStructs [E, ...] with shardings."""
    solo = states.abstract_state(abstract_of(spec.step.overlay), spec.step.optimizer)
    return jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct((spec.size, *leaf.shape), leaf.dtype, sharding=target),
        solo, stack_shardings(spec),
    )


def rows_of_slots(spec: StackSpec, batch_size: int) -> list[np.ndarray]:
    """Row numbers of each slot's batch that this process's devices hold: ascending, i64[n], maybe empty."""
    target = with_experts(sharding.batch_sharding(spec.step.mesh))
    held: list[set[int]] = [set() for _ in range(spec.size)]
    for slots, rows in target.addressable_devices_indices_map((spec.size, batch_size)).values():
        for slot in range(spec.size)[slots]:
            held[slot].update(range(batch_size)[rows])
    return [np.array(sorted(rows), np.int64) for rows in held]


def put_stacked(batches: Sequence[Batch | None], spec: StackSpec,
                rows: Sequence[np.ndarray] | None = None) -> Batch:
    """Puts E numpy batches [B, ...] of one shape on the mesh as [E, B, ...]: E over 'experts', B over 'data'.

    Args:
        batches: of every slot; None for a slot whose batch is nothing but padding.
        spec: gives mesh and shapes.
        rows: the rows of the global batch that each of them holds, as `rows_of_slots` gives them; None for
            whole batches.
    """
    target, found = with_experts(sharding.batch_sharding(spec.step.mesh)), {}
    for name, shape, kind in spec.step.batch:
        stack = np.zeros((spec.size, *shape), kind)
        for slot, batch in enumerate(batches):
            if batch is not None:
                stack[slot, slice(None) if rows is None else rows[slot]] = batch[name]
        found[name] = hosts.put(stack, target)
    return found


class StackPrograms(NamedTuple):
    """The compiled programs of one stack; experts enter and leave without a new compilation.

    Attributes:
        step: ``(frozen, state, batch, slots) -> (state, metrics)``; donates the state.
        enter: ``(state, overlay, index) -> state`` with a fresh expert in slot `index`; donates the state.
        overlay_of: ``(overlay, index)`` -> the overlay of one slot, without the axis E.
        keep: ``(stack, overlay, index) -> stack`` of overlays with one of them replaced; donates the stack.
    """

    step: jax.stages.Compiled
    enter: jax.stages.Compiled
    overlay_of: jax.stages.Compiled
    keep: jax.stages.Compiled


@functools.lru_cache(maxsize=32)
def compile_stack(spec: StackSpec) -> StackPrograms:
    """Compiles the programs of a stack. Equal specs of one process compile once."""
    one, mesh = spec.step, spec.step.mesh
    placed, state = stack_shardings(spec), abstract_stack(spec)
    frozen, overlay = abstract_of(one.frozen), abstract_of(one.overlay)
    whole, over_experts = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec(AXIS))
    solo_overlay = states.shardings_of_params(one.network, overlay, mesh, one.rules)
    index = jax.ShapeDtypeStruct((), np.int32)

    step = jax.jit(
        functools.partial(stacked_step, spec),
        in_shardings=(states.shardings_of_params(one.network, frozen, mesh, one.rules), placed,
                      with_experts(sharding.batch_sharding(mesh)), over_experts),
        out_shardings=(placed, whole), donate_argnums=1,
    ).lower(frozen, state, _abstract_batch(one.batch, spec.size), _abstract_slots(spec.size)).compile(
        compiler_options(mesh))

    def replace(stack: Any, one_of_it: Any, index: Array) -> Any:
        return jax.tree.map(
            lambda whole, leaf: jax.lax.dynamic_update_index_in_dim(whole, leaf, index, 0), stack, one_of_it)

    def put_in(state: TrainState, overlay: Params, index: Array) -> TrainState:
        return replace(state, states.create_state(overlay, one.optimizer), index)

    enter = jax.jit(put_in, in_shardings=(placed, solo_overlay, whole), out_shardings=placed,
                    donate_argnums=0).lower(state, overlay, index).compile()

    def take_out(overlay: Params, index: Array) -> Params:
        return jax.tree.map(
            lambda stack: jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False), overlay)

    overlay_of = jax.jit(take_out, in_shardings=(placed.overlay, whole), out_shardings=solo_overlay,
                         ).lower(state.overlay, index).compile()
    keep = jax.jit(replace, in_shardings=(placed.overlay, solo_overlay, whole), out_shardings=placed.overlay,
                   donate_argnums=0).lower(state.overlay, overlay, index).compile()
    return StackPrograms(step, enter, overlay_of, keep)


def empty_stack(spec: StackSpec) -> TrainState:
    """Makes a state of zeros [E, ...] on the mesh, which experts then enter."""
    like = abstract_stack(spec)
    # Buffers of its own: the programs donate them.
    return jax.tree.map(lambda leaf: hosts.put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding, own=True),
                        like)


def overlay_like(spec: StackSpec) -> Params:
    """One expert's overlay as ShapeDtypeStructs, without the axis E."""
    return abstract_of(spec.step.overlay)


def num_programs() -> int:
    """Number of stacks of different specs that this process has compiled."""
    return compile_stack.cache_info().misses


def _abstract_batch(batch: tuple, size: int) -> Batch:
    return {path: jax.ShapeDtypeStruct((size, *shape), dtype) for path, shape, dtype in batch}


def _abstract_slots(size: int) -> Slots:
    kinds = (np.uint32, np.int32, np.float32, np.bool_)
    return Slots(*(jax.ShapeDtypeStruct((size,), kind) for kind in kinds))
