"""Early end: ends a run before its last step when its validation loss no longer falls."""

import dataclasses
import functools
import math

import jax
import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.runtime import hosts, sharding
from elm_jax.training import state as states
from elm_jax.training.step import StepSpec, abstract_of, batch_loss
from elm_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class EarlyEnd:
    """When a run ends early, and with which weights (gin: ``EarlyEnd``).

    Every `every` steps the loss a token of the run's own validation rows is computed, without dropout. The
    run ends when it has not improved `patience` times in a row, and in any case after its last step. The
    expert gets the weights of the best evaluation.

    Attributes:
        every: steps between evaluations.
        patience: evaluations without an improvement after which the run ends.
        min_improvement: by how much, in nats a token, the loss must fall to count as improved.
        rows: number of validation rows of each task that are used, from the first.
    """

    every: int = 100
    patience: int = 3
    min_improvement: float = 0.0
    rows: int = 256

    def __post_init__(self) -> None:
        for field in ("every", "patience", "rows"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise InputError(describe("Early end is wrong", where=f"EarlyEnd.{field}", got=repr(value),
                                          expected="an integer above 0"))
        least = self.min_improvement
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < math.inf:
            raise InputError(describe("Early end is wrong", where="EarlyEnd.min_improvement",
                                      got=repr(least), expected="a number, at least 0"))


@dataclasses.dataclass
class Patience:
    """State of one run under the rule of `EarlyEnd`.

    Attributes:
        best: lowest validation loss so far; None before the first evaluation.
        best_step: the step after which it was found.
        bad: evaluations since then.
    """

    best: float | None = None
    best_step: int = 0
    bad: int = 0

    def take(self, rule: EarlyEnd, step: int, loss: float) -> bool:
        """Counts one evaluation; returns whether it is the best so far."""
        least = math.inf if self.best is None else self.best - rule.min_improvement
        if loss < least:  # a loss that is not a number is no improvement
            self.best, self.best_step, self.bad = loss, step, 0
            return True
        self.bad += 1
        return False

    def ends(self, rule: EarlyEnd) -> bool:
        """Whether the run ends after this evaluation."""
        return self.bad >= rule.patience


def validation_loss(loss_fn: jax.stages.Compiled, frozen: Params, overlay: Params,
                    batches: list[Batch], spec: StepSpec) -> float:
    """Loss a token f[] over all batches, in nats; their sums are added in float64."""
    total = weight = 0.0
    for batch in batches:
        sums = jax.device_get(hosts.in_order(
            loss_fn(frozen, overlay, sharding.put_batch(batch, spec.mesh))))
        total, weight = total + float(sums[0]), weight + float(sums[1])
    return total / weight if weight else math.nan


@functools.lru_cache(maxsize=32)
def compile_loss(spec: StepSpec) -> jax.stages.Compiled:
    """Compiles a batch's loss without dropout: ``(frozen, overlay, batch)`` -> sum and weight f32[]."""
    network = dataclasses.replace(spec.network, config=spec.network.config.with_dropout(0.0))
    frozen, overlay, mesh = abstract_of(spec.frozen), abstract_of(spec.overlay), spec.mesh

    def loss(frozen: Params, overlay: Params, batch: Batch) -> tuple[Array, Array]:
        with sharding.placed(mesh, spec.rules):
            _, sums = batch_loss(overlay, frozen, network, spec.loss, batch, None)
        return sums.loss, sums.weight

    return jax.jit(
        loss, in_shardings=(states.shardings_of_params(network, frozen, mesh, spec.rules),
                            states.shardings_of_params(network, overlay, mesh, spec.rules),
                            sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    ).lower(frozen, overlay, {path: jax.ShapeDtypeStruct(shape, np.dtype(kind))
                              for path, shape, kind in spec.batch}).compile()
