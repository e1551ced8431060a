"""The sparse feed-forward against a float64 loop over tokens, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_loop import as_float64, sparse_loop

from elm_jax.models.blocks.feed_forward import Mlp
from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers.sparse_config import SparseConfig

B, L, D, F, T = 4, 6, 5, 7, 3
GATED, PLAIN = ("gelu", "linear"), ("relu",)
TASKS = {"tasks": ("a", "b"), "task_dim": T}
CASES = {
    "switch": {},
    "tight": {"capacity_factor": 0.5, "min_capacity": 1},
    "top 2": {"experts_per_token": 2, "capacity_factor": 0.6, "min_capacity": 1},
    "top 2 without factor K": {"experts_per_token": 2, "capacity_factor": 1.0, "min_capacity": 2,
                               "capacity_counts_choices": False, "group_rows": 2},
    "top 2 renormalised": {"experts_per_token": 2, "capacity_factor": 0.6, "min_capacity": 1,
                           "normalize_gates": True, "order": "choice", "group_rows": 2},
    "top 3 by probability": {"experts_per_token": 3, "capacity_factor": 0.4, "min_capacity": 1,
                             "order": "probability", "group_rows": 3},
    "top 1 by probability": {"capacity_factor": 0.7, "min_capacity": 1, "order": "probability"},
    "one group": {"capacity_factor": 0.5, "min_capacity": 1, "group_rows": 8},
    "no dropping": {"experts_per_token": 2, "capacity_factor": None, "normalize_gates": True},
    "fixed places": {"experts_per_token": 2, "capacity_factor": None, "capacity": 2, "group_rows": 2},
    "no dropping, raw": {"experts_per_token": 3, "capacity_factor": None},
    "task": {"gate": "task", "capacity_factor": 0.9, "min_capacity": 1, **TASKS},
    "both": {"gate": "both", "experts_per_token": 2, "capacity_factor": 0.7, "min_capacity": 1, **TASKS},
    "experts": {"choice": "experts", "capacity_factor": 1.3, "eval_capacity_factor": 2.0, "min_capacity": 1},
    "experts renormalised": {"choice": "experts", "capacity_factor": 0.9, "eval_capacity_factor": 8.0,
                             "min_capacity": 1, "normalize_gates": True, "group_rows": 2},
}


def layer_of(settings, activations=GATED, dtype="float32", num_experts=4):
    return SparseMlp(D, F, activations, 0.0, jnp.dtype(dtype), SparseConfig(num_experts, **settings))


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def params_of(layer, seed=0):
    """Random leaves of some size, the router's too: experts of unlike load."""
    task = draw(B, T) if layer.sparse.gate != "token" else None
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), draw(B, L, D), True, None, task))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    made = [draw(*leaf.shape, seed=seed + 7 * number) * leaf.shape[-2]**-0.5
            for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(layer, params, x, training, real=None, task=None):
    """The output and the layer's sums."""
    rngs = {"dropout": jax.random.key(0)} if training else None
    y, sown = layer.apply({"params": params}, x, not training, real, task, rngs=rngs, mutable=["router"])
    return y, sown["router"]["sums"]


def some_padding():
    return jnp.array([[True] * L, [True] * 4 + [False] * 2, [False] * 2 + [True] * 4, [False] * L])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop(case, padded, training):
    """Outputs and sums, over gates, K, capacities, orders, groups."""
    layer = layer_of(CASES[case])
    params, x, task = params_of(layer), draw(B, L, D, seed=3), draw(B, T, seed=4)
    real = some_padding() if padded else None
    task = task if layer.sparse.gate != "token" else None
    y, sums = apply(layer, params, x, training, real, task)
    found = sparse_loop(x, params, layer.sparse, GATED, training, real, task)
    np.testing.assert_allclose(y, found.y, atol=2e-6)
    for name, value in sums._asdict().items():
        np.testing.assert_allclose(value, found.sums[name], rtol=1e-5, err_msg=name)


def test_the_cases_drop_and_fill():
    """What the loop is compared on holds drops in training, and none outside."""
    for name, settings in CASES.items():
        layer = layer_of(settings)
        task = draw(B, T, seed=4) if layer.sparse.gate != "token" else None
        dropped = [apply(layer, params_of(layer), draw(B, L, D, seed=3), training, None, task)[1].dropped
                   for training in (True, False)]
        assert (dropped[1] == 0) == (layer.sparse.capacity is None), name
        assert (dropped[0] > 0) == (name not in ("switch", "no dropping", "no dropping, raw")), name
