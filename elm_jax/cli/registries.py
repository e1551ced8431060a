"""Reads ``--module``, ``--base`` and ``--prepared``: task registries, and the task data of a verb."""

import argparse

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import load_vocabulary
from elm_jax.runtime.config_checks import DEFAULT_MODULES


def modules_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Names of the task registries that the command line gives, or of the default ones."""
    return tuple(arguments.module or DEFAULT_MODULES)


def task_data(arguments: argparse.Namespace) -> TaskData:
    """Task data in the vocabulary of ``--base``, in memory or in the folder ``--prepared``."""
    vocabulary, _ = load_vocabulary(arguments.base)
    if vocabulary is None:
        raise InputError(describe("The base carries no vocabulary", where=arguments.base))
    return TaskData(vocabulary, modules_of(arguments), arguments.prepared)
