"""Brings tokens to the experts they chose and back, by gathers in both directions of differentiation.

A slot is a row of the experts' inputs. Each slot knows its choice and each choice its slot, so the gradient
of a gather is another gather; autodiff would make a scatter-add of it, several times as slow.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elm_jax.models.layers.gates import ExpertChoices, TokenChoices
from elm_jax.types import Array


class SlotMap(NamedTuple):
    """Which choice lies in which slot; choices of T tokens are numbered ``t * K + k``.

    Attributes:
        of_choice: i32[T, K], slot of each choice; S if it has none.
        choice_in: i32[S], choice in each slot; T * K if it is empty.
    """

    of_choice: Array
    choice_in: Array


def capacity_slots(choices: TokenChoices, num_experts: int, capacity: int) -> SlotMap:
    """SlotMap of experts with C places in each of G groups, ordered [E, G, C]; T = G N.

    Args:
        choices: [G, N, K].
        num_experts: E.
        capacity: C.
    """
    groups = choices.experts.shape[0]
    first = (choices.experts * groups + jnp.arange(groups)[:, None, None]) * capacity
    return _invert(first + choices.places, choices.kept, num_experts * groups * capacity)


class Blocks(NamedTuple):
    """Blocks of equally many slots, each of one expert, sorted by expert; those without a row come last.

    Attributes:
        experts: i32[n], expert of each block.
        filled: i32[n], rows in each block; its first slots hold them.
        per_expert: i32[E], blocks of each expert that hold rows.
    """

    experts: Array
    filled: Array
    per_expert: Array


def block_rows(choices: int, num_experts: int, most: int = 128) -> int:
    """Slots of a block: about what an expert gets, a power of two from 8 to `most`."""
    share = max(1, choices // num_experts)
    return min(max(8, 1 << (share - 1).bit_length()), most)


def block_slots(choices: TokenChoices, num_experts: int, rows: int) -> tuple[SlotMap, Blocks]:
    """Slots without a capacity: each expert's rows are filled up to whole blocks of `rows` rows.

    The number of blocks is what the worst split needs: ``choices / rows + E``, rounded down.

    Args:
        choices: [G, N, K]; an expert's choices in each group are numbered from 0.
        num_experts: E.
        rows: of a block.
    """
    size, groups = choices.experts.size, jnp.arange(choices.experts.shape[0])[:, None, None]
    most = size // rows + min(num_experts, size)
    wanted = jnp.where(choices.kept, choices.experts, num_experts)
    counts = jnp.zeros((groups.size, num_experts + 1), jnp.int32).at[groups, wanted].add(1)[:, :-1]
    total = counts.sum(axis=0)
    blocks = (total + rows - 1) // rows
    ends = jnp.cumsum(blocks)
    starts = ends - blocks
    first = (starts * rows)[None] + jnp.cumsum(counts, axis=0) - counts
    slots = _invert(first[groups, choices.experts] + choices.places, choices.kept, most * rows)
    numbers = jnp.arange(most)
    experts = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), num_experts - 1).astype(jnp.int32)
    filled = jnp.clip(total[experts] - (numbers - starts[experts]) * rows, 0, rows)
    return slots, Blocks(experts, filled, blocks)


def _invert(slots: Array, kept: Array, size: int) -> SlotMap:
    """Turns slots i32[G, N, K] of the kept choices round."""
    experts_per_token = slots.shape[-1]
    slots = jnp.where(kept, slots, size).reshape(-1)
    choices = jnp.full(size, slots.size, jnp.int32).at[slots].set(
        jnp.arange(slots.size, dtype=jnp.int32), mode="drop", unique_indices=False)
    return SlotMap(slots.reshape(-1, experts_per_token), choices)


@jax.custom_vjp
def to_slots(x: Array, slots: SlotMap) -> Array:
    """Rows of the slots: f[T, D] -> f[S, D]; 0 in empty ones."""
    return _rows(x, slots.choice_in // slots.of_choice.shape[1])


def _to_slots(x: Array, slots: SlotMap) -> tuple[Array, SlotMap]:
    return to_slots(x, slots), slots


def _to_slots_gradient(slots: SlotMap, gradient: Array) -> tuple[Array, None]:
    parts = [_rows(gradient, slots.of_choice[:, k]) for k in range(slots.of_choice.shape[1])]
    return _total(parts).astype(gradient.dtype), None


to_slots.defvjp(_to_slots, _to_slots_gradient)


@jax.custom_vjp
def from_slots(rows: Array, gates: Array, slots: SlotMap) -> Array:
    """Weighted sums of the choices' rows: f[S, D], f32[T, K] -> f[T, D]; a choice without a slot adds 0.

    It sums in float32 and returns the rows' dtype.
    """
    parts = [_rows(rows, slots.of_choice[:, k]) * gates[:, k, None] for k in range(gates.shape[1])]
    return _total(parts).astype(rows.dtype)


def _from_slots(rows: Array, gates: Array, slots: SlotMap) -> tuple[Array, tuple[Array, Array, SlotMap]]:
    return from_slots(rows, gates, slots), (rows, gates, slots)


def _from_slots_gradient(kept: tuple[Array, Array, SlotMap], gradient: Array) -> tuple[Array, Array, None]:
    rows, gates, slots = kept
    by_slot = gates.reshape(-1).at[slots.choice_in].get(mode="fill", fill_value=0)
    rows_gradient = _rows(gradient, slots.choice_in // gates.shape[1]) * by_slot[:, None]
    parts = [jnp.sum(_rows(rows, slots.of_choice[:, k]).astype(jnp.float32) * gradient, axis=1)
             for k in range(gates.shape[1])]
    return rows_gradient.astype(rows.dtype), jnp.stack(parts, axis=1), None


from_slots.defvjp(_from_slots, _from_slots_gradient)


def through_experts(x: Array, choices: ExpertChoices, experts: Callable[[Array], Array]) -> Array:
    """Sums of the experts' outputs for the tokens that they chose: f[G, N, D] -> f[G, N, D].

    Args:
        x: f[G, N, D].
        choices: [G, E, C].
        experts: f[E, G * C, D] -> f[E, G * C, D].
    """
    groups, length, size = x.shape
    num_experts, capacity = choices.tokens.shape[1:]
    tokens = choices.tokens + jnp.arange(groups)[:, None, None] * length
    tokens = jnp.where(choices.taken, tokens, groups * length).swapaxes(0, 1).reshape(-1)
    rows = experts(_rows(x.reshape(-1, size), tokens).reshape(num_experts, groups * capacity, size))
    gates = choices.gates.swapaxes(0, 1).reshape(-1, 1)
    sums = jnp.zeros((groups * length, size), jnp.float32).at[tokens].add(
        rows.reshape(-1, size) * gates, mode="drop")
    return sums.reshape(x.shape).astype(x.dtype)


def _rows(array: Array, index: Array) -> Array:
    """Rows of f[R, D] by their numbers; 0 where the number is R."""
    return array.at[index].get(mode="fill", fill_value=0)


def _total(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
