"""The loop that trains a stack: a queue of experts, S slots, one compiled program.

When an expert ends, it leaves its slot and the next one of the queue enters, without a new compilation.
Each expert has its own step, data position, metrics and end. One checkpoint holds the states of all slots
and says which expert is in which slot. An expert whose loss is not finite fails alone; the others go on.
"""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import InputError, describe
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, preemption, records, sharding, storage, trees
from elm_jax.runtime.differences import differences
from elm_jax.training import state as states
from elm_jax.training.checkpoint import Checkpoints
from elm_jax.training.early_end import Patience, compile_loss, validation_loss
from elm_jax.training.run_settings import StackConfig
from elm_jax.training.stack import stacked_step
from elm_jax.training.stack.slots import Opened, Slot, StackedRun, StackProgress
from elm_jax.training.state import TrainState
from elm_jax.training.step import ROUTER, Metrics, make_spec
from elm_jax.types import Array, Params

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SlotNote:
    """What a stack's checkpoint says of an expert in a slot."""

    id: str
    digest: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    patience: Patience = dataclasses.field(default_factory=Patience)


@dataclasses.dataclass(frozen=True)
class StackNote:
    """What a stack's checkpoint says of its slots, of which some may be empty."""

    size: int
    slots: list[SlotNote | None]
    failed: list[str]


@dataclasses.dataclass(frozen=True)
class StackMarker:
    """What is in the marker of a stack's checkpoint beside what every checkpoint has."""

    note: StackNote


@dataclasses.dataclass(frozen=True)
class Ended:
    """The result of one expert.

    Attributes:
        run: the expert.
        overlay: its weights, numpy; leaves that are split over several processes stay on the devices.
        step: number of updates that these weights have had.
        metrics: the row of that step.
        rows: all its rows of metrics.
        ended_at: the last step that it trained; later than `step` if an early end kept better weights.
    """

    run: StackedRun
    overlay: Params
    step: int
    metrics: Mapping[str, float]
    rows: list[dict[str, float]]
    ended_at: int


@dataclasses.dataclass(frozen=True)
class StackResult:
    """The result of one session of a stack.

    Attributes:
        ended: ids of the experts that ended in this session, in that order.
        failed: what went wrong, by id.
        stopped: whether SIGTERM ended the session before the queue was empty.
        ticks: steps of the whole stack, over all sessions.
        num_programs: stacks compiled by this process so far.
    """

    ended: list[str]
    failed: dict[str, str]
    stopped: bool
    ticks: int
    num_programs: int


class StackCallbacks(NamedTuple):
    """Functions that a stack calls while it trains.

    Attributes:
        on_end: saves an expert. It runs in a thread, one expert at a time, and finishes before the next
            checkpoint. With several processes, all of them call it between two steps.
        on_fail: receives an expert that failed, and the error message.
        on_start: called once everything is checked, before anything is written.
    """

    on_end: Callable[[Ended], None]
    on_fail: Callable[[StackedRun, str], None] | None = None
    on_start: Callable[[], None] | None = None


def fit_stack(
    network: Network, base: Params, runs: Sequence[StackedRun], config: StackConfig, mesh: Mesh,
    callbacks: StackCallbacks,
) -> StackResult:
    """Trains many experts, S at a time; resumes from the newest checkpoint if there is one.

    Args:
        network: network of the base with any of the overlays.
        base: parameters; those that the overlays replace are not used, the others stay frozen.
        runs: the experts that are not done yet, in the order in which they enter.
        config: optimiser, slots, folder.
        mesh: axes ('data', 'experts', 'model').
        callbacks: save an expert that ended, receive one that failed.

    Raises:
        InputError: base and overlays are not the network's parameters, the experts' shapes differ, or the
            checkpoint is of other experts.
        RunError: the disk is full.
    """
    if not runs:
        return StackResult([], {}, False, 0, stacked_step.num_programs())
    with ExitStack() as stack:
        should_stop = stack.enter_context(preemption.stop_flag())
        loop = _StackLoop(network, base, runs, config, mesh, callbacks, stack)
        if callbacks.on_start is not None:
            callbacks.on_start()
        hosts.barrier()  # all have compiled: at the first step Gloo waits 30 s for the slowest, and gives up
        loop.go(should_stop)
        return StackResult(loop.ended, loop.failed, loop.stopped, loop.tick, stacked_step.num_programs())


class _StackLoop:
    """State of one session."""

    def __init__(
        self, network: Network, base: Params, runs: Sequence[StackedRun], config: StackConfig, mesh: Mesh,
        callbacks: StackCallbacks, stack: ExitStack,
    ) -> None:
        self.config, self.mesh, self.callbacks = config, mesh, callbacks
        self.queue: deque[StackedRun] = deque(runs)
        self.slots: list[Slot | None] = [None] * config.size
        self.ended: list[str] = []
        self.failed: dict[str, str] = {}
        self.stopped, self.tick = False, 0
        first = runs[0].open()
        trained = trees.flatten(first.overlay)
        frozen, _ = trees.split(base, lambda path: path not in trained)
        states.check_params(network, frozen, first.overlay)
        rules = sharding.rules_of_one(config.rules)
        self.frozen = states.frozen_leaves(network, frozen, mesh, rules, config.base_dtype)
        one = make_spec(config.step_config(network), self.frozen, first.overlay, first.stream.batch(0), mesh,
                        rules)
        self.spec = stacked_step.make_stack_spec(one, config.size, config.at_once)
        self.programs = stacked_step.compile_stack(self.spec)
        self.loss_fn = compile_loss(self.spec.step) if config.early_end else None
        self._opened = {runs[0].id: first}
        self._rows = stacked_step.rows_of_slots(self.spec, first.stream.batch_size)
        self._waiting: tuple[list[Slot | None], list[int], Metrics] | None = None
        self._slots_on_mesh: stacked_step.Slots | None = None
        # One thread that saves experts while the next steps run.
        self._saves = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="expert"))
        self._saving: list[Future] = []
        self.state, self.best = stacked_step.empty_stack(self.spec), None
        if config.early_end is not None:
            self.best = stacked_step.empty_stack(self.spec).overlay
        self.saver = None
        if config.model_dir is not None:
            facts = {"config_digest": config.config_digest, "optimizer": dataclasses.asdict(
                self.spec.step.optimizer), "loss": config.loss.facts(),
                "num_microbatches": config.num_microbatches}
            self.saver = stack.enter_context(Checkpoints(
                config.model_dir, facts, config.keep_checkpoints, config.settings))
            hosts.barrier()  # all have compiled: restoring is done together as well
            self._restore(self.saver)
        self.progress = (StackProgress(config.name)
                         if config.name is not None and hosts.is_first() else None)
        stack.callback(self._close)

    # -- the loop ----------------------------------------------------------------------------------

    def go(self, should_stop: Callable[[], bool]) -> None:
        """Runs until queue and slots are empty, or until it is told to stop."""
        saved_at = self.tick
        while True:
            self._admit()
            if not any(self.slots):
                break
            self._advance()
            self.stopped = should_stop()
            due = [slot for slot in self.slots if slot is not None and slot.is_due(slot.step)]
            saving = self.stopped or self.tick - saved_at >= self.config.checkpoint_period
            if due or saving:
                self._flush()
            for slot in due:
                self._settle(slot)
            if saving:
                saved_at = self.tick
                self._save()
            if self.stopped:
                break
        self._flush()
        self._wait_for_saves()

    def _admit(self) -> None:
        """Fills the free slots from the queue."""
        for index, slot in enumerate(self.slots):
            while slot is None and self.queue:
                run = self.queue.popleft()
                opened = self._open(run)
                self.state = hosts.in_order(
                    self.programs.enter(self.state, self._place(opened.overlay), np.int32(index)))
                slot = self.slots[index] = Slot(run, opened, index, self.config, self._rows[index])
                self._slots_on_mesh = None
                _LOG.debug("%s enters slot %d at step %d of %d", run.id, index, slot.step, slot.train_steps)

    def _open(self, run: StackedRun) -> Opened:
        opened = self._opened.pop(run.id, None) or run.open()
        difference = trees.first_difference(opened.overlay, stacked_step.overlay_like(self.spec))
        if difference:
            raise InputError(describe("Experts of one stack have overlays of one shape", where=run.id,
                                      got=difference, expected="the leaves of the stack's first expert"))
        return opened

    def _place(self, overlay: Params) -> Params:
        one = self.spec.step
        like = states.shardings_of_params(one.network, overlay, self.mesh, one.rules)
        return sharding.put_tree(overlay, like)

    def _advance(self) -> None:
        """Dispatches one step of the stack, makes the next batches, reads the step before."""
        batches = [None if slot is None else slot.batch() for slot in self.slots]
        self.state, metrics = hosts.in_order(self.programs.step(
            self.frozen, self.state, stacked_step.put_stacked(batches, self.spec, self._rows),
            self._settings()))
        self.tick += 1
        for slot in filter(None, self.slots):
            slot.step += 1
            slot.prefetch()
        self._read()
        self._waiting = (list(self.slots), [slot.step if slot else 0 for slot in self.slots], metrics)

    def _settings(self) -> stacked_step.Slots:
        """Seeds, lengths and rates on the mesh; made again when an expert enters or leaves."""
        if self._slots_on_mesh is None:
            target = NamedSharding(self.mesh, PartitionSpec(stacked_step.AXIS))
            slots = self.slots
            columns = stacked_step.Slots(
                seed=np.array([slot.run.random_seed if slot else 0 for slot in slots], np.uint32),
                train_steps=np.array([slot.train_steps if slot else 1 for slot in slots], np.int32),
                learning_rate=np.array([slot.run.learning_rate if slot else 0 for slot in slots],
                                       np.float32),
                active=np.array([slot is not None for slot in slots]))
            self._slots_on_mesh = jax.tree.map(lambda column: hosts.put(column, target), columns)
        return self._slots_on_mesh

    def _read(self) -> None:
        """Reads the metrics of the newest step that was dispatched before."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        slots, steps, metrics = waiting
        scalars = {name: value for name, value in metrics.items() if name != ROUTER}
        columns = {name: np.asarray(value) for name, value in jax.device_get(scalars).items()}
        for index, (slot, step) in enumerate(zip(slots, steps, strict=True)):
            if slot is None or self.slots[index] is not slot:  # it failed or left since
                continue
            row = {name: float(column[index]) for name, column in columns.items()}
            wrong = [name for name, value in row.items() if not math.isfinite(value)]
            if wrong:
                self._fail(slot, step, wrong, row)
            else:
                slot.take(step, row)
        if self.progress is not None:
            self.progress.update(self.tick, [slot for slot in self.slots if slot], len(self.queue),
                                 len(self.ended), len(self.failed))

    def _flush(self) -> None:
        """Reads the newest step too, and writes all rows to disk."""
        self._read()
        for slot in self.slots:
            if slot is not None:
                slot.flush()

    # -- ends --------------------------------------------------------------------------------------

    def _settle(self, slot: Slot) -> None:
        """Evaluates a slot whose turn it is, and lets it go if it has ended."""
        if self.slots[slot.index] is not slot:
            return  # it failed
        ends = slot.step == slot.train_steps
        rule, index = self.config.early_end, np.int32(slot.index)
        if rule is not None:
            overlay = hosts.in_order(self.programs.overlay_of(self.state.overlay, index))
            found = validation_loss(self.loss_fn, self.frozen, overlay, slot.validation, self.spec.step)
            if not math.isfinite(found):
                self._fail(slot, slot.step, ["validation_loss"], {"validation_loss": found})
                return
            if slot.evaluated(found):
                self.best = hosts.in_order(self.programs.keep(self.best, overlay, index))
            ends = ends or slot.patience.ends(rule)
        if not ends:
            return
        source = self.state.overlay if self.best is None else self.best
        overlay = hosts.to_host(hosts.in_order(self.programs.overlay_of(source, index)))
        self._leave(slot)
        step = slot.step if rule is None else slot.patience.best_step
        ended = Ended(slot.run, overlay, step, slot.row_of(step), slot.rows, slot.step)
        if hosts.count() > 1:  # all write it, at the same place among what they do together
            self.callbacks.on_end(ended)
        else:
            self._wait_for_saves(most=1)
            self._saving.append(self._saves.submit(self.callbacks.on_end, ended))
        self.ended.append(slot.run.id)
        _LOG.debug("%s ends at step %d of %d%s", slot.run.id, slot.step, slot.train_steps,
                   "" if rule is None else f", with the weights of step {step}")

    def _fail(self, slot: Slot, step: int, wrong: list[str], row: Mapping[str, float]) -> None:
        message = describe(
            f"Training left the finite numbers at step {step}", where=f"{slot.run.id}: {', '.join(wrong)}",
            got=", ".join(f"{name}={row[name]}" for name in wrong),
            cure="lower its learning rate or clip the gradient; the other experts of the stack went on")
        self.failed[slot.run.id] = message
        self._leave(slot)
        _LOG.error("%s", message)
        if self.callbacks.on_fail is not None:
            self.callbacks.on_fail(slot.run, message)

    def _leave(self, slot: Slot) -> None:
        slot.close()
        self.slots[slot.index] = None
        self._slots_on_mesh = None

    def _wait_for_saves(self, most: int = 0) -> None:
        """Waits until at most `most` experts are still being written; raises the error of one that failed."""
        while len(self._saving) > most:
            self._saving.pop(0).result()

    def _close(self) -> None:
        for slot in self.slots:
            if slot is not None:
                slot.close()
        if self.progress is not None:
            self.progress.close()

    # -- checkpoints -------------------------------------------------------------------------------

    def _whole(self, state: Any, best: Any) -> TrainState:
        """The stack as one state for `Checkpoints`: its step is the tick."""
        tick = hosts.put(np.int32(self.tick), sharding.replicated(self.mesh))
        extra = {} if best is None else {"best": best}
        return TrainState(step=tick, overlay=state.overlay,
                          opt_state={"steps": state.step, "optimizer": state.opt_state, **extra})

    def _save(self) -> None:
        self._flush()
        if self.saver is None:
            return
        self._wait_for_saves()
        note = {"size": self.config.size,
                "slots": [None if slot is None else slot.note() for slot in self.slots],
                "failed": sorted(self.failed)}
        self.saver.save(self._whole(self.state, self.best), note)

    def _restore(self, saver: Checkpoints) -> None:
        """Puts every unfinished expert of the newest checkpoint back into a slot."""
        note = saver.note()
        if note is None:
            return
        check_note(note, saver)
        spec = self.spec._replace(size=note["size"])
        whole = sharding.replicated(self.mesh)
        like = stacked_step.abstract_stack(spec)
        if note["size"] != self.config.size:  # another width: through the host
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), like)
        best = None if self.best is None else like.overlay
        target = self._whole(like, best)
        target = target.replace(step=jax.ShapeDtypeStruct((), np.int32, sharding=whole))
        found = saver.restore(target)
        self.tick = int(found.step)
        state = TrainState(step=found.opt_state["steps"], overlay=found.overlay,
                           opt_state=found.opt_state["optimizer"])
        standing = self._standing(note)
        if note["size"] == self.config.size:
            self.state, self.best = state, found.opt_state.get("best")
            places = [old for old, _, _ in standing]
        else:
            places = list(range(len(standing)))
            moves = list(zip([old for old, _, _ in standing], places, strict=True))
            self.state = _moved(state, self.state, moves)
            if self.best is not None:
                self.best = _moved(found.opt_state["best"], self.best, moves)
        steps = hosts.whole(self.state.step)
        for place, (_, run, entry) in zip(places, standing, strict=True):
            slot = Slot(run, self._open(run), place, self.config, self._rows[place], int(steps[place]), entry)
            self.slots[place] = slot
            _LOG.debug("%s goes on in slot %d at step %d of %d", run.id, place, slot.step, slot.train_steps)
        self.queue = deque(run for run in self.queue if run not in [one for _, one, _ in standing])

    def _standing(self, note: Mapping[str, Any]) -> list[tuple[int, StackedRun, dict[str, Any]]]:
        """(old slot, run, its entry in the note) of every unfinished expert of a checkpoint."""
        runs = {run.id: run for run in self.queue}
        standing = [(place, runs[entry["id"]], entry) for place, entry in enumerate(note["slots"])
                    if entry is not None and entry["id"] in runs]
        for _, run, entry in standing:
            if entry["digest"] != run.digest:
                named = differences(entry.get("settings") or {}, run.settings)
                raise InputError(describe(
                    "The checkpoint is of another run: setting 'config_digest' differs",
                    where=f"{run.id} in {self.saver.folder}",
                    got="; ".join(named) if entry.get("settings") else f"{entry['digest']} there, "
                    f"{run.digest} here",
                    cure="choose an empty run folder, or go back to its first config"))
        if len(standing) > self.config.size:
            raise InputError(describe(
                "The stack is narrower than the checkpoint", where=self.saver.folder,
                got=f"{self.config.size} slots", expected=f"at least {len(standing)}, as many experts are "
                "under way", cure=f"go on with STACK_EXPERTS={note['size']}"))
        return standing


def check_note(note: Any, saver: Checkpoints) -> None:
    """Raises InputError unless the note of a checkpoint is what a stack wrote."""
    records.check_record({"note": note}, StackMarker, kind="checkpoint of a stack",
                         where=f"{storage.MARKER} in {saver.folder}")


def _moved(source: Any, target: Any, moves: list[tuple[int, int]]) -> Any:
    """Moves slots into an empty stack of `target`'s width: pairs of (old slot in `source`, new slot)."""
    def move(old: Array, new: Array) -> Array:
        host, values = np.zeros(new.shape, new.dtype), np.asarray(old)
        for start, end in moves:
            host[end] = values[start]
        return hosts.put(host, new.sharding, own=True)

    return jax.tree.map(move, source, target)
