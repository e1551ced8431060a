"""Records of a run: package versions, stage times, compiled programs, inputs of derived files."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from elm_jax.runtime import records, storage

logger = logging.getLogger(__name__)
PACKAGES = ("elm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio",
            "tensorflow", "sentencepiece")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def versions() -> dict[str, str]:
    """Versions of the packages that can change a number; missing packages are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(value: Any) -> str:
    """Short hash of a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class MadeOfRecord:
    """Fields of ``made_of.json``: by derived file the hash of what it was made of."""

    made_of: dict[str, str]


@dataclasses.dataclass(frozen=True)
class ClockRecord:
    """Fields of ``stages.json``: seconds by stage."""

    seconds: dict[str, float]


class MadeOf:
    """Records of what each derived file was made, so that it is made again if that has changed.

    A file is recorded after it is whole: if a kill comes in between, it is made once more.
    """

    def __init__(self, path: storage.PathLike) -> None:
        self.path = storage.as_path(path)
        self.known: dict[str, str] = {}
        if self.path.exists():
            found = records.read_record(self.path, MadeOfRecord, kind="record of artefacts")
            self.known = dict(found["made_of"])

    def fits(self, name: str, value: Any) -> bool:
        """Whether the recorded value of a file equals this one."""
        return self.known.get(name) == digest(value)

    def record(self, name: str, value: Any) -> None:
        """Records that a file is whole and was made of this value."""
        self.known[name] = digest(value)
        storage.write_json(self.path, {"schema_version": 1, "made_of": self.known})


class CompileCounter:
    """Counts the programs that XLA compiles in this process, and their compile seconds."""

    def __init__(self) -> None:
        self.programs = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: object) -> None:
        if event == COMPILE_EVENT:
            self.programs += 1
            self.seconds += duration

    def log(self) -> None:
        """Logs what was compiled, at the end of a run."""
        logger.info("compiled %d programs in %.1f s", self.programs, self.seconds)


class StageClock:
    """Seconds of each stage of a study, kept in a file so that a restarted study adds to them.

    The file is also written while a stage runs: a killed session loses at most its last `EVERY` seconds.
    """

    EVERY = 10.0

    def __init__(self, path: storage.PathLike) -> None:
        self.path = storage.as_path(path)
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            self.seconds = dict(records.read_record(self.path, ClockRecord, kind="stage clock")["seconds"])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a stage, also if the block ends with an error."""
        start, before = time.monotonic(), self.seconds.get(name, 0.0)
        ended = threading.Event()

        def write() -> None:
            self.seconds[name] = before + time.monotonic() - start
            storage.write_json(self.path, {"schema_version": 1, "seconds": self.seconds})

        def keep_writing() -> None:
            while not ended.wait(self.EVERY):
                write()

        thread = threading.Thread(target=keep_writing, name="stage clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write()
