"""Products of rows with their expert's kernel, for rows sorted by expert in blocks: no capacity, no dropping.

`jax.lax.ragged_dot` says the same and is fast on TPUs; elsewhere XLA multiplies all rows with all kernels.
"""

import functools

import jax
import jax.numpy as jnp

from elm_jax.models.blocks.dispatch import Blocks
from elm_jax.types import Array


def grouped_product(rows: Array, kernels: Array, blocks: Blocks) -> Array:
    """Multiplies each block with the kernel of its expert; unused blocks give 0.

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
                                  lambda: _zeros(shape, blocks))

    return jax.lax.scan(one, None, (jnp.arange(rows.shape[0]), blocks.experts, rows))[1]


def _zeros(like: Array | jax.ShapeDtypeStruct, blocks: Blocks) -> Array:
    """Zeros that `jax.shard_map` counts among what is different on every device, as the blocks are."""
    return jnp.full(like.shape, blocks.used * 0, like.dtype)


def _forward(rows: Array, kernels: Array, blocks: Blocks) -> tuple[Array, tuple[Array, Array, Blocks]]:
    return block_product(rows, kernels, blocks), (rows, kernels, blocks)


def _backward(kept: tuple[Array, Array, Blocks], gradient: Array) -> tuple[Array, Array, None]:
    rows, kernels, blocks = kept
    rows_gradient = _each_block(gradient, kernels, blocks, lambda own, kernel: own @ kernel.T)

    def one(total: Array, block: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        number, expert, own, out = block
        part = jax.lax.cond(number < blocks.used, lambda: own.T @ out, lambda: _zeros(total[0], blocks))
        before = jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + part, expert, 0), None

    parts = (jnp.arange(rows.shape[0]), blocks.experts, rows, gradient)
    return rows_gradient, jax.lax.scan(one, _zeros(kernels, blocks), parts)[0], None


block_product.defvjp(_forward, _backward)
