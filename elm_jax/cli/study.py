"""The verb `elm study`: builds a config from gin, runs the study, prints its table."""

import argparse

from rich.console import Console

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import plan, run_config
from elm_jax.cli.printing import print_lines
from elm_jax.errors import InputError, describe
from elm_jax.runtime import preemption
from elm_jax.workflows.arms.flan_study import run_flan_study
from elm_jax.workflows.arms.task_moe_study import run_task_study
from elm_jax.workflows.study.run_study import run_study

KINDS = {"study": run_study, "flan_study": run_flan_study, "task_study": run_task_study}
"""By the configurable of its settings, what runs a study."""


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
    kind = kind_of_study()
    config = config_lib.build(kind)
    outcome = KINDS[kind](config, on_start=config_lib.config_writer(config.workdir), command=command)
    if outcome is None:
        raise preemption.Stopped
    outcome.print_table(Console())
    print_lines(f"report: {outcome.report_path}")
    return 0


def kind_of_study() -> str:
    """The kind of study that the parsed config describes, as `KINDS` names it.

    Raises:
        InputError: it describes two.
    """
    found = [kind for kind in KINDS if config_lib.is_bound(f"{kind}.workdir")]
    if len(found) > 1:
        raise InputError(describe("The gin files describe several studies", where="--gin_file",
                                  got=", ".join(found), expected="one"))
    return found[0] if found else "study"
