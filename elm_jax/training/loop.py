"""The training loop of one run: steps, metrics, checkpoints and SIGTERM.

Step n is dispatched before the metrics of step n - 1 are read, and the next batch is made while the
devices work; but see `hosts.in_order` for several processes on CPUs.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.errors import RunError, describe
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, preemption, records, sharding, storage, trees
from elm_jax.training import state as states
from elm_jax.training.checkpoint import Checkpoints
from elm_jax.training.metrics_log import MetricsLog, Progress
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.router_log import RouterTotals, SoloMarker
from elm_jax.training.run_settings import RunConfig
from elm_jax.training.state import TrainState
from elm_jax.training.step import ROUTER, Metrics, compile_step, make_spec, num_programs
from elm_jax.types import Batch, Params

_LOG = logging.getLogger(__name__)


class Stream(Protocol):
    """The batches that a run trains on; `TrainStream` of `data.arrays.cursor` is one."""

    batch_size: int

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Returns the batch of a step, or some of its rows in the given order; a pure function of both."""

    def facts(self) -> dict[str, Any]:
        """Returns all that decides the order of the stream, for the checkpoint."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The result of one session of a solo run.

    Attributes:
        overlay: the trained leaves, on the mesh.
        step: finished updates.
        metrics: the last step's row; empty if nothing was left to do and no row is on disk.
        rows: all rows of metrics, those of earlier sessions too if the run has a folder.
        stopped: whether SIGTERM ended the session before `train_steps`.
        num_programs: training steps compiled by this process so far.
    """

    overlay: Params
    step: int
    metrics: Mapping[str, float]
    rows: list[dict[str, float]]
    stopped: bool
    num_programs: int


def fit(
    network: Network, base: Params, overlay: Params, stream: Stream, run: RunConfig, mesh: Mesh,
    on_start: Callable[[], None] | None = None,
) -> FitResult:
    """Trains the overlay's leaves on a stream; resumes from the newest checkpoint of the run's folder.

    Args:
        network: network of the base with the overlay.
        base: parameters; those that the overlay replaces are not used, the others stay frozen.
        overlay: leaves to train, float32; left untouched unless `run.donate_overlay`.
        stream: batches.
        run: optimiser, length, seed, folder.
        mesh: axes ('data', 'experts', 'model').
        on_start: called once everything is checked, the folder's checkpoint too, and before anything
            is written.

    Raises:
        InputError: base and overlay are not the network's parameters, or the checkpoint is of another run.
        RunError: the loss is not finite, or the disk is full.
    """
    trained = trees.flatten(overlay)
    frozen, _ = trees.split(base, lambda path: path not in trained)
    states.check_params(network, frozen, overlay)
    placed = states.frozen_leaves(network, frozen, mesh, run.rules, run.base_dtype)
    del frozen, base
    feed = _Feed(stream, mesh)
    step_fn = compile_step(
        make_spec(run.step_config(network), placed, overlay, feed.shapes(), mesh, run.rules))
    shardings = states.shardings_of_state(network, overlay, run.optimizer, mesh, run.rules)

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return hosts.in_order(step_fn(
            placed, state, feed.put(batch), np.uint32(run.random_seed), np.int32(run.train_steps)))

    # Checkpoints on disk hold these names and values: they stay, whatever the settings are called.
    facts = {
        "config_digest": run.config_digest, "seed": run.random_seed, "stream": stream.facts(),
        "optimizer": dataclasses.asdict(run.optimizer), "loss": run.loss.facts(),
        "num_microbatches": run.num_microbatches,
    }
    if run.optimizer.schedule != "constant":
        facts["train_steps"] = run.train_steps
    program = _Program(advance, shardings, network.config.sparse)
    return _run(program, feed, run, facts, overlay, on_start)


class _Program(NamedTuple):
    """What a run computes.

    Attributes:
        advance: ``(state, batch) -> (state, metrics)``.
        shardings: of the state.
        sparse: settings of the network's sparse layers; None if it has none.
    """

    advance: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    shardings: TrainState
    sparse: SparseConfig | None


class _Feed:
    """Gives this process the rows of each batch that its own devices hold, and puts them on the mesh."""

    def __init__(self, stream: Stream, mesh: Mesh) -> None:
        self._stream, self._where = stream, sharding.batch_sharding(mesh)
        self._rows = hosts.rows_of(self._where, stream.batch_size)

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of the batch of a step."""
        return self._stream.batch(step, self._rows)

    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the global batch."""
        return {name: jax.ShapeDtypeStruct((self._stream.batch_size, *array.shape[1:]), array.dtype)
                for name, array in self.batch(0).items()}

    def put(self, batch: Batch) -> Batch:
        """The global batch on the mesh."""
        return hosts.put_rows(batch, self._rows, self._where, self._stream.batch_size)


def _start_state(
    overlay: Params, optimizer: OptimizerConfig, shardings: TrainState, donate: bool
) -> TrainState:
    """Puts the state before step 1 on the mesh; it shares no buffer with an overlay that the caller keeps."""
    # Own buffers: the step donates the state's.
    placed = jax.tree.map(lambda leaf, target: hosts.put(leaf, target, own=not donate), overlay,
                          shardings.overlay)
    opt_state = hosts.in_order(jax.jit(
        lambda tree: states.create_state(tree, optimizer).opt_state,
        out_shardings=shardings.opt_state,
    )(placed))
    step = hosts.put(np.zeros((), np.int32), shardings.step)
    return TrainState(step=step, overlay=placed, opt_state=opt_state)


def _run(
    program: _Program, feed: _Feed, run: RunConfig, facts: dict[str, Any], overlay: Params,
    on_start: Callable[[], None] | None,
) -> FitResult:
    """Restores the newest checkpoint, trains to `train_steps` or until SIGTERM, and saves."""
    shardings = program.shardings
    with ExitStack() as stack:
        told_to_stop = stack.enter_context(preemption.stop_flag())
        saver, state = None, None
        if run.model_dir is not None:
            saver = stack.enter_context(Checkpoints(
                run.model_dir, facts, run.keep_checkpoints, run.settings))
            hosts.barrier()  # all have compiled: restoring is done together as well
            state = saver.restore(_like(overlay, run.optimizer, shardings))
        if state is None:
            state = _start_state(overlay, run.optimizer, shardings, run.donate_overlay)
        elif run.donate_overlay:
            jax.tree.map(lambda leaf: leaf.delete() if isinstance(leaf, jax.Array) else None, overlay)
        if on_start is not None:
            on_start()
        # All have compiled: at the first step Gloo waits 30 s for the slowest process, and then gives up.
        hosts.barrier()
        first = int(state.step)
        recorder = stack.enter_context(_Recorder(run, first, saver, program.sparse))
        step = first
        batch = feed.batch(step) if step < run.train_steps else None
        while step < run.train_steps:
            state, metrics = program.advance(state, batch)
            step += 1
            if step < run.train_steps:
                batch = feed.batch(step)
            stopping = told_to_stop()
            recorder.take(step, metrics)
            if stopping or step == run.train_steps or step % run.checkpoint_period == 0:
                recorder.flush()
                if saver is not None:
                    saver.save(state, recorder.note())
            if stopping:
                break
        recorder.flush()
    return FitResult(
        overlay=state.overlay, step=step, rows=recorder.rows,
        metrics=recorder.rows[-1] if recorder.rows else {},
        stopped=step < run.train_steps, num_programs=num_programs(),
    )


def _like(overlay: Params, optimizer: OptimizerConfig, shardings: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        states.abstract_state(overlay, optimizer), shardings,
    )


def _totals(sparse: SparseConfig | None, note: Any, saver: Checkpoints | None) -> RouterTotals | None:
    """The sums of a run's routers, with those of a checkpoint's note; None without sparse layers."""
    if sparse is None or saver is None:
        return None
    where = f"{storage.MARKER} in {saver.folder}"
    note = {} if note is None else records.check_record(
        {"note": note}, SoloMarker, kind="checkpoint", where=where)["note"]
    return RouterTotals(sparse, note.get(ROUTER), where)


class _Recorder:
    """Reads metrics one step late, checks that they are finite, and writes them.

    Args:
        run: the run.
        first: where this session starts.
        saver: of its checkpoints; None if it has no folder.
        sparse: settings of the network's sparse layers; None if it has none.
    """

    def __init__(self, run: RunConfig, first: int, saver: Checkpoints | None, sparse: SparseConfig | None
                 ) -> None:
        chief = hosts.is_first()
        self._run = run
        self._saver = saver
        self._waiting: tuple[int, Metrics] | None = None
        self._progress = (
            Progress(run.name, first, run.train_steps) if run.name is not None and chief else None
        )
        note = saver.note() if saver is not None and sparse is not None and first else None
        self._log = (
            MetricsLog(run.model_dir, first, run.tensorboard, _totals(sparse, note, saver))
            if run.model_dir is not None and chief else None
        )
        self.rows: list[dict[str, float]] = list(self._log.rows) if self._log else []

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *unused: object) -> None:
        del unused  # the error propagates; rows recorded before it are kept
        if self._progress is not None:
            self._progress.close()
        if self._log is not None:
            self._log.close()

    def take(self, step: int, metrics: Metrics) -> None:
        """Reads the step before, and remembers this one."""
        self._read()
        self._waiting = (step, metrics)

    def flush(self) -> None:
        """Reads the newest step too, and writes all rows to disk."""
        self._read()
        if self._log is not None:
            self._log.flush()

    def note(self) -> dict[str, Any] | None:
        """What the checkpoint keeps for the lines to come; None if there is nothing."""
        router = None if self._log is None else self._log.note()
        return None if router is None else {ROUTER: router}

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        step, metrics = waiting
        if self._log is None:
            metrics = {name: value for name, value in metrics.items() if name != ROUTER}
        found = jax.device_get(metrics)
        reports = found.pop(ROUTER, {})
        row = {name: float(value) for name, value in found.items()}
        self._check_finite(step, row)
        if self._log is not None:
            self._log.count(reports)
        if self._progress is not None:
            row["tokens_per_second"] = self._progress.update(step, row["loss"], row["tokens"])
        if step % self._run.log_period == 0 or step == self._run.train_steps:
            self.rows.append({"step": step, **row})
            if self._log is not None:
                self._log.add(self.rows[-1])

    def _check_finite(self, step: int, row: Mapping[str, float]) -> None:
        wrong = [name for name, value in row.items() if not math.isfinite(value)]
        if not wrong:
            return
        kept = "there is no earlier checkpoint"
        if self._saver is not None:
            self._saver.wait()
            steps = self._saver.steps()
            if steps:
                kept = f"the last good checkpoint is {self._saver.folder / str(steps[-1])}"
        raise RunError(
            describe(
                f"Training left the finite numbers at step {step}", where=", ".join(wrong),
                got=", ".join(f"{name}={row[name]}" for name in wrong),
                cure=f"lower the learning rate or clip the gradient; {kept}",
            )
        )
