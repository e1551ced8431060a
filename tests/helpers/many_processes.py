"""Several processes at once on one folder: forks of the test's process that compute nothing."""

import contextlib
import os
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from elm_jax.runtime.locks import alone


def at_once(functions: Sequence[Callable[[], object]], seconds: float = 60) -> list[str]:
    """Calls each function in a process of its own, all released together; returns errors, "" for none."""
    ready, go = os.pipe()
    started = [_fork(function, ready, go) for function in functions]
    os.close(ready)
    os.close(go)  # the others' reads end: all begin
    return [_error_of(pid, output, seconds) for pid, output in started]


def _fork(function: Callable[[], object], ready: int, go: int) -> tuple[int, int]:
    output, told = os.pipe()
    pid = _new_process()
    if pid:
        os.close(told)
        return pid, output
    status = 0
    try:
        os.close(go)
        os.read(ready, 1)
        function()
    except BaseException as error:
        os.write(told, (f"{type(error).__name__}: {error}\n" + traceback.format_exc()).encode()[:60_000])
        status = 1
    os._exit(status)  # without what the test's process does at its end


def _new_process() -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="os.fork")  # JAX's: its threads are not in the fork
        return os.fork()


def _error_of(pid: int, output: int, seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with os.fdopen(output, "rb") as file:
                text = file.read().decode()
            return text or ("" if status == 0 else f"status {os.waitstatus_to_exitcode(status)}")
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a process did not end within {seconds} s")


@contextlib.contextmanager
def keeping(folder: Path) -> Iterator[types.SimpleNamespace]:
    """Another process keeps the folder during the block; gives its `pid`, and `kill`."""
    ready, told = os.pipe()
    pid = _new_process()
    if not pid:
        try:
            with alone(folder, wait_seconds=20):
                (Path(folder) / "kept").write_text("by another process")
                os.write(told, b"kept")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 4) == b"kept", sys.exc_info()
    os.close(ready)
    gone = []

    def kill() -> None:
        if not gone:
            os.kill(pid, signal.SIGKILL)
            gone.append(os.waitpid(pid, 0))

    try:
        yield types.SimpleNamespace(pid=pid, kill=kill)
    finally:
        kill()
