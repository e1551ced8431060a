"""Metrics of a run on disk and on screen: metrics.jsonl, router.jsonl, TensorBoard, and a progress line."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any, TextIO

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.gates import RouterSums
from elm_jax.runtime import records, storage
from elm_jax.runtime.terminal.progress import StatusLine
from elm_jax.training import router_log
from elm_jax.training.router_log import RouterTotals


@dataclasses.dataclass(frozen=True)
class MetricsRow:
    """Fields of a line of ``metrics.jsonl``; the others are figures by name."""

    step: int
    loss: float = 0.0
    tokens: float = 0.0


class StepRows:
    """A file of JSON lines with a step, appended to in parts.

    Args:
        path: of the file.
        schema: dataclass of a line.
        kind: what a line is, for errors.
        first_step: lines of later steps are dropped.
    """

    def __init__(self, path: epath.Path, schema: type, kind: str, first_step: int) -> None:
        self.path, self.pending = path, list[dict[str, Any]]()
        rows = records.read_records(path, schema, kind=kind)
        self.kept = [row for row in rows if row["step"] <= first_step]
        if len(self.kept) < len(rows):
            storage.write_text(path, "".join(
                json.dumps(row, ensure_ascii=False) + "\n" for row in self.kept))

    def flush(self) -> list[dict[str, Any]]:
        """Appends the lines that are not on disk yet, and returns them."""
        rows, self.pending = self.pending, []
        if rows:
            storage.append_jsonl(self.path, rows)
        return rows


class MetricsLog:
    """Writes rows of metrics as JSON lines, one row a step, and as TensorBoard scalars.

    At each of these steps every sparse layer gets a line in ``router.jsonl``, of all steps since the one
    before. Rows are kept in memory until `flush`; a run flushes before it saves a checkpoint, so the files
    always hold every row up to the newest checkpoint. A run that resumes drops the rows beyond its
    step, which a killed session wrote, so that no step is there twice.

    Args:
        model_dir: the run's folder, local or bucket.
        first_step: rows of later steps are dropped.
        tensorboard: whether to write ``tensorboard/`` too; needs the package tensorboardX.
        routers: adds up what the sparse layers do; None for a network without.
    """

    def __init__(self, model_dir: storage.PathLike, first_step: int, tensorboard: bool,
                 routers: RouterTotals | None = None) -> None:
        folder = storage.as_path(model_dir)
        self._metrics = StepRows(folder / "metrics.jsonl", MetricsRow, "row of metrics", first_step)
        self._loads = None if routers is None else StepRows(
            folder / router_log.FILE, router_log.RouterRow, router_log.KIND, first_step)
        self._routers, self.rows = routers, self._metrics.kept
        if self._loads is not None:
            self._loads.kept.clear()  # nobody asks for them
        self._writer = _summary_writer(model_dir, first_step) if tensorboard else None

    def count(self, reports: Mapping[str, RouterSums]) -> None:
        """Adds what the sparse layers did in one step: arrays on the host."""
        if self._routers is not None:
            self._routers.add(reports)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one row with an integer `step`."""
        self._metrics.pending.append(dict(row))
        if self._routers is not None:
            self._loads.pending += self._routers.take_rows(row["step"])

    def note(self) -> dict[str, Any] | None:
        """Sums of routers that no line has yet, for the checkpoint; None if there are none."""
        return None if self._routers is None else self._routers.note()

    def flush(self) -> None:
        """Writes the rows that are not on disk yet."""
        rows = self._metrics.flush()
        loads = [] if self._loads is None else self._loads.flush()
        self.rows.extend(rows)
        if self._writer is None or not rows:
            return
        with storage.guard_writes(self._metrics.path.parent / "tensorboard"):
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        self._writer.add_scalar(f"train/{name}", value, row["step"])
            for row in loads:
                for name in router_log.SCALARS:
                    if name in row:
                        self._writer.add_scalar(f"router/{row['layer']}/{name}", row[name], row["step"])
            self._writer.flush()

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
