"""A function for float32 that is evaluated in float64: the same as with float64 arguments."""

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.workflows.convert.float64_logits import in_float64


def function(params, batch):
    """What networks are made of: products, norms, softmax, activations, loops, choices, whole numbers."""
    x = params["embedding"][batch["tokens"]] * 0.5

    def layer(x, weights):
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 0.25)
        products = normed @ jnp.swapaxes(normed, -1, -2)
        scores = jax.nn.softmax(jnp.where(batch["mask"], products, -1e10), axis=-1)
        hidden = jax.nn.relu(normed @ weights) + jnp.tanh(normed @ weights)
        return x + scores @ hidden + jax.nn.silu(x), x.sum()

    x, sums = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    _, back = jax.lax.scan(layer, x, params["layers"], reverse=True)
    x = jax.lax.cond(batch["tokens"][0, 0] > 1, jnp.sin, jnp.cos, x)
    table = params["embedding"]
    return jax.jit(lambda x: x.astype(table.dtype) @ table.T)(x) + (sums + back).sum()


def test_it_is_the_function_itself_with_float64_arguments():
    draw = np.random.default_rng(0)
    params = {"embedding": draw.standard_normal((7, 4)).astype(np.float32),
              "layers": draw.standard_normal((3, 4, 4)).astype(np.float32)}
    batch = {"tokens": np.array([[2, 3, 6], [1, 1, 5]], np.int32), "mask": np.tri(3, dtype=bool)[None]}
    found = in_float64(function, params, batch)
    narrow = np.asarray(function(params, batch))
    with jax.enable_x64(True):
        wanted = np.asarray(function(jax.tree.map(lambda leaf: leaf.astype(np.float64), params), batch))
    assert found.dtype == wanted.dtype == np.float64 and narrow.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert 1e-8 < np.abs(narrow - wanted).max() / np.abs(wanted).max() < 1e-4
    assert not jax.config.jax_enable_x64
