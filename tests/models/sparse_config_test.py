"""Settings of sparse layers that conversions need: a fixed capacity, and the steps of given layers."""

import dataclasses

import pytest

from elm_jax.errors import InputError
from elm_jax.models.layers import gates
from elm_jax.models.layers.sparse_config import SparseConfig, sparse_of, steps_of


@pytest.mark.parametrize(("settings", "words"), [
    ({"capacity": 4}, "no effect[^$]*capacity_factor and eval_capacity_factor"),
    ({"capacity": 4, "capacity_factor": None, "eval_capacity_factor": 2.0}, "no effect"),
    ({"capacity": 0, "capacity_factor": None}, "SparseConfig.capacity[^$]*from 1"),
    ({"capacity": 2.5, "capacity_factor": None}, "SparseConfig.capacity[^$]*2.5"),
    ({"capacity": 4, "capacity_factor": None, "choice": "experts"}, "for choice='experts'"),
    ({"capacity_factor": None, "order": "probability"}, "a capacity_factor or a capacity"),
    ({"jitter": 0.1, "gate": "task", "tasks": ("a",), "task_dim": 2}, "jitter[^$]*reads tokens"),
])
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SparseConfig(8, **settings)


def test_a_fixed_capacity_holds_while_training_and_outside_of_it():
    sparse = SparseConfig(8, capacity=3, capacity_factor=None, order="probability")
    assert sparse_of(sparse.to_dict()) == sparse and sparse.drops_in_use
    for training in (True, False):
        assert [gates.capacity(sparse, tokens, training) for tokens in (1, 3, 400)] == [1, 3, 3]
    assert not dataclasses.replace(sparse, capacity=None, order="position").drops_in_use


@pytest.mark.parametrize(("layers", "found"), [
    ((range(1, 12, 2), 12, range(1, 12, 2), 12), {"step": 2, "offset": "t5x"}),
    (((3, 7, 11), 12, (1, 3), 4), {"step": 4, "offset": "t5x", "decoder_step": 2}),
    (((1, 5, 9), 12, (1, 5, 9), 12), {"step": 4, "offset": "hf"}),
    ((range(3), 3), {"step": 1, "offset": "t5x"}),
    (((), 4, (3,), 4), {"step": 0, "offset": "t5x", "decoder_step": 4}),
    (((2, 6), 8), {"step": 4, "offset": 2}),
    (((0,), 2), {"step": 2, "offset": 0}),
    (((1, 2), 4), None), (((0, 1, 3), 4), None), (((1, 3), 4, (0, 2), 4), None),
])
def test_steps_of_given_layers(layers, found):
    assert steps_of(*layers) == found


def test_every_pattern_of_one_stack_is_found():
    for count in range(1, 9):
        for step in range(1, count + 1):
            for offset in ("t5x", "hf", *range(step)):
                sparse = SparseConfig(1, step=step, offset=offset)
                layers = [layer for layer in range(count) if sparse.is_sparse(layer)]
                again = SparseConfig(1, **steps_of(layers, count))
                assert [layer for layer in range(count) if again.is_sparse(layer)] == layers
