"""A setting has one name from a verb's config down to the loops, and its value arrives there."""

import dataclasses

import pytest
import tiny_run

from elm_jax.errors import InputError
from elm_jax.runtime import sharding
from elm_jax.training.early_end import EarlyEnd
from elm_jax.training.run_settings import RunConfig, RunSettings, StackConfig
from elm_jax.training.stack.slots import StackedRun
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_config import TrainConfig

NAMES = {"model_dir": "runs/a", "checkpoint_period": 11, "keep_checkpoints": 7, "log_period": 5,
         "tensorboard": False, "optimizer": tiny_run.ADAMW, "random_seed": 13}
"""Values that are nobody's defaults, by name."""


def names_of(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


TRAIN = TrainConfig(task="a", initial_checkpoint_path="base", train_steps=3, base_dtype="bfloat16",
                    num_microbatches=2, early_end=EarlyEnd(every=9), **NAMES)
PRETRAIN = PretrainConfig(network=tiny_run.network().config, passages=("text",), train_steps=3, **NAMES)


@pytest.mark.parametrize("config", [TRAIN, PRETRAIN])
def test_every_setting_of_a_verb_arrives_under_its_name(config):
    run = RunConfig.of(config, name="a", config_digest="d")
    assert {name: getattr(run, name) for name in NAMES} == NAMES
    assert (run.train_steps, run.name, run.config_digest) == (3, "a", "d")
    assert run.num_microbatches == getattr(config, "num_microbatches", 1)
    assert run.base_dtype == getattr(config, "base_dtype", None)


def test_a_stack_takes_the_same_settings_but_each_expert_has_its_own_seed_and_length():
    stack = StackConfig.of(TRAIN, size=4, model_dir="runs/stack")
    assert (stack.size, stack.model_dir, stack.early_end) == (4, "runs/stack", EarlyEnd(every=9))
    assert (stack.checkpoint_period, stack.keep_checkpoints, stack.log_period) == (11, 7, 5)
    assert names_of(StackConfig).isdisjoint({"random_seed", "train_steps"})
    assert names_of(StackedRun) >= {"random_seed", "model_dir"}


def test_what_the_caller_gives_comes_before_the_config():
    rules = sharding.make_rules([("embed", "data")])
    run = RunConfig.of(dataclasses.replace(TRAIN, train_steps=None, epochs=2.0), train_steps=8, rules=rules)
    assert (run.train_steps, run.rules) == (8, rules)


def test_solo_runs_and_stacks_add_to_the_shared_settings_and_rename_none():
    shared = names_of(RunSettings)
    assert names_of(RunConfig) - shared == {"train_steps", "random_seed", "donate_overlay"}
    assert names_of(StackConfig) - shared == {"size", "at_once", "early_end"}


@pytest.mark.parametrize("wrong", [{"keep_checkpoints": 0}, {"checkpoint_period": 2.0}, {"log_period": "1"}])
def test_wrong_settings_of_a_stack_are_input_errors(wrong):
    with pytest.raises(InputError, match=f"StackConfig.{next(iter(wrong))}"):
        StackConfig(**{"size": 1, **wrong})
