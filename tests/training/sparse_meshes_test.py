"""Training of sparse networks on meshes of experts, data and model: the losses of one device."""

import dataclasses
import functools

import numpy as np
import pytest
import sparse_networks as sparse
import tiny_run

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.cursor import TrainStream
from elm_jax.models import T5Config, families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import Layout
from elm_jax.runtime import sharding
from elm_jax.training.loop import fit
from elm_jax.training.run_settings import RunConfig

NUM_STEPS, ROWS = 20, 8
TIGHT = SparseConfig(8, experts_per_token=2, capacity_factor=0.8, min_capacity=1, jitter=0.01,
                     expert_dropout=0.2)
T5 = T5Config(64, 32, 4, 8, 64, 2, 2, dropout_rate=0.1, sparse=TIGHT)
CONFIGS = {
    "t5": T5,
    "decoder": DecoderConfig(64, 32, 4, 2, 8, 64, 2, 64, dropout_rate=0.1, sparse=TIGHT),
    "t5 without drops": dataclasses.replace(
        T5, sparse=dataclasses.replace(TIGHT, capacity_factor=None, group_rows=2)),
    "t5 whose experts choose": dataclasses.replace(T5, sparse=SparseConfig(
        8, choice="experts", capacity_factor=0.8, eval_capacity_factor=1.0, min_capacity=1, decoder_step=0)),
}
LOSSES = LossConfig(balance_loss=0.01, router_z_loss=1e-3)
APART = (("batch", ("data", "experts")),)
"""Rules by which each device of the experts' axis has rows of its own."""
EVERY = (1, 1, 8), (2, 1, 4), (4, 1, 2), (2, 2, 2), (8, 1, 1), (1, 2, 4)
"""Meshes (data, model, experts)."""


@functools.cache
def losses(name, mesh=(1, 1, 1), rules=(), layout=Layout(), parts=1):  # noqa: B008
    network = families.network_of(CONFIGS[name], layout)
    source = TrainStream(tiny_run.CopySource(), form=form_of(network), batch_size=ROWS,
                         lengths=tiny_run.LENGTHS, seed=5, pack=True)
    run = RunConfig(train_steps=NUM_STEPS, random_seed=3, name=None, log_period=1, loss=LOSSES,
                    optimizer=tiny_run.ADAFACTOR, rules=sharding.make_rules(rules), num_microbatches=parts)
    found = fit(network, {}, sparse.parameters(network), source, run, sharding.make_mesh(*mesh))
    return np.array([[row["loss"], row["balance_loss"], row["router_z_loss"]] for row in found.rows])


def check(name, mesh, rules, **options):
    expected, found = losses(name, **options), losses(name, mesh, rules, **options)
    assert len(expected) == NUM_STEPS and np.mean(expected[-3:, 0]) < 0.95 * np.mean(expected[:3, 0])
    np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{name} {mesh} {rules}")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", EVERY, ids=str)
@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_every_mesh_has_the_losses_of_one_device(name, mesh):
    check(name, mesh, APART)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_so_has_a_mesh_whose_experts_share_their_rows(name):
    check(name, (2, 1, 4), ())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5 without drops", "t5 whose experts choose"])
def test_so_have_layers_without_drops_and_those_whose_experts_choose(name):
    check(name, (2, 2, 2), APART)


@pytest.mark.slow
def test_so_have_layouts_and_parts_of_a_batch():
    check("t5", (2, 1, 2), (*APART, ("embed", "data")), layout=Layout("layer", True), parts=2)
