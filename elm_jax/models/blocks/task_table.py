"""The table of tasks: a vector for each, which gates of sparse layers read."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes

from elm_jax.models.blocks.sparse_sublayer import Routed
from elm_jax.models.layers.gate_tasks import NO_TASK, missing_tasks, reads_tasks
from elm_jax.types import Array


class TaskTable(nn.Module):
    """Vectors of tasks, in float32: leaf ``embedding`` f32[M, D_t].

    Attributes:
        num_tasks: M.
        task_dim: D_t.
    """

    num_tasks: int
    task_dim: int

    def setup(self) -> None:
        """Creates the table."""
        self.embedding = param_with_axes("embedding", nn.initializers.normal(1.0),
                                         (self.num_tasks, self.task_dim), jnp.float32, axes=(None, None))

    def __call__(self, task_ids: Array) -> Array:
        """Looks up numbers i32[...] -> f32[..., D_t]; 0 for `gate_tasks.NO_TASK`, NaN behind the table."""
        rows = jnp.take(self.embedding, jnp.maximum(task_ids, 0), axis=0, mode="fill")
        return jnp.where((task_ids <= NO_TASK)[..., None], 0.0, rows)

    def on(self, routed: Routed | None) -> Routed | None:
        """Adds the tasks' vectors to what sparse layers read.

        Raises:
            InputError: the rows have no tasks.
        """
        if routed is None:
            return None
        if routed.task_ids is None:
            raise missing_tasks("the rows of a batch")
        return routed._replace(task=self(routed.task_ids))


def table_of(config: Any) -> TaskTable | None:
    """Makes the table of a network; None if its gates read no tasks.

    Args:
        config: of the network.
    """
    return TaskTable(len(config.sparse.tasks), config.sparse.task_dim) if reads_tasks(config) else None
