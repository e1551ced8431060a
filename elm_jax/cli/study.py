"""The verb `elm study`: builds a config from gin, runs the study, prints its table."""

import argparse

from rich.console import Console

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import plan, run_config
from elm_jax.cli.printing import print_lines
from elm_jax.runtime import preemption
from elm_jax.workflows.study import run_study as studying


def study(arguments: argparse.Namespace) -> int:
    """Runs `elm study`: a whole study from gin, or its plan."""
    if arguments.plan or arguments.topology:
        return plan.plan(arguments)
    run_config.read_study(arguments)
    return run(arguments.gin_file, arguments.gin_bindings, config_lib.paths_of(arguments), arguments.command)


def run(files: list[str], bindings: list[str], paths: list[str], command: str) -> int:
    """Runs the study that gin files and bindings describe; returns the exit status.

    The study's report names the command.
    """
    config_lib.parse(files, bindings, paths)
    config = config_lib.build("study")
    outcome = studying.run_study(config, on_start=config_lib.config_writer(config.workdir),
                                  command=command)
    if outcome is None:
        raise preemption.Stopped
    outcome.print_table(Console())
    print_lines(f"report: {outcome.report_path}")
    return 0
