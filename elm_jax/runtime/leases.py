"""Who works on what, among workers that share only a folder, local or on a network disk.

Every attempt at a piece of work has a number, and two files that are made once and never removed:
``<work>/<n>.claim.json``, made by whoever is first (``O_EXCL``), and ``<work>/<n>.end.json``. The newest
claim counts. Its holder touches it while it lives; who takes over a silent one makes the next number, which
only one can, and who finds a newer number than its own has lost the work.

No two hosts' clocks are compared: a claim is silent when its time of change, whatever it says, has not
changed for the length of a lease by the watcher's own clock.
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
from elm_jax.runtime import storage

_CLAIM = re.compile(r"(\d+)\.claim\.json")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a piece of work.

    Attributes:
        number: from 1.
        worker: who made it; empty while it is being written.
        end: how it ended, a JSON object with ``how``; None while it goes on, or if its worker died.
        beat: changes while its holder lives.
    """

    number: int
    worker: str
    end: dict[str, Any] | None
    beat: tuple[int, int]


class Leases:
    """The attempts at all pieces of work in one folder.

    Args:
        folder: shared by all workers.
        seconds: a claim that is silent for so long is its worker's no more.
        worker: name of this one; made of host, process and a random word by default.

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
        """All attempts at a piece of work, in order."""
        try:
            names = os.listdir(self.folder / work)
        except FileNotFoundError:
            return []
        numbers = sorted(int(match[1]) for match in map(_CLAIM.fullmatch, names) if match)
        return [self._read(work, number) for number in numbers]

    def _read(self, work: str, number: int) -> Attempt:
        with open(self.folder / work / f"{number}.claim.json", encoding="utf-8") as file:
            # Opened, not only looked up: a network disk's client then asks the server anew.
            facts = os.fstat(file.fileno())
            worker = _parse(file.read()).get("worker", "")
        end = None
        with contextlib.suppress(FileNotFoundError):
            end = _parse((self.folder / work / f"{number}.end.json").read_text(encoding="utf-8")) or None
        return Attempt(number, worker, end, (facts.st_mtime_ns, facts.st_size))

    def is_silent(self, work: str, attempt: Attempt) -> bool:
        """Whether an attempt that has no end has shown no life for a lease, as far as this worker saw."""
        now, state = time.monotonic(), (attempt.number, *attempt.beat)
        with self._lock:
            known = self._seen.get(work)
            if known is None or known[0] != state:
                self._seen[work] = (state, now)
                return False
        return now - known[1] > self.seconds

    def claim(self, work: str, number: int) -> "Lease | None":
        """Makes attempt `number`; None if another worker did."""
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
    """A claim that this worker holds: inside ``with``, a thread keeps it alive.

    Args:
        leases: whose.
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
        """Starts the thread.

        Args:
            on_lost: called from it when another worker has taken over.
            watched: pieces of work whose holders it watches as well, so that a death is noticed while this
                worker is busy.
        """
        self._thread = threading.Thread(target=self._beat, args=(on_lost, watched), name="lease", daemon=True)
        self._thread.start()

    def _beat(self, on_lost: Callable[[], None], watched: Callable[[], Iterable[str]]) -> None:
        while not self._left.wait(self._leases.seconds / 6):
            with contextlib.suppress(OSError):  # a network disk that is away for a moment
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


def _parse(text: str) -> dict[str, Any]:
    """A JSON object; an empty one for a file that is being written."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
