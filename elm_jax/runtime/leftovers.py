"""Temporary files and folders beside their final names, and the removal of what dead processes left of them.

A temporary name says which host made it, ``x.json.tmp-<host>-<process>-<word>``, and its maker keeps the
file, or the folder, locked (flock) until it has its final name: the system releases it when the process
ends in any way. What is locked is alive. What is not, and was made on this host, is dead. Locks of another
host may not be seen here (some network disks keep them to one host): what it made is dead when it did not
change for a day. Disks without locks tell nothing, and are judged in the same way.
"""

import atexit
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

SILENT_SECONDS = 86_400.0
"""What another host made, or a disk without locks holds, counts as dead if it did not change for so long."""
PARTIAL = ".partial"
"""Last part of the names of folders that are being written."""
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r".+\.tmp-(?:([0-9a-f]{8})-)?\d+-[0-9a-f]{8}(?:\.partial)?")  # older: no host


@contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """Yields a new file beside a path, open to write and locked; the block gives it its final name.

    It is removed if the block ends with an error.
    """
    file, name, process = None, "", os.getpid()
    while file is None:
        name = _new_name(path)
        file = open(name, "xb")  # noqa: SIM115  closed below
        if not _hold(file.fileno(), name):  # another process took it for a dead one's
            file = file.close()
    try:
        with file:
            yield file
    except BaseException:
        if os.getpid() == process:  # not what is forked from it, and ends
            with suppress(FileNotFoundError):
                os.remove(name)
        raise


@contextmanager
def new_folder(path: str, mode: int = 0o777) -> Iterator[str]:
    """Yields a new folder beside a path, locked; the block renames it, or else it is removed at the end."""
    descriptor, name, process = None, "", os.getpid()
    while descriptor is None:
        name = _new_name(path) + PARTIAL
        os.makedirs(name, mode)
        descriptor = os.open(name, os.O_RDONLY)
        if not _hold(descriptor, name):
            descriptor = os.close(descriptor)
    try:
        yield name
    finally:
        if os.getpid() == process:
            shutil.rmtree(name, ignore_errors=True)
            os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Yields a temporary folder of the system's, for this user alone; it is removed after the block."""
    place = tempfile.gettempdir()
    clear(place)
    with new_folder(os.path.join(place, "elm"), 0o700) as folder:
        yield folder


def process_folder() -> str:
    """A folder as `scratch_folder` makes it, which is there as long as this process."""
    return _folder_of(os.getpid())


@functools.cache
def _folder_of(process: int) -> str:  # what is forked gets one of its own
    del process
    within = ExitStack()
    atexit.register(within.close)
    return within.enter_context(scratch_folder())


def clear(folder: str, older: re.Pattern[str] | None = None) -> None:
    """Removes from a folder what dead processes left in it under temporary names.

    Args:
        folder: to clear.
        older: other names that older versions gave there, in a folder where no user gives such names.
    """
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        found = []
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match or (older is not None and older.fullmatch(entry.name)):
                found.append((entry.path, match and match[1]))
        for path, host in found:
            with suppress(OSError):  # another process was faster, or it is another user's
                _remove_dead(path, host)


def _new_name(path: str) -> str:
    return f"{path}.tmp-{HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def _hold(descriptor: int, name: str) -> bool:
    """Locks what was just made; returns False if another process has removed it in between."""
    with suppress(OSError):  # a disk without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return _is_named(descriptor, name)


def _is_named(descriptor: int, name: str) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(name), os.fstat(descriptor))
    return False


def _remove_dead(path: str, host: str | None) -> None:
    how = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR  # network disks lock what is open for writing
    descriptor = os.open(path, how | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            return  # it lives
        except OSError:
            locked = False
        facts = os.fstat(descriptor)
        known_dead = locked and host == HOST
        if (known_dead or time.time() - facts.st_mtime > SILENT_SECONDS) and _is_named(descriptor, path):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
    finally:
        os.close(descriptor)
