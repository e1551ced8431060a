"""The attention core and its hand-written gradients against plain softmax attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.models.blocks.attention import add_biases, attend
from elm_jax.models.layers.dense import activate
from elm_jax.models.layers.recompute import recomputed

RNG = np.random.default_rng(0)
QUERIES, KEYS, VALUES = (
    RNG.normal(size=(2, length, 3, 4)).astype(np.float32) for length in (5, 7, 7)
)
BIASES = (
    RNG.normal(size=(1, 3, 5, 7)).astype(np.float32),
    np.where(RNG.random((2, 1, 1, 7)) < 0.3, -1e10, 0.0).astype(np.float32),
)
KEEP = (RNG.random((2, 3, 1, 7)) < 0.7).astype(np.float32) / 0.7


def plain_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, biases: tuple, keep: jax.Array | None
) -> jax.Array:
    """The definition, one product after the other."""
    logits = jnp.einsum("bqhk,bshk->bhqs", queries, keys)
    for bias in biases:
        logits = logits + bias
    probabilities = jax.nn.softmax(logits, axis=-1)
    if keep is not None:
        probabilities = probabilities * keep
    return jnp.einsum("bhqs,bshk->bqhk", probabilities, values)


@pytest.mark.parametrize("keep", [None, KEEP])
def test_value_and_gradients_equal_plain_attention(keep: np.ndarray | None) -> None:
    weights = RNG.normal(size=(2, 5, 3, 4)).astype(np.float32)

    def total(function: object) -> object:
        return lambda *arguments: (function(*arguments, keep) * weights).sum()

    arguments = (QUERIES, KEYS, VALUES, BIASES)
    (value, gradients), (expected_value, expected) = (
        jax.jit(jax.value_and_grad(total(function), argnums=(0, 1, 2, 3)))(*arguments)
        for function in (attend, plain_attention))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (1, 1, 5, 7)])
def test_gradient_of_a_shared_bias_is_its_sum(shape: tuple[int, ...]) -> None:
    logits = RNG.normal(size=(2, 3, 5, 7)).astype(np.float32)
    weights = RNG.normal(size=(2, 3, 5, 7)).astype(np.float32)
    bias = RNG.normal(size=shape).astype(np.float32)
    gradient = jax.grad(lambda bias: (add_biases(logits, (bias, bias)) * weights).sum())(bias)
    shared = tuple(axis for axis in range(4) if shape[axis] == 1)
    np.testing.assert_allclose(
        gradient, 2 * weights.sum(axis=shared, keepdims=True), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("names", [("gelu", "linear"), ("relu",), ("gelu",)])
def test_activation_gradient_is_computed_again_and_right(names: tuple[str, ...]) -> None:
    parts = [RNG.normal(size=(2, 3, 4)).astype(np.float32) for _ in names]
    functions = {"gelu": lambda x: jax.nn.gelu(x), "relu": jax.nn.relu, "linear": lambda x: x}

    def plain(parts: list[jax.Array]) -> jax.Array:
        product = functions[names[0]](parts[0])
        return (product * parts[1] if len(parts) > 1 else product).sum()

    found = jax.grad(lambda parts: activate(names, parts).sum())(parts)
    for ours, expected in zip(found, jax.grad(plain)(parts), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_probabilities_are_not_kept_for_the_backward_pass() -> None:
    """Compiled memory of six layers: one array f32[1, 2, 256, 256] each is spared, on CPU too."""
    x = jnp.ones((1, 256, 2, 8))

    def temporaries(attention: object) -> int:
        def loss(x: jax.Array) -> jax.Array:
            for _ in range(6):
                x = x + attention(x, x, x, (jnp.zeros((1, 2, 256, 256)),), None)
            return x.sum()

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    spared = temporaries(plain_attention) - temporaries(attend)
    assert spared > 4 * (2 * 256 * 256 * 4)


def test_recomputed_passes_on_what_is_not_a_number_and_nothing_else() -> None:
    function = recomputed(num_tied=1)(jnp.sin)
    x = jnp.asarray([0.1, 0.2, 0.3])
    _, pull = jax.vjp(function, x)
    (gradient,) = pull(jnp.asarray([1.0, jnp.inf, jnp.nan]))
    np.testing.assert_allclose(gradient[0], np.cos(0.1), rtol=1e-6)
    assert np.isposinf(gradient[1])
    assert np.isnan(gradient[2])


def test_gradients_of_stacked_queries() -> None:
    """vmap over a leading axis of experts."""
    stacked = np.stack([QUERIES, 2 * QUERIES, -QUERIES])

    @jax.jit
    def gradient(queries: jax.Array) -> jax.Array:
        return jax.grad(lambda queries: attend(queries, KEYS, VALUES, BIASES, None).sum())(queries)

    together = jax.vmap(gradient)(stacked)
    for queries, found in zip(stacked, together, strict=True):
        np.testing.assert_allclose(found, gradient(queries), rtol=0, atol=1e-5)
