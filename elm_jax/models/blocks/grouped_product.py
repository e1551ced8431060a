"""Products of experts' rows with their kernels: as many rows an expert, or blocks of rows sorted by expert.

XLA's CPU backend takes very unlike times for one product in its several forms: those here reach the speed of
one dense product of as many rows. With few rows an expert some forms are five times as slow as others.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from elm_jax.models.blocks.dispatch import Blocks
from elm_jax.runtime import sharding
from elm_jax.types import Array

SIZES, LEAST = 8, 4
"""Into how many choices of a size a block is divided, and rows of the least: each choice is compiled."""


@jax.custom_vjp
def batched_product(rows: Array, kernels: Array) -> Array:
    """Multiplies each expert's rows with its kernel: f[E, C, I], f[E, I, O] -> f[E, C, O]."""
    if not _is_cpu():
        return jnp.einsum("eci,eio->eco", rows, kernels)
    # The barriers keep the transpositions, which are cheap, out of the products.
    return jnp.einsum("eic,eio->eco", jax.lax.optimization_barrier(rows.swapaxes(1, 2)), kernels)


def _batched(rows: Array, kernels: Array) -> tuple[Array, tuple[Array, Array]]:
    return batched_product(rows, kernels), (rows, kernels)


def _batched_gradient(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    rows, kernels = kept
    kernel_gradient = jnp.einsum("eci,eco->eio", rows, gradient)
    if not _is_cpu():
        return jnp.einsum("eco,eio->eci", gradient, kernels), kernel_gradient
    turned = jax.lax.optimization_barrier(jnp.einsum("eio,eco->eic", kernels, gradient))
    return jax.lax.optimization_barrier(turned.swapaxes(1, 2)), kernel_gradient


batched_product.defvjp(_batched, _batched_gradient)


def _is_cpu() -> bool:
    return sharding.platform() == "cpu"


def grouped_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """Multiplies each block with the kernel of its expert; empty slots give 0.

    `jax.lax.ragged_dot` does it on TPUs. Elsewhere XLA makes of that a product of all rows with all kernels.

    Args:
        rows: f[n, b, I]; 0 in empty slots.
        kernels: f[E, I, O].
        blocks: of the n blocks.

    Returns:
        f[n, b, O].
    """
    if sharding.platform() == "tpu":
        return ragged_product(rows, kernels, blocks)
    return block_product(rows, kernels, blocks)


def ragged_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """`grouped_product` by `jax.lax.ragged_dot`."""
    count, size, inputs = rows.shape
    flat = jax.lax.ragged_dot(rows.reshape(-1, inputs), kernels, blocks.per_expert * size)
    return flat.reshape(count, size, -1)


@jax.custom_vjp
def block_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """`grouped_product`, one block after another, and of a block not much more than its rows.

    The gradient keeps rows and kernels alone; that of a loop would keep a kernel a block.
    """
    return _multiply(False)(rows, kernels, blocks.experts, blocks.filled)


def _forward(rows: Array, kernels: Array, blocks: Blocks) -> tuple[Array, tuple[Array, Array, Blocks]]:
    return block_product(rows, kernels, blocks), (rows, kernels, blocks)


def _backward(kept: tuple[Array, Array, Blocks], gradient: Array) -> tuple[Array, Array, None]:
    rows, kernels, blocks = kept
    rows_gradient = _multiply(True)(gradient, kernels, blocks.experts, blocks.filled)
    kernel_gradient = _sum_of_products(rows, gradient, blocks.filled, blocks.per_expert)
    return rows_gradient, kernel_gradient, None


block_product.defvjp(_forward, _backward)


@functools.cache
def _multiply(transposed: bool) -> Callable[..., Array]:
    """A function (rows f[n, b, I], kernels f[E, I, O], experts i32[n], filled i32[n]) -> f[n, b, O]."""

    @jax.custom_batching.custom_vmap
    def multiply(rows: Array, kernels: Array, experts: Array, filled: Array) -> Array:
        def one(block: tuple[Array, Array, Array]) -> Array:
            own, expert, count = block

            def product(own: Array) -> Array:
                kernel = jax.lax.dynamic_index_in_dim(kernels, expert, keepdims=False)
                return own @ (kernel.T if transposed else kernel)

            return _first_rows(lambda size: jnp.pad(product(own[:size]), ((0, own.shape[0] - size), (0, 0))),
                               count, own.shape[0])

        return jax.lax.map(one, (rows, experts, filled))

    @multiply.def_vmap
    def _stacked(count: int, batched: list[bool], rows: Array, kernels: Array, experts: Array, filled: Array
                 ) -> tuple[Array, bool]:
        """All networks' blocks in one loop: under a plain `vmap` each would compute every choice of rows."""
        rows, experts, filled = _of_each(count, (batched[0], *batched[2:]), (rows, experts, filled))
        if batched[1]:
            experts = experts + kernels.shape[1] * jnp.arange(count, dtype=experts.dtype)[:, None]
            kernels = kernels.reshape(-1, *kernels.shape[2:])
        out = multiply(rows.reshape(-1, *rows.shape[2:]), kernels, experts.reshape(-1), filled.reshape(-1))
        return out.reshape(*rows.shape[:2], *out.shape[1:]), True

    return multiply


@jax.custom_batching.custom_vmap
def _sum_of_products(rows: Array, others: Array, filled: Array, per_expert: Array) -> Array:
    """Products of blocks f[n, b, I], f[n, b, O], summed over those of each expert: f[E, I, O]."""
    slots = rows.shape[1]

    def product(block: Array) -> Array:
        one, other = (jax.lax.dynamic_index_in_dim(each, block, keepdims=False) for each in (rows, others))
        return _first_rows(lambda size: one[:size].T @ other[:size], filled[block], slots)

    def of_expert(expert: tuple[Array, Array]) -> Array:
        start, count = expert
        first = jax.lax.cond(count > 0, lambda: product(start),
                             lambda: _zeros((rows.shape[2], others.shape[2]), rows.dtype, count))
        return jax.lax.fori_loop(1, count, lambda number, total: total + product(start + number), first)

    return jax.lax.map(of_expert, (jnp.cumsum(per_expert) - per_expert, per_expert))


@_sum_of_products.def_vmap
def _stacked_sums(count: int, batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
    return jax.lax.map(lambda each: _sum_of_products(*each), _of_each(count, batched, arrays)), True


def _of_each(count: int, batched: Sequence[bool], arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Gives the arrays that all networks share an axis of networks."""
    return tuple(each if own else jnp.broadcast_to(each, (count, *each.shape))
                 for each, own in zip(arrays, batched, strict=True))


def _first_rows(compute: Callable[[int], Array], count: Array, slots: int) -> Array:
    """Calls `compute(size)` with the least of at most `SIZES` sizes that holds `count` of the slots' rows."""
    step = min(slots, max(LEAST, slots // SIZES))
    shape = jax.eval_shape(lambda: compute(slots))
    branches = [functools.partial(_zeros, shape.shape, shape.dtype, count)]
    branches += [functools.partial(compute, size) for size in (*range(step, slots, step), slots)]
    return jax.lax.switch((count + step - 1) // step, branches)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, like: Array) -> Array:
    """Zeros that `jax.shard_map` takes for different on every device, as the number i32[] `like` is."""
    return jnp.full(shape, like * 0, dtype)
