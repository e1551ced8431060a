"""Layers against the formulas they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from elm_jax.models.layers.dense import Dense, Dropout, Embed, RMSNorm
from elm_jax.models.t5.relative_bias import RelativePositionBias, distance_buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 512)])
def test_buckets_equal_transformers(
    bidirectional: bool, num_buckets: int, max_distance: int
) -> None:
    distances = np.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional, num_buckets, max_distance
    ).numpy()
    found = distance_buckets(
        distances, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("length", [1, 2, 9, 160])
def test_bias_by_index_and_by_position_is_the_table_at_the_bucket(
    bidirectional: bool, length: int
) -> None:
    module = RelativePositionBias(3, 32, 128, bidirectional)
    table = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    variables = {"params": {"rel_embedding": table}}
    positions = np.arange(length)
    buckets = distance_buckets(
        positions[None, :] - positions[:, None], bidirectional=bidirectional, num_buckets=32,
        max_distance=128,
    )
    by_index = module.apply(variables, length)
    np.testing.assert_array_equal(by_index[0], table[:, buckets])
    rows = np.stack([positions, positions + 5]).astype(np.int32)
    by_position = module.apply(variables, length, rows)
    np.testing.assert_array_equal(by_position, np.broadcast_to(by_index, by_position.shape))


def test_gradient_of_the_bias_counts_the_bucket() -> None:
    module = RelativePositionBias(1, 32, 128, True)
    table = jnp.zeros((1, 32))
    weights = np.random.default_rng(0).normal(size=(1, 1, 40, 40)).astype(np.float32)
    gradient = jax.grad(
        lambda table: (module.apply({"params": {"rel_embedding": table}}, 40) * weights).sum()
    )(table)
    index = np.arange(40)
    buckets = distance_buckets(
        index[None, :] - index[:, None], bidirectional=True, num_buckets=32, max_distance=128
    )
    expected = np.bincount(buckets.ravel(), weights.ravel().astype(np.float64), minlength=32)
    np.testing.assert_allclose(gradient[0], expected, rtol=0, atol=1e-4)


def test_rms_norm_in_float32_for_large_bfloat16() -> None:
    x = (np.random.default_rng(0).normal(size=(2, 3, 16)) * 3e4).astype(np.float32)
    scale = np.linspace(0.5, 2.0, 16, dtype=np.float32)
    module = RMSNorm(jnp.dtype("bfloat16"))
    found = module.apply({"params": {"scale": scale}}, jnp.asarray(x, jnp.bfloat16))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8)


def test_rms_norm_epsilon() -> None:
    x = np.full((1, 4), 1e-3, np.float32)
    found = RMSNorm(jnp.dtype("float32")).apply({"params": {"scale": np.ones(4, np.float32)}}, x)
    np.testing.assert_allclose(found, 1e-3 / np.sqrt(2e-6), rtol=1e-5)


def test_a_token_outside_of_the_vocabulary_is_not_a_number() -> None:
    module = Embed(4, 3, jnp.dtype("float32"))
    variables = {"params": {"embedding": np.ones((4, 3), np.float32)}}
    rows = module.apply(variables, np.array([[3, 4]], np.int32))
    assert np.all(np.isfinite(rows[0, 0])) and np.all(np.isnan(rows[0, 1]))


@pytest.mark.parametrize("width", [4, 8])
def test_gradient_of_a_narrow_kernel(width: int) -> None:
    """Of at most half as many outputs as inputs, and of more; for one expert and for two of a stack."""
    draw = np.random.default_rng(0)
    x, kernels, slope = (draw.normal(size=size) for size in ((2, 3, 8), (2, 8, width), (2, 3, width)))

    def product(x, kernel, slope):
        layer = Dense(width, ("embed", "mlp"), jnp.dtype("float32"), gradient_by_outputs=True)
        return jnp.sum(slope * layer.apply({"params": {"kernel": kernel}}, x))

    gradients = jax.vmap(jax.grad(product, argnums=(0, 1)), in_axes=(None, 0, None))
    of_x, of_kernel = gradients(*map(jnp.float32, (x, kernels, slope)))
    np.testing.assert_allclose(of_x, np.einsum("blo,eio->ebli", slope, kernels), rtol=1e-5, atol=1e-5)
    expected = np.einsum("bli,blo->io", x, slope)
    np.testing.assert_allclose(of_kernel, np.stack([expected, expected]), rtol=1e-5, atol=1e-5)


def test_dropout_rate_scale_and_shared_positions() -> None:
    x = jnp.ones((8, 5, 1000))
    y = Dropout(0.25).apply({}, x, False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(np.unique(y), [0.0, 4 / 3], rtol=1e-6)
    assert abs(np.mean(np.asarray(y) == 0.0) - 0.25) < 0.02
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert np.any(y[0] != y[1])
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x, True), x)
