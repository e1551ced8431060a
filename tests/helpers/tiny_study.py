"""A base and experts of a few thousand parameters, trained for a few steps on embedded tasks."""

import dataclasses
import pathlib

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.experts.base import Base, load_base
from elm_jax.models.t5.config import T5Config
from elm_jax.runtime import sharding
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.workflows.train.pretrain import PretrainConfig, pretrain
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_expert import train

MODULES = ("elm_jax.tasks.embedded",)
TOPIC, REVIEW = "mini_topic__about_what", "mini_review__good_or_bad"
NETWORK = T5Config(vocab_size=1152, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
                   num_encoder_layers=1, num_decoder_layers=1)
LENGTHS = {"inputs": 64, "targets": 16}
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=1e-2)


def one_device():
    """A mesh of one device."""
    return sharding.make_mesh(1, 1)


def make_base(folder: pathlib.Path, seed: int = 0, steps: int = 2) -> Base:
    """A base pretrained for a few steps on the embedded passages."""
    pretrain(PretrainConfig(
        model_dir=str(folder), network=NETWORK, passages=("elm_jax.tasks.embedded:passages",),
        vocab_pieces=1000, train_steps=steps, batch_size=4, task_feature_lengths=LENGTHS,
        chunk_length=32, optimizer=OPTIMIZER, random_seed=seed, tensorboard=False), mesh=one_device())
    return load_base(folder / "base")


def train_config(base: Base, folder: pathlib.Path, **changes) -> TrainConfig:
    """Config of a run of three steps."""
    config = TrainConfig(
        model_dir=str(folder), task=TOPIC, initial_checkpoint_path=base.path, train_steps=3,
        batch_size=4, task_feature_lengths=LENGTHS, optimizer=OPTIMIZER, dropout_rate=0.0,
        modules=MODULES, prepared_dir=str(folder.parent / "prepared"), adapter_bottleneck=4,
        tensorboard=False)
    return dataclasses.replace(config, **changes)


def make_expert(base: Base, folder: pathlib.Path, **changes):
    """An expert of that base."""
    return train(train_config(base, folder, **changes), base=base, mesh=one_device()).expert


def make_data(base: Base, folder: pathlib.Path) -> TaskData:
    """The prepared splits that the experts were trained on."""
    return TaskData(base.vocabulary, MODULES, str(folder / "prepared"))
