"""Real processes, really killed: the run goes on as if nothing had happened."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
from checkout import HELPERS

SCRIPT = HELPERS.joinpath("tiny_run.py")
STEPS = 400


def start(model_dir: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(model_dir), str(STEPS)])


def rows_of(model_dir: pathlib.Path) -> list[dict]:
    path = model_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_rows(model_dir: pathlib.Path, count: int, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 180
    while len(rows_of(model_dir)) < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit, "the run is too slow"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted() -> list[float]:
    return [row["loss"] for row in tiny_run.train(None, STEPS).rows]


@pytest.mark.slow
def test_kill_9_at_a_random_moment_changes_no_loss(tmp_path, uninterrupted):
    chance = random.Random()
    process = start(tmp_path)
    wait_for_rows(tmp_path, chance.randint(1, STEPS // 2), process)
    time.sleep(chance.random() * 0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(rows_of(tmp_path)) < STEPS
    assert start(tmp_path).wait(timeout=180) == 0
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == uninterrupted


def test_sigterm_saves_and_exits_cleanly(tmp_path, uninterrupted):
    process = start(tmp_path)
    wait_for_rows(tmp_path, 8, process)
    process.terminate()
    assert process.wait(timeout=120) == tiny_run.STOPPED
    last = len(rows_of(tmp_path))
    assert last < STEPS
    saved = max(
        int(path.parent.name) for path in (tmp_path / "checkpoints").glob("*/COMMITTED.json")
    )
    assert saved == last  # nothing done was lost
    assert [row["loss"] for row in rows_of(tmp_path)] == uninterrupted[:last]
