"""Tasks by number, for gates that read them: which row of the table a task has."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.layers.sparse_config import BOTH, TASK, TOKEN

NO_TASK = -1
"""Number of a text of no task: its vector is 0, so that a gate that reads tokens too reads them alone."""
CURE = ("give the task an embedding: elm tasks embed --base DIR --output DIR {task} (a vector made of those "
        "of known tasks: their mean, or by its text or a library's votes)")


def tasks_of(config: Any) -> tuple[str, ...]:
    """Names of the tasks whose numbers a network's batches carry; none for a network without.

    Args:
        config: of the network.
    """
    return () if config.sparse is None else config.sparse.tasks


def reads_tasks(config: Any) -> bool:
    """Whether a network's gates read tasks, so that it cannot compute without their numbers."""
    return config.sparse is not None and config.sparse.gate != TOKEN


def counting(config: Any, tasks: Sequence[str]) -> Any:
    """A network's config for a run over some tasks: gates that read none count their choices by task.

    Args:
        config: of the network; that of others is returned as it is.
        tasks: of the run; choices of one alone are not counted apart.
    """
    if config.sparse is None or reads_tasks(config):
        return config
    named = tuple(tasks) if len(tasks) > 1 else ()
    return dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, tasks=named))


def check_without_tasks(config: Any, where: str) -> None:
    """Raises InputError for a network that cannot learn from texts of no task, or that names tasks in vain.

    Args:
        config: of the network.
        where: it comes from, for the error.
    """
    if config.sparse is None or config.sparse.gate == BOTH or not config.sparse.tasks:
        return
    reads = config.sparse.gate == TASK
    raise InputError(describe(
        "These texts are of no task: a gate that reads the task alone has nothing to read" if reads
        else "A setting of sparse layers has no effect: these texts are of no task",
        where=f"{where}.sparse.{'gate' if reads else 'tasks'}",
        got=repr(config.sparse.gate) if reads else f"{len(config.sparse.tasks)} tasks",
        expected="'both' (which learns the task's part later) or 'token'" if reads else "none for this gate",
        cure="give the base gates that read tasks afterwards: elm tasks embed" if reads else "leave it out"))


def number_of(tasks: Sequence[str], name: str, dataset: str | None = None, where: object = None) -> int:
    """Number of a task in the table: that of its own name, or else of its data set, whose tasks share a row.

    Args:
        tasks: names of the table's rows, of tasks or of data sets.
        name: of the task.
        dataset: its data set, with the config's name if there is one.
        where: the task is asked for, for the error.

    Raises:
        InputError: neither has a row; the nearest are named, and how the task gets one.
    """
    for known in (name, dataset):
        if known in tasks:
            return tasks.index(known)
    raise unknown_name("task of a gate that reads tasks", name, tasks,
                       "SparseConfig.tasks of the base" if where is None else where,
                       CURE.format(task=name))


def missing_tasks(where: str) -> InputError:
    """The error for rows without a task, of a network that reads tasks."""
    return InputError(describe(
        "This network's gates read the task of each row, and none is given", where=where,
        expected="the number of each row's task, its row in SparseConfig.tasks",
        cure="say which task: rows of a registered task bring it along"))
