"""One expert of a stack: its data, its step, and the metrics that it writes."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.runtime import hosts
from elm_jax.runtime.terminal.progress import StatusLine
from elm_jax.training.early_end import Patience
from elm_jax.training.loop import Stream
from elm_jax.training.metrics_log import MetricsLog
from elm_jax.training.router_log import RouterTotals
from elm_jax.training.run_settings import StackConfig
from elm_jax.training.step import ROUTER
from elm_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Opened:
    """Weights and data of an expert that enters a slot.

    Attributes:
        overlay: leaves before the first step, float32.
        stream: its batches.
        train_steps: number of updates of its run.
        validation: batches of its own validation rows, for an early end.
    """

    overlay: Params
    stream: Stream
    train_steps: int
    validation: list[Batch] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class StackedRun:
    """One expert that a stack trains.

    Attributes:
        id: the expert's name.
        random_seed: seed of dropout.
        learning_rate: peak of the schedule.
        digest: hash of its whole config; only an expert with the same hash resumes from a checkpoint.
        open: loads overlay, stream and length when the expert enters.
        model_dir: folder of its metrics; None keeps them in memory.
        settings: the whole config and its base, JSON-ready, which name what differs.
    """

    id: str
    random_seed: int
    learning_rate: float
    digest: str
    open: Callable[[], Opened]
    model_dir: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.random_seed) is not int or not 0 <= self.random_seed < 2**31:
            raise InputError(describe("Training setting is wrong", where=f"random_seed of {self.id}",
                                      got=repr(self.random_seed), expected="an integer, at least 0"))


class Slot:
    """An expert that trains in a slot of a stack.

    Args:
        run: the expert.
        opened: its weights and data.
        index: number of its slot.
        config: how often it writes metrics, whether to TensorBoard too, when it may end early.
        rows: rows of its batches that this process needs, as `rows_of_slots` gives them.
        sparse: settings of the network's sparse layers; None if it has none.
        resumed: finished updates, and what the checkpoint says of it; None for an expert that begins.
    """

    def __init__(self, run: StackedRun, opened: Opened, index: int, config: StackConfig, rows: np.ndarray,
                 sparse: SparseConfig | None, resumed: tuple[int, Mapping[str, Any]] | None = None) -> None:
        step, note = resumed or (0, {})
        self.run, self.index, self.step, self._rows = run, index, step, rows
        self.stream, self.train_steps, self.validation = opened.stream, opened.train_steps, opened.validation
        self.patience = Patience(**note.get("patience", {}))
        self._log_period, self._rule = config.log_period, config.early_end
        chief = hosts.is_first()
        routers = None if sparse is None else RouterTotals(
            sparse, note.get(ROUTER), f"checkpoint of {run.id}")
        self._log = (MetricsLog(run.model_dir, step, config.tensorboard, routers)
                     if run.model_dir is not None and chief else None)
        self.rows: list[dict[str, float]] = list(self._log.rows) if self._log else []
        self.last: dict[str, float] = self.rows[-1] if self.rows else {}
        self._next: Batch | None = None
        self._start, self._tokens = time.monotonic(), 0.0

    def batch(self) -> Batch | None:
        """This process's rows of the next step's batch; None if it needs none of them."""
        batch, self._next = self._next, None
        return self._make() if batch is None else batch

    def prefetch(self) -> None:
        """Makes the next batch, while the devices work."""
        if self.step < self.train_steps:
            self._next = self._make()

    def _make(self) -> Batch | None:
        return self.stream.batch(self.step, self._rows) if len(self._rows) else None

    def take(self, step: int, row: dict[str, float], reports: Mapping[str, RouterSums]) -> None:
        """Takes the metrics of one step, all of them finite, and what each sparse layer did."""
        if self._log is not None:
            self._log.count(reports)
        self._tokens += row["tokens"]
        row["tokens_per_second"] = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self.last = {"step": step, **row}
        # A row of a step that is evaluated waits for its validation loss.
        evaluated = self._rule is not None and self.is_due(step)
        if not evaluated and (step % self._log_period == 0 or step == self.train_steps):
            self._add(self.last)

    def evaluated(self, loss: float) -> bool:
        """Takes the validation loss of the newest step; returns whether it is the best so far."""
        self.last = {**self.last, "validation_loss": loss}
        self._add(self.last)
        return self.patience.take(self._rule, self.step, loss)

    def is_due(self, step: int) -> bool:
        """Whether `step` is the last one, or one after which an early end evaluates."""
        return step == self.train_steps or (self._rule is not None and step % self._rule.every == 0)

    def row_of(self, step: int) -> dict[str, float]:
        """The metrics of a step that was logged."""
        return next((row for row in reversed(self.rows) if row["step"] == step), self.last)

    def _add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self._log is not None:
            self._log.add(row)

    def note(self) -> dict[str, Any]:
        """The entry of this expert in a checkpoint: id, config, early end, sums of its routers."""
        router = None if self._log is None else self._log.note()
        return {"id": self.run.id, "digest": self.run.digest, "settings": dict(self.run.settings),
                "patience": dataclasses.asdict(self.patience), **({} if router is None else {ROUTER: router})}

    def flush(self) -> None:
        """Writes the rows that are not on disk yet."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Flushes and closes."""
        if self._log is not None:
            self._log.close()


class StackProgress(StatusLine):
    """The progress line of a stack: experts done and waiting, mean loss, tokens a second of all together.

    Args:
        name: name of what is trained.
        stream: defaults to standard error.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.name, self._tokens = name, 0.0

    def update(self, tick: int, slots: Sequence[Slot], waiting: int, ended: int, failed: int) -> None:
        """Counts one step of the stack, and shows it if the last line is old enough."""
        rows = [slot.last for slot in slots if slot.last]
        self._tokens += sum(row.get("tokens", 0.0) for row in rows)
        elapsed, due = self.tick()
        if not rows or not due:
            return
        loss = sum(row.get("loss", 0.0) for row in rows) / len(rows)
        self.show(f"{self.name}  step {tick}  {len(slots)} experts under way, {waiting} waiting, {ended} done"
                  f"{f', {failed} failed' if failed else ''}  mean loss {loss:.4f}  "
                  f"{self._tokens / elapsed:,.0f} tokens/s")
