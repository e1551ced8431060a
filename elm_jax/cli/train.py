"""The verb `elm train`: trains what the gin files bind, or plans it."""

import argparse

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import plan, pretrain
from elm_jax.runtime import preemption, storage
from elm_jax.workflows.train import run_record
from elm_jax.workflows.train.train_expert import train as train_expert
from elm_jax.workflows.train.train_stack import train_stack


def train(arguments: argparse.Namespace) -> int:
    """Runs `elm train`: one expert, a stack of experts if ``train_stack`` is bound, or a plan.

    A config that binds ``pretrain`` trains a base, as older gin files expect.
    """
    if arguments.plan or arguments.topology:
        return plan.plan(arguments)
    config_lib.parse_flags(arguments)
    if config_lib.is_bound("train_stack.train"):
        return _train_stack()
    return pretrain.run() if config_lib.is_bound("pretrain.model_dir") else _train_one()


def _train_one() -> int:
    counter = run_record.CompileCounter()
    config = config_lib.build("train")
    outcome = train_expert(config, on_start=config_lib.config_writer(config.model_dir))
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
