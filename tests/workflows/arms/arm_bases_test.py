"""Bases of arms: other gates on a base, and a new task's vector."""

import dataclasses

import jax
import numpy as np
import pytest

from elm_jax.experts.base import Base
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import TASK_TABLE
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import trees
from elm_jax.workflows.arms.arm_bases import regated
from elm_jax.workflows.arms.new_task_vectors import DRAWN, RELATED, with_vector

TOKEN = SparseConfig(num_experts=4, step=1)
BOTH = dataclasses.replace(TOKEN, gate="both", tasks=("a", "b", "c"), task_dim=3)
T5 = T5Config(vocab_size=50, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1,
              num_decoder_layers=1, sparse=TOKEN)


@pytest.fixture(scope="module")
def params():
    return T5Network(T5).init(jax.random.key(0))


def test_gates_that_read_both_begin_as_gates_that_read_tokens(params):
    network = T5Network(dataclasses.replace(T5, sparse=BOTH))
    other = regated(params, network, seed=1)
    rng = np.random.default_rng(0)
    batch = {"encoder_input_tokens": rng.integers(2, 50, (3, 8), np.int32),
             "decoder_input_tokens": rng.integers(2, 50, (3, 4), np.int32)}
    found = network.logits(other, {**batch, "task_ids": np.asarray([0, 1, 2], np.int32)})
    np.testing.assert_array_equal(found, T5Network(T5).logits(params, batch))
    own, known = trees.flatten(other), trees.flatten(params)
    assert all(np.array_equal(own[path], leaf) for path, leaf in known.items())
    assert own.keys() - known.keys() and TASK_TABLE in own


def test_a_new_task_gets_a_vector_of_those_that_were_trained(params):
    config = dataclasses.replace(T5, sparse=BOTH)
    other = regated(params, T5Network(config), seed=1)
    base = Base("base", other, config, trees.fingerprint(other))
    table = np.asarray(trees.flatten(other)[TASK_TABLE])
    made = with_vector(base, "c", ("a", "b"), RELATED, seed=0)
    found = trees.flatten(made.params)[TASK_TABLE]
    np.testing.assert_allclose(found[2], (table[0] + table[1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(found[:2], table[:2])
    assert made.fingerprint != base.fingerprint
    np.testing.assert_array_equal(trees.flatten(base.params)[TASK_TABLE], table)
    drawn = [trees.flatten(with_vector(base, "c", ("a", "b"), DRAWN, seed=seed).params)[TASK_TABLE][2]
             for seed in (0, 1)]
    size = np.linalg.norm(table[:2], axis=1).mean()
    assert [np.linalg.norm(each) for each in drawn] == pytest.approx([size, size], rel=1e-5)
    assert not np.allclose(*drawn)
