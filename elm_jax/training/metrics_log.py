"""Metrics of a run on disk and on screen: metrics.jsonl, TensorBoard, and a progress line."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any, TextIO

from elm_jax.errors import InputError, describe
from elm_jax.runtime import records, storage
from elm_jax.runtime.terminal.progress import StatusLine


@dataclasses.dataclass(frozen=True)
class MetricsRow:
    """Fields of a line of ``metrics.jsonl``; the others are figures by name."""

    step: int
    loss: float = 0.0
    tokens: float = 0.0


class MetricsLog:
    """Writes rows of metrics as JSON lines, one row a step, and as TensorBoard scalars.

    Rows are kept in memory until `flush`; a run flushes before it saves a checkpoint, so the file
    always holds every row up to the newest checkpoint. A run that resumes drops the rows beyond its
    step, which a killed session wrote, so that no step is there twice.

    Args:
        model_dir: the run's folder, local or bucket.
        first_step: rows of later steps are dropped.
        tensorboard: whether to write ``tensorboard/`` too; needs the package tensorboardX.
    """

    def __init__(self, model_dir: storage.PathLike, first_step: int, tensorboard: bool) -> None:
        self.path = storage.as_path(model_dir) / "metrics.jsonl"
        self.rows = records.read_records(self.path, MetricsRow, kind="row of metrics")
        kept = [row for row in self.rows if row["step"] <= first_step]
        if len(kept) < len(self.rows):
            storage.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows = kept
        self._pending: list[dict[str, Any]] = []
        self._writer = _summary_writer(model_dir, first_step) if tensorboard else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one row with an integer `step`."""
        self._pending.append(dict(row))

    def flush(self) -> None:
        """Writes the rows that are not on disk yet."""
        if not self._pending:
            return
        storage.append_jsonl(self.path, self._pending)
        if self._writer is not None:
            with storage.guard_writes(self.path.parent / "tensorboard"):
                for row in self._pending:
                    for name, value in row.items():
                        if name != "step":
                            self._writer.add_scalar(f"train/{name}", value, row["step"])
                self._writer.flush()
        self.rows.extend(self._pending)
        self._pending = []

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        if self._writer is not None:
            self._writer.close()


def _summary_writer(model_dir: storage.PathLike, first_step: int) -> Any:
    try:
        import tensorboardX  # late: optional, and slow to import
    except ImportError as error:
        raise InputError(
            describe("TensorBoard was asked for, but the package tensorboardX is not installed",
                     cure="pip install tensorboardX, or train with tensorboard=False")
        ) from error
    logging.getLogger("tensorboardX").setLevel(logging.WARNING)
    # File names hold whole seconds only: without the suffix a session that starts within the same
    # second as the one before would overwrite its file.
    return tensorboardX.SummaryWriter(
        logdir=str(storage.as_path(model_dir) / "tensorboard"), purge_step=first_step + 1,
        filename_suffix=f".from{first_step}",
    )


class Progress(StatusLine):
    """The progress line of one run: step, loss, tokens a second, time left.

    Args:
        name: name of what is trained.
        first_step: where this session starts.
        train_steps: where it ends.
        stream: defaults to standard error.
    """

    def __init__(
        self, name: str, first_step: int, train_steps: int, stream: TextIO | None = None
    ) -> None:
        self.name = name
        self.first_step = first_step
        self.train_steps = train_steps
        super().__init__(stream)
        self._tokens = 0.0

    def update(self, step: int, loss: float, tokens: float) -> float:
        """Counts one finished step, and shows it if the last line is old enough.

        Returns:
            Tokens per second since the session began.
        """
        self._tokens += tokens
        elapsed, due = self.tick()
        rate = self._tokens / elapsed
        if due or step == self.train_steps:
            left = elapsed / (step - self.first_step) * (self.train_steps - step)
            self.show(
                f"{self.name}  step {step}/{self.train_steps}  loss {loss:.4f}  "
                f"{rate:,.0f} tokens/s  {_clock(left)} left"
            )
        return rate


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
