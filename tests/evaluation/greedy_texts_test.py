"""Generation against the argmax of a full forward pass a token."""

import jax
import numpy as np
from t5_rows import rows
from tiny_model import generation_rows, network, parameters, vocabulary

from elm_jax.data.arrays.batches import pad
from elm_jax.evaluation.greedy_texts import generate
from elm_jax.runtime import sharding
from elm_jax.types import Padded

STEPS = 7


def test_generation_equals_step_by_step_argmax() -> None:
    net = network()
    params = parameters(net)
    inputs = pad([row["inputs"] for row in generation_rows(8)], 48, 0)
    logits = jax.jit(net.logits)
    written = np.zeros((8, STEPS + 1), np.int32)
    for step in range(STEPS):
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": written}
        written[:, step + 1] = np.asarray(logits(params, batch))[:, step].argmax(axis=-1)
    expected = [vocabulary().decode(row) for row in written[:, 1:]]
    assert len(set(expected)) > 2, "else any text would do"
    mesh = sharding.make_mesh(4, 2)
    placed = Padded(*sharding.put_batch(dict(enumerate(rows(inputs)[:2])), mesh).values())
    put = sharding.put_tree(params, sharding.tree_shardings(net.logical_axes(), params, mesh))
    found = generate(net, put, placed, max_new_tokens=STEPS, vocabulary=vocabulary())
    assert found == expected
