"""Products of experts' rows with their kernels: as many rows an expert, or blocks of rows sorted by expert.

XLA's CPU backend takes very unlike times for one product in its several forms: those here reach the speed of
one dense product of as many rows. With few rows an expert some forms are five times as slow as others.
"""

import functools

import jax
import jax.numpy as jnp

from elm_jax.models.blocks.dispatch import Blocks
from elm_jax.types import Array


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
    return jax.default_backend() == "cpu"


def grouped_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """Multiplies each block with the kernel of its expert; unused blocks give 0.

    `jax.lax.ragged_dot` says the same and is fast on TPUs; elsewhere XLA multiplies all with all kernels.

    Args:
        rows: f[n, b, I].
        kernels: f[E, I, O].
        blocks: of the n blocks.

    Returns:
        f[n, b, O].
    """
    if jax.default_backend() == "tpu":
        return ragged_product(rows, kernels, blocks)
    return block_product(rows, kernels, blocks)


def ragged_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """`grouped_product` by `jax.lax.ragged_dot`."""
    count, size, inputs = rows.shape
    flat = jax.lax.ragged_dot(rows.reshape(-1, inputs), kernels, blocks.sizes)
    return flat.reshape(count, size, -1)


@jax.custom_vjp
def block_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """`grouped_product`, one block after another.

    Its gradient keeps rows and kernels alone; that of a loop would keep a kernel a block.
    """
    return _each_block(rows, kernels, blocks, jnp.matmul)


def _each_block(rows: Array, kernels: Array, blocks: Blocks, product) -> Array:
    def one(_: None, block: tuple[Array, Array, Array]) -> tuple[None, Array]:
        number, expert, own = block
        kernel = functools.partial(jax.lax.dynamic_index_in_dim, kernels, expert, keepdims=False)
        shape = jax.eval_shape(lambda: product(own, kernel()))
        return None, jax.lax.cond(number < blocks.used, lambda: product(own, kernel()),
                                  lambda: jnp.zeros(shape.shape, shape.dtype))

    return jax.lax.scan(one, None, (jnp.arange(rows.shape[0]), blocks.experts, rows))[1]


def _forward(rows: Array, kernels: Array, blocks: Blocks) -> tuple[Array, tuple[Array, Array, Blocks]]:
    return block_product(rows, kernels, blocks), (rows, kernels, blocks)


def _backward(kept: tuple[Array, Array, Blocks], gradient: Array) -> tuple[Array, Array, None]:
    rows, kernels, blocks = kept
    rows_gradient = _each_block(gradient, kernels, blocks, lambda own, kernel: own @ kernel.T)

    def one(total: Array, block: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        number, expert, own, out = block
        part = jax.lax.cond(number < blocks.used, lambda: own.T @ out, lambda: jnp.zeros_like(total[0]))
        before = jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + part, expert, 0), None

    parts = (jnp.arange(rows.shape[0]), blocks.experts, rows, gradient)
    return rows_gradient, jax.lax.scan(one, jnp.zeros_like(kernels), parts)[0], None


block_product.defvjp(_forward, _backward)
