"""A real stack, really killed: it goes on as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_stack
from checkout import HELPERS

from elm_jax.runtime import storage, trees

pytestmark = pytest.mark.slow
SCRIPT = HELPERS.joinpath("tiny_stack.py")
TABLE = tiny_stack.table(20)
SLOTS = 2


def start(folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(SLOTS)])


def num_rows(folder: pathlib.Path) -> int:
    return sum(len(tiny_stack.rows_in(folder / row.id)) for row in TABLE)


def wait_for_rows(folder: pathlib.Path, count: int, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 900
    while num_rows(folder) < count:
        assert process.poll() is None, "the stack ended before it could be killed"
        assert time.monotonic() < limit, "the stack is too slow"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted():
    return tiny_stack.stack(TABLE, SLOTS)[0]


def assert_exact(folder: pathlib.Path, expected: dict) -> None:
    for row in TABLE:
        rows = tiny_stack.rows_in(folder / row.id)
        assert [one["step"] for one in rows] == list(range(1, row.train_steps + 1)), row.id
        assert [one["loss"] for one in rows] == [one["loss"] for one in expected[row.id].rows], row.id
        written = storage.read_json(folder / row.id / "ended.json", kind="end", schema_version=1)
        assert written["fingerprint"] == trees.fingerprint(expected[row.id].overlay)


def test_kill_9_at_random_moments_changes_no_bit(tmp_path, uninterrupted):
    """Twice, then to the end."""
    chance, total = random.Random(), sum(row.train_steps for row in TABLE)
    for least, most in ((1, total // 3), (total // 3, 2 * total // 3)):
        process = start(tmp_path)
        wait_for_rows(tmp_path, chance.randint(least, most), process)
        time.sleep(chance.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path).wait(timeout=900) == 0
    assert_exact(tmp_path, uninterrupted)


def test_sigterm_saves_every_slot_and_exits(tmp_path, uninterrupted):
    process = start(tmp_path)
    wait_for_rows(tmp_path, 20, process)
    process.terminate()
    assert process.wait(timeout=600) == 3
    done = num_rows(tmp_path)
    saved = max((tmp_path / "stack" / "checkpoints").glob("*/COMMITTED.json"),
                key=lambda path: int(path.parent.name))
    note = storage.read_json(saved, kind="marker", schema_version=1)["note"]
    standing = [entry["id"] for entry in note["slots"] if entry]
    under_way = sum(len(tiny_stack.rows_in(tmp_path / name)) for name in standing)
    ended = sum(row.train_steps for row in TABLE if (tmp_path / row.id / "ended.json").exists())
    assert under_way + ended == done  # nothing done was lost
    assert start(tmp_path).wait(timeout=900) == 0
    assert_exact(tmp_path, uninterrupted)
