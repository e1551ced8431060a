"""The verb `elm pretrain`: trains a small base from raw text."""

import argparse

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import run_config
from elm_jax.runtime import preemption, storage
from elm_jax.workflows.train import pretrain as pretraining
from elm_jax.workflows.train import run_record


def pretrain(arguments: argparse.Namespace) -> int:
    """Runs `elm pretrain`; returns the exit status."""
    run_config.read_pretrain(arguments)
    return run()


def run() -> int:
    """Builds the parsed config of ``pretrain`` and runs it; returns the exit status."""
    counter = run_record.CompileCounter()
    config = config_lib.build("pretrain")
    base = pretraining.pretrain(config, on_start=config_lib.config_writer(config.model_dir))
    counter.log()
    if base is None:
        raise preemption.Stopped
    print(storage.as_path(config.model_dir) / "base")
    return 0
