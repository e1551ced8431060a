"""Pretraining that goes on from a base: its weights, its vocabulary, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import tiny_study

from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.runtime import trees
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.workflows.train.pretrain import PretrainConfig, pretrain


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_study.make_base(tmp_path_factory.mktemp("first"))


def config_of(base, folder, rate=1e-9, **changes):
    return PretrainConfig(**{
        "model_dir": str(folder), "network": tiny_study.NETWORK,
        "passages": ("elm_jax.tasks.embedded:passages",), "initial_checkpoint_path": base.path,
        "train_steps": 1, "batch_size": 4, "task_feature_lengths": tiny_study.LENGTHS, "chunk_length": 32,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=rate), "tensorboard": False, **changes})


def test_it_begins_with_the_base_and_keeps_its_vocabulary(base, tmp_path):
    config = config_of(base, tmp_path / "on")
    found = pretrain(config, mesh=tiny_study.one_device())
    assert found.vocabulary.fingerprint == base.vocabulary.fingerprint
    before, after = trees.flatten(base.params), trees.flatten(load_base(found.path).params)
    for path, leaf in before.items():
        np.testing.assert_allclose(after[path], leaf, atol=1e-7, err_msg=path)
    assert found.fingerprint != base.fingerprint
    again = pretrain(config, mesh=tiny_study.one_device())
    assert again.fingerprint == found.fingerprint


@pytest.mark.parametrize(("changes", "words"), [
    ({"network": dataclasses.replace(tiny_study.NETWORK, mlp_dim=64)}, "mlp_dim: 32 there, 64 here"),
    ({"vocabulary": "other.model"}, "keeps its own vocabulary"),
])
def test_another_network_or_vocabulary_is_refused(base, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        pretrain(config_of(base, tmp_path / "on", **changes), mesh=tiny_study.one_device())
