"""The router of a sparse layer: logits of the experts from a token's state, its task, or both."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.dense import Dense, Initializer
from elm_jax.models.layers.sparse_config import TASK, TOKEN, SparseConfig
from elm_jax.types import Array

ROUTER_STDDEV = 0.02


class TokenRouter(nn.Module):
    """Logits ``x W_r``, ``t W_t``, or their sum, in float32 whatever the network's dtype.

    Leaves: ``router_weights/w/kernel`` f32[D, E] and ``task_weights/w/kernel`` f32[D_t, E]. Beside W_r, W_t
    starts at 0, so that a network begins as one with token gates; alone it is random, since equal logits
    would send all tokens to the first expert.

    Attributes:
        sparse: number of experts, gate, jitter.
    """

    sparse: SparseConfig

    def setup(self) -> None:
        """Creates what the gate reads."""
        random = nn.initializers.normal(ROUTER_STDDEV)
        if self.sparse.gate != TASK:
            self.router_weights = _Weights(self.sparse.num_experts, "embed", random)
        if self.sparse.gate != TOKEN:
            init = random if self.sparse.gate == TASK else nn.initializers.zeros
            self.task_weights = _Weights(self.sparse.num_experts, None, init)

    def __call__(self, x: Array, task: Array | None, deterministic: bool) -> Array:
        """Computes logits f32[B, L, E].

        Args:
            x: f[B, L, D].
            task: f[B, D_t] or f[B, L, D_t], for a gate that reads tasks.
            deterministic: no jitter.
        """
        logits = jnp.zeros((*x.shape[:2], self.sparse.num_experts), jnp.float32)
        if self.sparse.gate != TASK:
            logits = self.router_weights(self._jittered(x.astype(jnp.float32), deterministic))
        if self.sparse.gate != TOKEN:
            logits = logits + self.task_weights(self._checked(task, x.shape[:2]))
        return logits

    def _jittered(self, x: Array, deterministic: bool) -> Array:
        size = self.sparse.jitter
        if deterministic or size == 0.0:
            return x
        return x * jax.random.uniform(self.make_rng("dropout"), x.shape, x.dtype, 1.0 - size, 1.0 + size)

    def _checked(self, task: Array | None, rows: tuple[int, int]) -> Array:
        """The tasks' vectors as f32[B, 1 or L, D_t]."""
        width = self.sparse.task_dim
        if task is None or task.shape not in ((rows[0], width), (*rows, width)):
            raise InputError(describe(
                f"A gate that reads tasks (gate={self.sparse.gate!r}) lacks the vectors of the rows' tasks",
                where="SparseMlp: task", got=task if task is None else task.shape,
                expected=f"{(rows[0], width)} or {(*rows, width)}"))
        return (task if task.ndim == 3 else task[:, None]).astype(jnp.float32)


class _Weights(nn.Module):
    num_experts: int
    axis: str | None
    init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Dense(self.num_experts, (self.axis, None), jnp.dtype("float32"), kernel_init=self.init,
                     precision=jax.lax.Precision.HIGHEST, name="w")(x)
