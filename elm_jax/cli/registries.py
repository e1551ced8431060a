"""The task registries that ``--module`` names, and the task data of ``--base`` and ``--prepared``."""

import argparse

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import load_vocabulary

DEFAULT_MODULES = ("elm_jax.tasks", "elm_jax.tasks.embedded")


def modules_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The registries that the command line names, or the usual ones."""
    return tuple(arguments.module or DEFAULT_MODULES)


def task_data(arguments: argparse.Namespace) -> TaskData:
    """Tasks in the vocabulary of ``--base``, prepared or in the folder ``--prepared``."""
    vocabulary, _ = load_vocabulary(arguments.base)
    if vocabulary is None:
        raise InputError(describe("The base carries no vocabulary", where=arguments.base))
    return TaskData(vocabulary, modules_of(arguments), arguments.prepared)
