"""Vectors of tasks in a network's table: a task that was never trained gets one of those that were."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from elm_jax.experts.base import Base
from elm_jax.models.network import TASK_TABLE
from elm_jax.runtime import trees

RELATED, MEAN_OF_ALL, DRAWN = VECTORS = ("related", "mean", "random")
"""What a new task's vector is: the mean of related tasks', of all trained tasks', or drawn."""


def vector_of(table: np.ndarray, rows: Sequence[int], how: str, seed: int) -> np.ndarray:
    """A new task's vector f32[D_t].

    Args:
        table: f32[M, D_t].
        rows: of the tasks that it is made of; for a drawn one those whose size it has.
        how: one of `VECTORS`.
        seed: of a drawn one.
    """
    own = np.asarray(table)[list(rows)]
    if how != DRAWN:
        return own.mean(axis=0)
    drawn = np.random.default_rng(seed).standard_normal(table.shape[1])
    size = np.linalg.norm(own, axis=1).mean()
    return (drawn * size / np.linalg.norm(drawn)).astype(table.dtype)


def with_vector(base: Base, task: str, others: Sequence[str], how: str, seed: int) -> Base:
    """A base whose table gives a task a vector made of those of other tasks.

    Args:
        base: whose gates read tasks.
        task: in its table.
        others: the related tasks, or all trained ones.
        how: one of `VECTORS`.
        seed: of a drawn one.
    """
    tasks, leaves = base.config.sparse.tasks, trees.flatten(base.params)
    table = np.array(leaves[TASK_TABLE])
    table[tasks.index(task)] = vector_of(table, [tasks.index(other) for other in others], how, seed)
    params = trees.unflatten({**leaves, TASK_TABLE: table})
    return dataclasses.replace(base, params=params, fingerprint=trees.fingerprint(params))
