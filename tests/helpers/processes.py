"""Real `elm` processes on this machine: one run of several, each with simulated devices of its own."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from checkout import ROOT

from elm_jax.errors import LOST_PROCESS

ROUNDING = 2e-5
"""Relative: sums over devices are taken in another order on another mesh, in float32."""
LIMIT = 60.0
"""Seconds within which the others end when one process dies."""
CHATTER = ("[Gloo]", "Expected number", " peer ranks", "All log messages before", "cudart_stub")


def free_address() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def environment(devices: int, **more: str) -> dict[str, str]:
    """Of a process with simulated devices."""
    flags = (f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
             "--xla_llvm_disable_expensive_passes=true")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


class Run:
    """The processes of one run.

    Args:
        words: of the command line, the same in all; or one list for each process.
        count: how many.
        devices: simulated devices of each.
    """

    def __init__(self, folder: pathlib.Path, words, count: int = 2, devices: int = 4,
                 program=("-m", "elm_jax.cli"), **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        address = free_address()
        self.errors = [folder / f"stderr_{time.monotonic_ns()}_{number}" for number in range(count)]
        self.outputs = [path.with_name(path.name.replace("err", "out")) for path in self.errors]
        each = words if isinstance(words[0], list | tuple) else [words] * count
        self.processes = []
        for number, own in enumerate(each):
            place = {"ELM_COORDINATOR": address, "ELM_NUM_PROCESSES": str(count),
                     "ELM_PROCESS_ID": str(number)}
            with open(self.errors[number], "w") as err, open(self.outputs[number], "w") as out:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *program, *map(str, own)], stdout=out, stderr=err, cwd=ROOT,
                    env=environment(devices, **{**(place if count > 1 else {}), **env})))

    def wait(self, timeout: float = 900) -> list[int]:
        """Their exit statuses; an error that shows where each of them stands if they do not end in time."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not at an end after {timeout:.0f} s\n{self._standing()}") from None
        finally:
            self.stop()

    def _standing(self) -> str:
        """What each process said last, and the stacks of its threads; ends them."""
        alive = [process for process in self.processes if process.poll() is None]
        for process in alive:  # all at once: the first one's end would be the others' end too
            process.send_signal(signal.SIGBUS)  # Python's fault handler prints all stacks
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        return "\n".join(f"== process {number}\n{self.said(number)[-6000:]}"
                         for number in range(len(self.processes)))

    def said(self, number: int | None = None) -> str:
        """Standard error of one, or of all, without the talk of the libraries."""
        paths = self.errors if number is None else [self.errors[number]]
        lines = [line for path in paths for line in path.read_text(errors="replace").splitlines()]
        return "\n".join(line for line in lines if not any(word in line for word in CHATTER))

    def until(self, condition, timeout: float = 900) -> None:
        """Waits for a condition while all of them run."""
        end = time.monotonic() + timeout
        while not condition():
            ended = [process.poll() for process in self.processes]
            assert all(status is None for status in ended), f"{ended}\n{self.said()[-3000:]}"
            assert time.monotonic() < end, "too slow"
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def newest_checkpoint(model_dir: pathlib.Path) -> int:
    """The newest whole checkpoint's step; 0 if there is none."""
    steps = [int(path.parent.name) for path in (model_dir / "checkpoints").glob("*/COMMITTED.json")]
    return max(steps, default=0)


def kill(run, number, sig, at_least, config):
    """Sends a signal to one process once there is a newer checkpoint; statuses, and seconds to the end."""
    run.until(lambda: newest_checkpoint(pathlib.Path(config.model_dir)) >= at_least)
    run.processes[number].send_signal(sig)
    start = time.monotonic()
    return run.wait(), time.monotonic() - start


def assert_lost(run, dead, statuses, seconds):
    """The survivor says once whom it lost, and ends with a status that is worth a restart."""
    assert statuses[dead] == -signal.SIGKILL and statuses[1 - dead] == LOST_PROCESS, run.said()
    assert seconds < LIMIT
    assert run.said().count("A process of this run was lost") == 1
    assert f"process {dead} of 2" in run.said(1 - dead) and "newest checkpoint" in run.said(1 - dead)
