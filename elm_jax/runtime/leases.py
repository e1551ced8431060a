"""Leases of work among workers that share only a folder, local or on a network disk.

Every attempt at a piece of work has a number and two files that are created once and never removed:
``<work>/<n>.claim.json``, created by the first worker (``O_EXCL``), and ``<work>/<n>.end.json``. The newest
claim counts. Its holder touches the file (the heartbeat). A worker that takes over a silent claim creates the
next number, which only one worker can; a holder that finds a newer number has lost the work.

Clocks of two hosts are never compared: a claim is silent if its modification time has not changed for the
length of a lease by the observer's own clock.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.runtime import records, storage

_CLAIM = re.compile(r"(\d+)\.claim\.json")


@dataclasses.dataclass(frozen=True)
class Claim:
    """Fields of a claim; one that is being written has none yet."""

    worker: str = ""


@dataclasses.dataclass(frozen=True)
class End:
    """Fields of an attempt's end: how it ended; a failure also has what is final of it, and its words."""

    how: str
    final: bool = False
    error: str = ""
    step: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One worker's attempt at a piece of work.

    Attributes:
        number: from 1.
        worker: who made it; empty while it is being written.
        end: how it ended, a JSON object with ``how``; None while it runs, or if its worker died.
        beat: heartbeat, which changes while its holder lives.
    """

    number: int
    worker: str
    end: dict[str, Any] | None
    beat: tuple[int, int]


class Leases:
    """The attempts at all pieces of work in one shared folder.

    Args:
        folder: shared by all workers.
        seconds: length of a lease: a claim that is silent for so long is lost.
        worker: name of this worker; by default made of host, process and a random word.

    Raises:
        InputError: a bucket.
    """

    def __init__(self, folder: storage.PathLike, seconds: float, worker: str | None = None) -> None:
        if not storage.is_local(folder):
            raise InputError(describe(
                "Claims need a file system on which one of several workers can make a file", where=folder,
                got="a bucket", expected="a local or network folder (NFS, Lustre, Filestore)",
                cure="keep the farm's folder there; its runs may lie in a bucket (--runs gs://...)"))
        self.folder = pathlib.Path(storage.as_path(folder))
        self.seconds = seconds
        self.worker = worker or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self._seen: dict[str, tuple[tuple[int, ...], float]] = {}
        self._lock = threading.Lock()

    def attempts(self, work: str) -> list[Attempt]:
        """Returns all attempts at a piece of work, in order.

        Raises:
            InputError: a file of an attempt is damaged.
        """
        try:
            names = os.listdir(self.folder / work)
        except FileNotFoundError:
            return []
        numbers = sorted(int(match[1]) for match in map(_CLAIM.fullmatch, names) if match)
        return [self._read(work, number) for number in numbers]

    def _read(self, work: str, number: int) -> Attempt:
        path = storage.require_file(self.folder / work / f"{number}.claim.json")
        with open(path, "rb") as file:
            # Opened, not only stat-ed: a network disk's client then asks the server again.
            facts = os.fstat(file.fileno())
            claim = _parse(file.read())
        records.check_record(claim, Claim, kind="claim of a worker", where=path)
        return Attempt(number, claim.get("worker", ""), self._read_end(work, number),
                       (facts.st_mtime_ns, facts.st_size))

    def _read_end(self, work: str, number: int) -> dict[str, Any] | None:
        path = storage.as_path(self.folder / work / f"{number}.end.json")
        if not os.path.lexists(path):
            return None
        return records.read_record(path, End, kind="end of an attempt")

    def is_silent(self, work: str, attempt: Attempt) -> bool:
        """Whether an unfinished attempt has had no heartbeat for a lease, as far as this worker saw."""
        now, state = time.monotonic(), (attempt.number, *attempt.beat)
        with self._lock:
            known = self._seen.get(work)
            if known is None or known[0] != state:
                self._seen[work] = (state, now)
                return False
        return now - known[1] > self.seconds

    def claim(self, work: str, number: int) -> "Lease | None":
        """Creates attempt `number`; returns None if another worker has created it."""
        path = self.folder / work / f"{number}.claim.json"
        with storage.guard_writes(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return None
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"schema_version": 1, "worker": self.worker}, file)
                file.flush()
                os.fsync(file.fileno())
        return Lease(self, work, number)


class Lease:
    """A claim that this worker holds; within a ``with`` block a thread sends heartbeats.

    Args:
        leases: the folder's leases.
        work: the piece of work.
        number: of the attempt.
    """

    def __init__(self, leases: Leases, work: str, number: int) -> None:
        self.work = work
        self.number = number
        self._leases = leases
        self._path = leases.folder / work / f"{number}.claim.json"
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, on_lost: Callable[[], None], watched: Callable[[], Iterable[str]]) -> None:
        """Starts the thread that sends heartbeats.

        Args:
            on_lost: called from the thread when another worker has taken over.
            watched: other pieces of work whose heartbeats the thread observes, so that a death is noticed
                while this worker is busy.
        """
        self._thread = threading.Thread(target=self._beat, args=(on_lost, watched), name="lease", daemon=True)
        self._thread.start()

    def _beat(self, on_lost: Callable[[], None], watched: Callable[[], Iterable[str]]) -> None:
        while not self._left.wait(self._leases.seconds / 6):
            # A network disk may be unavailable briefly; a damaged file is told by who takes that work.
            with contextlib.suppress(OSError, InputError):
                if self.is_lost():
                    on_lost()
                    return
                os.utime(self._path)
                for work in watched():
                    for attempt in self._leases.attempts(work)[-1:]:
                        if attempt.end is None:
                            self._leases.is_silent(work, attempt)

    def is_lost(self) -> bool:
        """Whether another worker has made a newer attempt."""
        return (self._path.parent / f"{self.number + 1}.claim.json").exists()

    def end(self, how: str, **facts: Any) -> None:
        """Writes how the attempt ended, and stops the thread."""
        self._left.set()
        if self._thread is not None:
            self._thread.join()
        storage.write_json(self._path.with_name(f"{self.number}.end.json"),
                           {"schema_version": 1, "how": how, "worker": self._leases.worker, **facts})


def _parse(content: bytes) -> dict[str, Any]:
    """Parses a JSON object; an incomplete file gives an empty one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
