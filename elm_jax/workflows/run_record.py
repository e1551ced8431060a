"""What a run writes of itself: versions, stage times, programs compiled."""

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from elm_jax import storage

PACKAGES = ("elm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio",
            "tensorflow", "sentencepiece")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def versions() -> dict[str, str]:
    """Versions of the packages that can change a number; absent ones are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class CompileCounter:
    """Counts the programs that XLA compiles in this process, and the seconds that takes."""

    def __init__(self) -> None:
        self.programs = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: object) -> None:
        if event == COMPILE_EVENT:
            self.programs += 1
            self.seconds += duration


class StageClock:
    """Seconds of each stage of a study, kept in a file so that a restart adds to them."""

    def __init__(self, path: storage.PathLike) -> None:
        self.path = storage.as_path(path)
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            value = storage.read_json(self.path, kind="stage clock", schema_version=1)
            self.seconds = dict(value["seconds"])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the stage, also when it ends by an error."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            storage.write_json(self.path, {"schema_version": 1, "seconds": self.seconds})
