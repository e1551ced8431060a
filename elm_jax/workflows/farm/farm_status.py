"""State of every expert of a farm."""

import os
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.runtime.leases import Attempt, Leases
from elm_jax.workflows.farm.jobs import Job, model_dir_of, read

STATES = ("waiting", "training", "stopped", "silent", "done", "failed")


def tries(attempts: list[Attempt]) -> int:
    """Number of attempts that count: not those ended by SIGTERM, nor those that the user reset."""
    forgiven = max((one.number for one in attempts if one.end and one.end["how"] == "forgiven"), default=0)
    return sum(one.number > forgiven and (one.end is None or one.end["how"] == "failed") for one in attempts)


def is_over(attempts: list[Attempt], limit: int) -> bool:
    """Whether an expert needs no more work: it is finished, or was given up."""
    last = attempts[-1] if attempts else None
    if last is None or last.end is None:
        return False
    failed = last.end["how"] == "failed"
    return last.end["how"] == "done" or (failed and (last.end.get("final") or tries(attempts) >= limit))


def status(folder: storage.PathLike, lease_seconds: float, limit: int) -> list[dict[str, Any]]:
    """Makes one row for each expert: its state, attempts, worker, step, seconds of silence, error.

    Silence is measured by the shared disk's clock, read from the time of a new file.
    """
    folder = storage.as_path(folder)
    leases = Leases(folder / "attempts", lease_seconds)
    now = _clock_of(folder)
    return [_status_row(leases, job, folder, now, limit) for job in read(folder)]


def _status_row(leases: Leases, job: Job, folder: Any, now: float | None, limit: int) -> dict[str, Any]:
    attempts = leases.attempts(job.id)
    last = attempts[-1] if attempts else None
    end = (last.end if last else None) or {}
    silent = None if last is None or end or now is None else max(0.0, now - last.beat[0] / 1e9)
    if last is None or end.get("how") == "forgiven":
        state = "waiting"
    elif not end:
        state = "training" if silent is None or silent <= leases.seconds else "silent"
    elif end["how"] == "failed":
        state = "failed" if is_over(attempts, limit) else "waiting"
    else:
        state = end["how"]
    steps = [path.name for path in _listing(model_dir_of(folder, job) / "checkpoints")
             if path.name.isdecimal() and storage.is_committed(path)]
    failures = [one.end.get("error", "") for one in attempts if one.end and one.end["how"] == "failed"]
    return {"expert": job.id, "task": job.config.task, "kind": job.config.kind, "state": state,
            "attempts": len(attempts), "worker": last.worker if last else None,
            "step": end.get("steps") or max(map(int, steps), default=0), "seconds": end.get("seconds"),
            "silent_seconds": silent, "error": failures[-1] if failures and state != "done" else None}


def _listing(folder: Any) -> list[Any]:
    return list(folder.iterdir()) if folder.exists() else []


def _clock_of(folder: Any) -> float | None:
    """The time by the clock of a folder's disk; None if nothing can be written there."""
    path = folder / f".clock-{os.getpid()}"
    try:
        path.write_text("")
        found = os.stat(path).st_mtime
        path.unlink()
    except OSError:
        return None
    return found


def forgive(folder: storage.PathLike, names: list[str], limit: int) -> list[str]:
    """Resets the failed attempts of experts, so that they are tried again; of all if none is named."""
    folder = storage.as_path(folder)
    leases = Leases(folder / "attempts", 3)
    known = [job.id for job in read(folder)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(describe("The farm has no such expert", where=folder, got=unknown))
    given_up = []
    for name in names or known:
        attempts = leases.attempts(name)
        if is_over(attempts, limit) and attempts[-1].end["how"] == "failed":
            lease = leases.claim(name, attempts[-1].number + 1)
            if lease is not None:
                lease.end("forgiven")
                given_up.append(name)
    return given_up
