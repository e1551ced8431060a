"""The verb `elm train`: trains what the flags and gin files say, or plans it."""

import argparse

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import plan, pretrain, run_config
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.runtime import preemption, storage
from elm_jax.workflows.train import run_record
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_expert import train as train_expert
from elm_jax.workflows.train.train_stack import train_stack


def train(arguments: argparse.Namespace) -> int:
    """Runs `elm train`: one expert, a stack of experts if ``train_stack`` is bound, or a plan.

    A config that binds ``pretrain`` trains a base, as older gin files expect.
    """
    if arguments.plan or arguments.topology:
        return plan.plan(arguments)
    has_own_lengths = not run_config.read_train(arguments)
    if config_lib.is_bound("train_stack.train"):
        return _train_stack()
    if config_lib.is_bound("pretrain.model_dir"):
        return pretrain.run()
    config, data = config_lib.build("train"), None
    if not has_own_lengths:
        config, data = run_config.fit_lengths(arguments, config)
    return _train_one(config, data)


def _train_one(config: TrainConfig, data: TaskData | None) -> int:
    counter = run_record.CompileCounter()
    outcome = train_expert(config, data=data, on_start=config_lib.config_writer(config.model_dir))
    counter.log()
    if outcome.stopped:
        raise preemption.Stopped
    print(storage.as_path(config.model_dir) / "expert")
    return 0


def _train_stack() -> int:
    counter = run_record.CompileCounter()
    config = config_lib.build("train_stack")
    outcome = train_stack(config, on_start=config_lib.config_writer(config.model_dir))
    counter.log()
    if outcome.stopped:
        raise preemption.Stopped
    print("\n".join(outcome.done.values()))
    outcome.check()
    return 0
