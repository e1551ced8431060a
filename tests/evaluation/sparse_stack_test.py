"""Full experts of a sparse base, stacked over a mesh whose expert axis the stack takes."""

import jax
import numpy as np
import sparse_networks as sparse

from elm_jax.evaluation.stacked_evaluator import put_rows, put_stack
from elm_jax.models.adapters.stacked import GroupedNetwork
from elm_jax.runtime import sharding
from elm_jax.types import Padded


def test_a_stack_of_full_experts_scores_as_each_of_them():
    network = sparse.network("decoder")
    experts = [sparse.parameters(network, seed) for seed in (1, 2)]
    rng = np.random.default_rng(0)
    inputs = Padded(rng.integers(4, 60, (4, 9)).astype(np.int32), np.array([9, 3, 5, 9], np.int32))
    targets = Padded(rng.integers(4, 60, (4, 2, 5)).astype(np.int32),
                     np.array([[5, 2], [3, 1], [4, 0], [5, 5]], np.int32))
    mesh = sharding.make_mesh(2, 1, 2)
    many = put_stack(network, experts[0], experts, mesh)
    rows = jax.tree.map(lambda leaf: put_rows(np.concatenate([leaf, leaf]), mesh), (inputs, targets))
    found = jax.jit(GroupedNetwork(network, 2).target_log_probs)(many, *rows)
    score = jax.jit(network.target_log_probs)
    expected = np.concatenate([score(each, inputs, targets) for each in experts])
    np.testing.assert_allclose(found, expected, atol=1e-5)
