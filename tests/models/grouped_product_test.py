"""Products of blocks with their expert's kernel: `jax.lax.ragged_dot`, Pallas's kernel for TPUs, a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.models.blocks import dispatch, grouped_product
from elm_jax.models.layers import gates
from elm_jax.models.layers.sparse_config import SparseConfig

E, I, O = 5, 8, 6  # noqa: E741
SPLITS = {"even": [4, 4, 4, 4, 4], "one expert": [0, 0, 20, 0, 0], "uneven": [1, 0, 13, 5, 1],
          "nobody": [0, 0, 0, 0, 0]}


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def blocks_of(split, size=8):
    """Slots and blocks of 20 tokens, of which so many choose each expert and the others are padding."""
    experts = np.repeat(np.arange(E), split)
    logits = jnp.zeros((1, 20, E)).at[0, np.arange(len(experts)), experts].set(5.0)
    choices = gates.choose_by_tokens(logits, jnp.arange(20)[None] < len(experts), SparseConfig(E), None)
    return dispatch.block_slots(choices, E, size)


@pytest.mark.parametrize("split", SPLITS)
def test_blocks_are_as_full_as_their_experts(split):
    """Each row once, in a block of its expert, those without rows last."""
    slots, blocks = blocks_of(SPLITS[split])
    total = np.zeros(E, int)
    for number, (expert, filled) in enumerate(zip(blocks.experts, blocks.filled, strict=True)):
        rows = np.asarray(slots.choice_in[8 * number:8 * number + 8])
        assert np.all((rows < 20) == (np.arange(8) < filled))
        total[expert] += filled
    np.testing.assert_array_equal(total, SPLITS[split])
    np.testing.assert_array_equal(blocks.per_expert, -(-np.array(SPLITS[split]) // 8))
    used = np.asarray(blocks.filled) > 0
    assert used.sum() == blocks.per_expert.sum() and not np.any(used[used.sum():])


@pytest.mark.parametrize("split", SPLITS)
def test_it_is_ragged_dot(split):
    """Values and both gradients, where rows are: what TPUs compute, and a loop over blocks in float64."""
    slots, blocks = blocks_of(SPLITS[split])
    rows, kernels = dispatch.to_slots(draw(20, I), slots).reshape(-1, 8, I), draw(E, I, O, seed=1)
    share = draw(*rows.shape[:2], O, seed=2) * (slots.choice_in < 20).reshape(-1, 8, 1)

    def both(product):
        return jax.jit(jax.value_and_grad(
            lambda rows, kernels: jnp.sum(product(rows, kernels, blocks) * share), (0, 1)))(rows, kernels)

    ours, theirs = both(grouped_product.block_product), both(grouped_product.ragged_product)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    expected = np.stack([np.float64(own) @ np.float64(kernels[expert])
                         for own, expert in zip(rows, blocks.experts, strict=True)])
    for product in (grouped_product.block_product, grouped_product.ragged_product):
        np.testing.assert_allclose(product(rows, kernels, blocks), expected, atol=1e-5)
    kernel_gradient = np.zeros((E, I, O))
    for own, out, expert in zip(np.float64(rows), np.float64(share), blocks.experts, strict=True):
        kernel_gradient[expert] += own.T @ out
    np.testing.assert_allclose(ours[1][1], kernel_gradient, atol=1e-5)


def test_batched_products_are_einsums():
    """Values and gradients of the forms that the CPU is fast in."""
    rows, kernels, share = draw(E, 7, I), draw(E, I, O, seed=1), draw(E, 7, O, seed=2)
    ours = jax.value_and_grad(lambda *both: jnp.sum(grouped_product.batched_product(*both) * share), (0, 1))
    value, (rows_gradient, kernel_gradient) = jax.jit(ours)(rows, kernels)
    rows, kernels, share = (np.float64(each) for each in (rows, kernels, share))
    np.testing.assert_allclose(value, np.sum(np.einsum("eci,eio->eco", rows, kernels) * share), rtol=1e-5)
    np.testing.assert_allclose(rows_gradient, np.einsum("eco,eio->eci", share, kernels), atol=1e-5)
    np.testing.assert_allclose(kernel_gradient, np.einsum("eci,eco->eio", rows, share), atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared kernels", "own kernels"])
def test_blocks_of_stacked_networks(shared):
    """Under `vmap`, by each network's own split: values and gradients of plain calls."""
    splits = [SPLITS["uneven"], SPLITS["one expert"], SPLITS["nobody"]]
    found = [blocks_of(split) for split in splits]
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[each for _, each in found])
    rows = jnp.stack([dispatch.to_slots(draw(20, I, seed=seed), slots).reshape(-1, 8, I)
                      for seed, (slots, _) in enumerate(found)])
    kernels = draw(E, I, O, seed=7) if shared else draw(3, E, I, O, seed=7)

    def one(rows, kernels, blocks):
        return jnp.sum(jnp.square(grouped_product.block_product(rows, kernels, blocks)))

    step = jax.value_and_grad(one, (0, 1))
    stacked = jax.jit(jax.vmap(step, (0, None if shared else 0, 0)))(rows, kernels, blocks)
    for number in range(3):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], (rows, blocks))
        alone = step(own[0], kernels if shared else kernels[number], own[1])
        for one_leaf, other in zip(jax.tree.leaves(stacked), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one_leaf[number], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("choices", "experts", "rows"), [
    (1, 16, 8), (128, 16, 8), (129, 16, 8), (2048, 16, 128), (2048, 64, 32), (1 << 20, 4, 128)])
def test_rows_of_a_block(choices, experts, rows):
    """About an expert's share."""
    assert dispatch.block_rows(choices, experts) == rows
