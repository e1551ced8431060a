"""Writes merged leaves into safetensors files: in slices, with all cores, resumable.

A journal beside the files lists the leaves that are on the disk. A run that finds the journal of the same
merge resumes behind it.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from elm_jax.formats.model import TensorSpec
from elm_jax.formats.tensors.shards_in_place import ShardsInPlace
from elm_jax.merging.stream import LeafMerge
from elm_jax.runtime import staging, storage

logger = logging.getLogger(__name__)
JOURNAL = "merge.journal"
_FLUSH_BYTES = 1 << 26


def default_workers() -> int:
    """Default number of threads: one for each available core, at most 8, since each needs memory."""
    return min(8, len(os.sched_getaffinity(0)))


def write_merged(folder: epath.Path, leaves: Sequence[LeafMerge], identity: Mapping[str, Any],
                 max_shard_bytes: float, *, workers: int | None = None, quiet: bool = False) -> None:
    """Writes merged leaves into the files of a checkpoint; the journal stays until `end_journal`.

    Args:
        folder: exists; empty, or left by an interrupted run of the same merge.
        leaves: in the order of the files.
        identity: of the merge; a run with another identity is not resumed. JSON-ready.
        max_shard_bytes: most bytes of a file.
        workers: threads; None for one a core, at most 8.
        quiet: no progress bar.

    Raises:
        InputError: a value that is not finite.
        RunError: the disk is full.
    """
    specs = {leaf.path: TensorSpec(leaf.shape, leaf.dtype.name) for leaf in leaves}
    files = ShardsInPlace(folder, specs, max_shard_bytes)
    done = _open_journal(files, identity)
    rest = [leaf for leaf in leaves if leaf.path not in done]
    if done:
        logger.info("going on: %d of %d leaves are done", len(done), len(leaves))
    with files, _Journal(folder, files) as journal, \
            ThreadPoolExecutor(workers or default_workers()) as pool, _bar(quiet) as bar:
        task = bar.add_task("merging", total=sum(spec.nbytes for spec in specs.values()))
        bar.advance(task, sum(specs[name].nbytes for name in done))
        for leaf in rest:
            leaf.look(pool)
            for size in pool.map(lambda span, leaf=leaf: _write_rows(files, leaf, *span), leaf.slices()):
                bar.advance(task, size)
            leaf.forget()
            journal.add(leaf.path)
        journal.close()
        files.finish()


def end_journal(folder: epath.Path) -> None:
    """Removes the journal, last of all: a folder without a journal is not resumed."""
    with storage.guard_writes(folder):
        (folder / JOURNAL).unlink(missing_ok=True)


def has_journal_of(folder: epath.Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder has the journal of a run of the same merge."""
    return _journal_lines(folder)[:1] == [_line(identity)]


def empty_workspace(folder: epath.Path) -> None:
    """Removes all files that `write_merged` wrote, the journal last."""
    staging.empty(folder, keep=(JOURNAL,))
    end_journal(folder)


def _write_rows(files: ShardsInPlace, leaf: LeafMerge, start: int, stop: int) -> int:
    values = leaf.rows(start, stop)
    files.write(leaf.path, start * leaf.width, values)
    return values.nbytes


def _bar(quiet: bool) -> Progress:
    return Progress("[progress.description]{task.description}", BarColumn(), DownloadColumn(),
                    TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=quiet,
                    transient=True)


def _open_journal(files: ShardsInPlace, identity: Mapping[str, Any]) -> set[str]:
    """Opens the journal; returns the finished leaves. Empties a folder with another merge's journal.

    At any moment the journal exists and names only finished leaves: the leaves of a missing file are removed
    from it before the file is created again.
    """
    path, lines = files.folder / JOURNAL, _journal_lines(files.folder)
    same = lines[:1] == [_line(identity)]
    staging.empty(files.folder, keep=(JOURNAL, *(files.files if same else ())))
    done = sorted(_names(lines[1:]) & files.held()) if same else []
    storage.write_text(path, "".join(f"{_line(value)}\n" for value in (identity, *done)))
    staging.sync_names(files.folder)
    return set(done)


def _journal_lines(folder: epath.Path) -> list[str]:
    path = folder / JOURNAL
    return path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else []


def _names(lines: Sequence[str]) -> set[str]:
    """Leaf names in a journal's lines, up to the first line that a power failure has damaged."""
    names = set()
    for line in lines:
        try:
            name = json.loads(line)
        except ValueError:
            break
        if not isinstance(name, str):
            break
        names.add(name)
    return names


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


class _Journal:
    """Lists finished leaves, each after it is on the disk; a separate thread waits for the disk."""

    def __init__(self, folder: epath.Path, files: ShardsInPlace) -> None:
        self._path, self._files = folder / JOURNAL, files
        self._waiting: list[str] = []
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1)
        self._last: Any = None

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def add(self, name: str) -> None:
        """Adds a leaf that has been written."""
        self._waiting.append(name)
        self._bytes += self._files.specs[name].nbytes
        if self._bytes >= _FLUSH_BYTES and (self._last is None or self._last.done()):
            self._start()

    def _start(self) -> None:
        if self._last is not None:
            self._last.result()
        names, self._waiting, self._bytes = self._waiting, [], 0
        self._last = self._pool.submit(self._flush, names)

    def _flush(self, names: Sequence[str]) -> None:
        self._files.flush()
        with storage.guard_writes(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(f"{_line(name)}\n" for name in names))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Waits until all added leaves are on the disk and in the journal."""
        self._start()
        self._last.result()
