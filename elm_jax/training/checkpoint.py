"""Checkpoints of a training state: saved asynchronously, the newest few kept, never read half written.

``<model_dir>/checkpoints/<step>/state`` is written by Orbax with its commit-file protocol (no rename, so
buckets work), and each process writes its own shards; ``<step>/COMMITTED.json``, written after it by the
first process, says that the step is whole and holds the facts of the run. Each process restores the shards of
its own devices, on any mesh of any number of processes. The frozen base is not part of a checkpoint.
"""

import dataclasses
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from elm_jax.errors import InputError, RunError, describe
from elm_jax.runtime import hosts, records, storage, trees
from elm_jax.runtime.differences import as_json, differences
from elm_jax.training.state import TrainState

_LOG = logging.getLogger(__name__)
_STATE = "state"
_DIGEST, _OF_ROWS = "config_digest", ("stream.num_examples", "stream.first_batch")


@dataclasses.dataclass(frozen=True)
class Marker:
    """Fields of a checkpoint's marker; those with a default came with later versions.

    Attributes:
        step: of the run.
        leaves: dtype and shape of every leaf, by path.
        facts: that a run must share to resume from it, as text.
        settings: that decided them.
        note: what the loop keeps in it.
    """

    step: int
    leaves: dict[str, str]
    facts: dict[str, str]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: Any = None


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving it waits for the last save.

    Args:
        model_dir: the run's folder, local or bucket.
        facts: JSON values that a resumed run must share, for example the config's digest.
        keep_checkpoints: how many whole checkpoints stay, at least 1.
        settings: of the run beside them, JSON-ready, which name what differs where a fact is but a digest.
    """

    def __init__(
        self, model_dir: storage.PathLike, facts: dict[str, Any], keep_checkpoints: int = 2,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if keep_checkpoints < 1:
            raise InputError(describe("keep_checkpoints must be at least 1", got=keep_checkpoints))
        folder = storage.as_path(model_dir) / "checkpoints"
        # Orbax wants absolute local paths.
        self.folder = folder.resolve() if storage.is_local(folder) else folder
        self.facts = facts
        self._settings = as_json({**{name: fact for name, fact in facts.items() if name != _DIGEST},
                                  **(settings or {})})
        self.keep_checkpoints = keep_checkpoints
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(),
            temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath,
        )
        # One thread of ours behind Orbax's: the marker is written after Orbax's last byte.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except RunError:
            if error is None:
                raise
            _LOG.exception("The last checkpoint was not written")
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising. Half-written ones are not listed."""
        if not self.folder.exists():
            return []
        names = (path.name for path in self.folder.iterdir())
        return sorted(
            int(name) for name in names
            if name.isdecimal() and storage.is_committed(self.folder / name)
        )

    def save(self, state: TrainState, note: Any = None) -> None:
        """Starts saving; returns when the state is copied, so that its buffers may be donated.

        Args:
            state: what to save; its step names the checkpoint.
            note: JSON value that goes into the checkpoint's marker, for `note` to read.

        Raises:
            RunError: this save could not start, or the one before it failed, as on a full disk.
        """
        self.wait()
        step = int(state.step)
        target = self.folder / str(step)
        leaves = _leaf_facts(state)
        with storage.guard_writes(target):
            storage.begin(target)
            hosts.barrier()
            self._checkpointer.save(target / _STATE, args=ocp.args.StandardSave(state))
        self._saving = self._thread.submit(self._finish, target, leaves, note)

    def wait(self) -> None:
        """Waits until the pending save is whole.

        Raises:
            RunError: it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, like: TrainState) -> TrainState | None:
        """Reads the newest whole checkpoint; None if there is none.

        Args:
            like: abstract state (ShapeDtypeStruct with shardings) of the present run; the mesh may
                be another than that which saved.

        Raises:
            InputError: the checkpoint is another run's: names the first leaf or fact that differs.
        """
        steps = hosts.by_first(self.steps)  # on a network disk the others may see an older list
        if not steps:
            return None
        source = self.folder / str(steps[-1])
        self._check(source, like)
        _LOG.info("Restoring step %d from %s", steps[-1], source)
        with storage.guard_reads(source):
            return self._checkpointer.restore(source / _STATE, args=ocp.args.StandardRestore(like))

    def note(self) -> Any:
        """Returns the note of the newest whole checkpoint; None if there is no checkpoint."""
        return hosts.by_first(self._note)

    def _note(self) -> Any:
        steps = self.steps()
        if not steps:
            return None
        return _marker_of(self.folder / str(steps[-1])).get("note")

    def _check(self, source: epath.Path, like: TrainState) -> None:
        marker = _marker_of(source)
        for kind, saved, wanted in (
            ("leaf", marker["leaves"], _leaf_facts(like)),
            ("setting", marker["facts"], _as_text(self.facts)),
        ):
            for name in sorted(saved.keys() | wanted.keys()):
                if saved.get(name) != wanted.get(name):
                    self._refuse_named(source, marker.get("settings") or {})
                    raise InputError(
                        describe(
                            f"The checkpoint is of another run: {kind} {name!r} differs",
                            where=source / storage.MARKER, got=saved.get(name, "missing"),
                            expected=wanted.get(name, "missing"),
                            cure="choose an empty run folder, or go back to its first config",
                        )
                    )

    def _refuse_named(self, source: epath.Path, saved: dict[str, Any]) -> None:
        """Raises the error that names the settings that differ, where the checkpoint has them."""
        named = differences(saved, self._settings) if saved else []
        settings = [each for each in named if not each.startswith(_OF_ROWS)]
        rows = [each for each in named if each.startswith(_OF_ROWS[0])] or ["as many rows of other contents"]
        if named:
            raise InputError(describe(
                "The checkpoint is of another run: settings differ" if settings
                else "The checkpoint was trained on other rows: they were changed since", where=source,
                got="; ".join(settings or rows),
                cure="choose an empty run folder, or go back to its first " + (
                    "settings" if settings else "rows")))

    def _finish(self, target: epath.Path, leaves: dict[str, str], note: Any) -> None:
        """Runs in the thread: waits for Orbax, writes the marker, drops old checkpoints."""
        with storage.guard_writes(target):
            self._checkpointer.wait_until_finished()
            if not hosts.is_first():
                return
            storage.commit(
                target, {"step": int(target.name), "leaves": leaves,
                         "facts": _as_text(self.facts), "settings": self._settings,
                         **({} if note is None else {"note": note})},
            )
            kept = [str(step) for step in self.steps()[-self.keep_checkpoints:]]
            for path in list(self.folder.iterdir()):  # also what a killed run left half written
                if path.name.isdecimal() and path.name not in kept and _is_of_a_run(path):
                    storage.remove(path)


def _is_of_a_run(checkpoint: epath.Path) -> bool:
    """Whether a folder is a checkpoint of this program, whole or half written, and not another program's."""
    names = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else {checkpoint.name}
    return storage.MARKER in names or all(name.startswith((_STATE, storage.MARKER)) for name in names)


def _marker_of(checkpoint: epath.Path) -> dict[str, Any]:
    """What the marker of a whole checkpoint holds; InputError if it is not this checkpoint's."""
    path = checkpoint / storage.MARKER
    marker = records.check_record(storage.read_marker(checkpoint, "checkpoint"), Marker,
                                  kind="marker of a checkpoint", where=path)
    if str(marker["step"]) != checkpoint.name:
        raise InputError(describe("The marker of a checkpoint is not the one that was written",
                                  where=f"{path}: step", got=marker["step"], expected=checkpoint.name,
                                  cure="remove this checkpoint: the run goes on from the one before it"))
    return marker


def _leaf_facts(state: TrainState) -> dict[str, str]:
    """'dtype[shape]' of every leaf of the overlay and of the optimiser's state, by path."""
    facts = {
        path: f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in trees.flatten(state.overlay).items()
    }
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        facts[f"opt_state{jax.tree_util.keystr(keys)}"] = f"{leaf.dtype.name}{list(leaf.shape)}"
    return facts


def _as_text(facts: dict[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in facts.items()}
