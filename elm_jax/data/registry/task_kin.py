"""What a task is akin to: its data set, and the family of tasks that this belongs to."""

from typing import NamedTuple

from elm_jax.data.registry import registry


class TaskKin(NamedTuple):
    """Data set and family of a task.

    Attributes:
        dataset: ``<dataset>[_<config>]``, as the task's name begins.
        family: the registry's category of the task (T0's group); the data set's own name without one.
    """

    dataset: str
    family: str


def kin_of(task: str) -> TaskKin:
    """Data set and family of a task; of one that is not registered both are what its name says."""
    known = registry.find_task(task)
    dataset = task.split("__")[0] if known is None else known.dataset_name
    return TaskKin(dataset, dataset if known is None else known.category or dataset)
