"""Loss of targets in nats a token: as training counts it, whatever the kind of task and the batches."""

import family_rows
import numpy as np
import pytest
import tiny_model as tiny

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.evaluation.target_loss import target_loss
from elm_jax.runtime import sharding

SETTINGS = EvaluationSettings(source_length=16, max_new_tokens=8, tokens_per_batch=96)
ROWS = {"generation": tiny.generation_rows(count=7), "rank": tiny.rank_rows(count=7)}


def rows_of(config, kind):
    """Rows whose tokens a small vocabulary has."""
    def within(tokens):
        return np.append(tokens[:-1] % (config.vocab_size - 4) + 4, config.eos_id).astype(np.int32)

    return [{**row, "inputs": within(row["inputs"]), "targets": within(row["targets"]),
             **({"choices": list(map(within, row["choices"]))} if kind == "rank" else {})}
            for row in ROWS[kind]]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["t5 1.1", "llama"])
def test_it_is_the_loss_of_training_over_all_target_tokens(name, kind):
    """Against the network's own loss of a training batch, which holds the rows in another form."""
    network, params = family_rows.network_and_params(name)
    split = tiny.split_of(rows_of(network.config, kind), kind)
    form = form_of(network)
    examples = [(split.inputs(row), split.targets(row)) for row in range(len(split))]
    sums = network.loss(params, form.make(examples, {"inputs": 16, "targets": 8}, len(split)))
    found = target_loss(network, params, split, SETTINGS, sharding.make_mesh(1, 1))
    assert (found.tokens, found.rows) == (int(sums.weight), 7)
    assert found.loss == pytest.approx(float(sums.loss / sums.weight), rel=1e-5)


def test_a_split_without_rows_is_refused():
    network, params = family_rows.network_and_params("t5 1.1")
    with pytest.raises(InputError, match="nothing to evaluate"):
        target_loss(network, params, tiny.split_of([], "generation"), SETTINGS, sharding.make_mesh(1, 1))
