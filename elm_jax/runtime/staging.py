"""Staging: folders that are written beside their final name and renamed when they are whole."""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.runtime.locks import alone
from elm_jax.runtime.storage import PathLike, as_path, guard_writes, is_local, remove_contents

QUIET_SECONDS = 0.5
"""So long a folder must stay away, after an error, before no late write is expected in it."""
_yielded: set[str] = set()
"""Folders within the blocks of `staged`."""


def check_free(folder: PathLike) -> None:
    """Raises InputError if the path exists and is not an empty folder."""
    folder = as_path(folder)
    try:
        is_free = not any(folder.iterdir())
    except FileNotFoundError:  # also where another process removes it just now
        is_free = True
    except NotADirectoryError:  # a file, or a name below one
        is_free = not folder.exists()
    if not is_free:
        raise InputError(describe("The target exists already", where=folder,
                                  expected="a name that is free, or an empty folder",
                                  cure="give another name, or remove it"))


@contextmanager
def staged(folder: PathLike, late_writes: bool = True) -> Iterator[epath.Path]:
    """Yields a folder to write into, which gets its final name if the block ends without an error.

    On a local disk that is ``<folder>.partial``, renamed at the end; what an interrupted run left there
    is removed first. Buckets cannot rename: there it is the folder itself, and the caller must write the file
    that readers look for last. A folder that another such block has yielded is yielded as it is: so a caller
    adds files to what a writer makes, and all get the final name at once.

    Args:
        folder: does not exist, or is empty.
        late_writes: after an error another thread may still write, as Orbax does; False where all writing is
            done by the block itself, which then fails without a wait.

    Raises:
        InputError: there is a folder of the final name already, and something in it; or another process
            is writing it.
    """
    folder = as_path(folder)
    if str(folder) in _yielded:
        yield folder
        return
    check_free(folder)
    if not is_local(folder):
        with guard_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _noted(folder):
            yield folder
        return
    with _renamed(folder) as target:
        try:
            with guard_writes(folder):
                remove_contents(target)
            with _noted(target):
                yield target
        except BaseException:
            _remove_for_good(target, quiet=QUIET_SECONDS if late_writes else 0.0)
            raise


@contextmanager
def resumable(folder: PathLike, journal: str) -> Iterator[epath.Path]:
    """Yields a folder as `staged` does, on a local disk, and keeps what an interrupted run left in it.

    Only an `InputError` removes it: an interruption, a full disk or a kill leave it for the next run, which
    decides what it can use.

    Args:
        folder: does not exist, or is empty.
        journal: name of the file that the caller creates first and removes last, after the block. A folder
            without one is not such a run's.

    Raises:
        InputError: as `staged`; the folder is not on a local disk; the contents of
            ``<folder>.partial`` are not such a run's.
    """
    check_free(folder)
    folder = as_path(folder)
    if not is_local(folder):
        raise InputError(describe("This can be written to a local disk only", where=folder,
                                  cure="write it there, and copy it"))
    with _renamed(folder) as target, _kept(target, journal):
        yield target


@contextmanager
def workspace(folder: PathLike, journal: str) -> Iterator[epath.Path]:
    """Yields a local folder for intermediate files; it is removed after the block unless interrupted.

    The next run finds what an interrupted run left in it.

    Args:
        folder: neither it nor its parent need exist.
        journal: as for `resumable`.

    Raises:
        InputError: another process works in it; it is not on a local disk; its contents are not such a run's.
    """
    folder = as_path(folder)
    if not is_local(folder):
        raise InputError(describe("This needs a local disk to work on", where=folder,
                                  cure="write it to a local disk, and copy it"))
    with alone(folder, again=False), _kept(folder, journal):
        yield folder
        _remove_with_journal(folder, journal)


@contextmanager
def _noted(folder: epath.Path) -> Iterator[None]:
    """Within the block `staged` knows the folder for one that it has yielded."""
    _yielded.add(str(folder))
    try:
        yield
    finally:
        _yielded.discard(str(folder))


def empty(folder: PathLike, keep: Collection[str] = ()) -> None:
    """Removes the contents of a local folder except some names; keeps the folder."""
    with guard_writes(folder):
        remove_contents(folder, keep)


def sync_names(folder: PathLike) -> None:
    """Waits until the file names in a local folder are on the disk (fsync of the folder)."""
    with guard_writes(folder):
        descriptor = os.open(as_path(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _renamed(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields ``<folder>.partial``, locked; renames it if the block ends without an error."""
    target = folder.parent / f"{folder.name}.partial"
    with alone(target, again=False):
        check_free(folder)  # another process may have ended in the meantime
        yield target
        with guard_writes(folder):
            if folder.exists():
                folder.rmdir()
            os.replace(target, folder)


@contextmanager
def _kept(folder: epath.Path, journal: str) -> Iterator[None]:
    """Keeps what an interrupted run left in a folder; refuses a folder that is not such a run's."""
    names = [path.name for path in folder.iterdir()]
    if names and not any(name.startswith(journal) for name in names):  # also the temporary file of one
        raise InputError(describe(
            "This folder is needed to work in, and holds something else", where=folder,
            got=", ".join(sorted(names)[:3]), expected=f"no such folder, or one with a {journal}",
            cure="move or remove it, or give another name for the output"))
    try:
        yield
    except InputError:
        _remove_with_journal(folder, journal)
        raise


def _remove_with_journal(folder: epath.Path, journal: str) -> None:
    """Removes a folder, its journal last, so that a kill leaves a folder that is still recognised.

    Orbax does not write into such folders: no late write can create a file again.
    """
    with suppress(OSError):
        remove_contents(folder, (journal,))
    shutil.rmtree(folder, ignore_errors=True)


def _remove_for_good(folder: epath.Path, quiet: float, limit: float = 10.0) -> None:
    """Removes a folder until it stays away for `quiet` seconds, for at most `limit` seconds.

    A write that Orbax gave up on may still create its files again.
    """
    shutil.rmtree(folder, ignore_errors=True)
    end = time.monotonic() + limit
    away_since = time.monotonic()
    while time.monotonic() < min(end, away_since + quiet):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            away_since = time.monotonic()
        time.sleep(0.05)
