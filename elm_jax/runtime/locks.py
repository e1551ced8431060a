"""Locks of folders: one process at a time writes a folder, and the system releases what a dead one held."""

import fcntl
import logging
import os
import resource
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.runtime import hosts, lifeline
from elm_jax.runtime.storage import PathLike, as_path, guard_writes, is_local

logger = logging.getLogger(__name__)
LEAVING_SECONDS = 2.0
"""So long a process that was killed may hold its locks while the system takes its memory back."""
CHANGE_SECONDS = 600.0
"""So long one short change of a folder, such as an expert more in a library, waits for those before it."""
_REMOVED_SECONDS = 2.0
"""So long a folder that others remove as fast as it is made is made again."""
_POLL_SECONDS = 0.05
_SAY_AFTER_SECONDS = 1.0


class FolderTaken(InputError):
    """Another process keeps the folder."""


_held: dict[tuple[int, int], tuple[int, int]] = {}
"""Process and thread that hold a folder here, by the folder's device and inode."""
_made: dict[int, list[epath.Path]] = {}
"""Folders that were made to be locked, by the descriptor."""


@contextmanager
def alone(folder: PathLike, wait_seconds: float | None = None, *, again: bool = True) -> Iterator[bool]:
    """Keeps a folder for this block alone; other processes, and other threads of this one, are refused.

    Yields whether the others are refused.

    The folder's own descriptor is locked (flock): nothing is written, and the system releases the lock when
    this process ends in any way. The folder is made first if there is none, and removed again if it is still
    empty at the end. Two places cannot be kept, and nothing is locked there: buckets, and disks without
    locks; on a network's disk another host's processes may not be seen.

    Of a run of several processes the first one alone holds the lock; the others go on at once.

    Args:
        folder: to keep.
        wait_seconds: at most so long it waits until the folder is free: `CHANGE_SECONDS` for short changes,
            which read again, under the lock, what they change; None, for long work, refuses after
            `LEAVING_SECONDS`.
        again: whether a thread that keeps the folder already may enter once more.

    Raises:
        FolderTaken: another process keeps the folder; the message names it where the system tells.
        InputError: there is a file of this name.
        RunError: the folder cannot be made.
    """
    folder = as_path(folder)
    if not is_local(folder) or not hosts.is_first() or (again and _is_mine(folder)):
        yield is_local(folder)
        return
    descriptor, made, is_locked = _take(folder, LEAVING_SECONDS if wait_seconds is None else wait_seconds)
    key = _key(os.fstat(descriptor))
    before = _held.get(key)
    _made[descriptor] = made
    _held[key] = (os.getpid(), threading.get_ident())
    try:
        yield is_locked
    finally:
        if before is None:
            _held.pop(key, None)
        _remove_empty(_made.pop(descriptor))
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have the descriptor too
        os.close(descriptor)


@contextmanager
def alone_in_each(folders: Sequence[PathLike]) -> Iterator[None]:
    """Keeps several folders for this block as `alone` does for long work.

    Each holds a file open: the process's own limit on them rises by as many, as far as the system lets it.

    Raises:
        FolderTaken, InputError, RunError: as `alone`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + len(folders)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY:
        with suppress(ValueError, OSError):  # the system has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    with ExitStack() as kept:
        for folder in folders:
            kept.enter_context(alone(folder))
        yield


def _remove_empty(folders: list[epath.Path]) -> None:
    with suppress(OSError):  # not empty: the usual case
        for path in folders:
            os.rmdir(path)


lifeline.BEFORE_LEAVING.append(lambda: [_remove_empty(made) for made in list(_made.values())])


def _key(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _is_mine(folder: epath.Path) -> bool:
    """Whether this thread keeps the folder already."""
    try:
        return _held.get(_key(os.stat(folder))) == (os.getpid(), threading.get_ident())
    except OSError:
        return False


def _take(folder: epath.Path, wait_seconds: float) -> tuple[int, list[epath.Path], bool]:
    """Locks a folder; returns its descriptor, the folders that were made for it, and whether it is locked."""
    start, told, made = time.monotonic(), False, []
    while True:
        taken = _try(folder, made)
        if taken is not None:
            return taken[0], made, taken[1]
        waited = time.monotonic() - start
        if waited >= wait_seconds:
            raise FolderTaken(describe(
                "Another process is writing this folder", where=folder, got=holder_of(folder),
                expected=f"a free folder within {wait_seconds:g} s" if wait_seconds else None,
                cure="wait for it, or give another name"))
        if waited > _SAY_AFTER_SECONDS and not told:
            told = True
            logger.info("waits for another process that writes %s (%s)", folder,
                        holder_of(folder) or "which one is not known")
        time.sleep(_POLL_SECONDS)


def _try(folder: epath.Path, made: list[epath.Path]) -> tuple[int, bool] | None:
    """Locks a folder without a wait; returns its descriptor, and whether it is locked; None if it is taken.

    Adds to `made` what it made.
    """
    end = time.monotonic() + _REMOVED_SECONDS
    while True:
        with guard_writes(folder):
            if _is_file(folder):
                raise InputError(describe("A folder is expected here", where=folder, got="a file",
                                          cure="give another name"))
            try:
                made[:0] = _make(folder)
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:  # another process has removed it, or one above it, in between
                if time.monotonic() > end or any(
                        os.path.islink(path) and not path.exists() for path in (folder, *folder.parents)):
                    raise  # also where the system lets no folder be made, as in /proc
                continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
                return descriptor, True
        except FileNotFoundError:  # the one before has renamed or removed the folder at its end
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks: other processes cannot be detected
            return descriptor, False
        os.close(descriptor)


def _is_file(path: epath.Path) -> bool:
    """Whether there is something else than a folder; one look, for others may remove the folder meanwhile."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False


def _make(folder: epath.Path) -> list[epath.Path]:
    """Makes a folder and those above it; returns the ones that were not there, the lowest first."""
    made = []
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            with suppress(FileExistsError):  # another process makes it too
                os.mkdir(path)
                made.insert(0, path)
    return made


def holder_of(folder: PathLike) -> str | None:
    """Names the process that keeps a folder, as far as this host's system tells (Linux: /proc/locks)."""
    with suppress(OSError, ValueError, IndexError):
        facts = os.stat(as_path(folder))
        place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # number, FLOCK, ADVISORY, WRITE, process, place; "->" before who waits
            if fields[1] == "FLOCK" and fields[5] == place:
                if int(fields[4]) == os.getpid():
                    return "this process itself"
                words = Path(f"/proc/{int(fields[4])}/cmdline").read_bytes().decode(errors="replace")
                command = "".join(letter if letter.isprintable() else " " for letter in words).strip()
                return f"process {int(fields[4])}: {command[:200]}"
    return None
