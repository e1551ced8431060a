"""Locks of folders: between processes, threads, and the blocks of one thread."""

import contextlib
import functools
import os
import resource
import threading
import time

import many_processes
import pytest

from elm_jax.errors import InputError, RunError
from elm_jax.runtime import locks
from elm_jax.runtime.locks import alone
from elm_jax.runtime.staging import check_free


def test_another_process_is_refused_and_named(tmp_path):
    """While one keeps the folder; at its end, also by a kill, the next goes on at once."""
    with many_processes.keeping(tmp_path / "x") as keeper:
        with pytest.raises(InputError, match=rf"Another process(.|\n)*x\n(.|\n)*process {keeper.pid}:"):
            with alone(tmp_path / "x"):
                pass
        keeper.kill()
        with alone(tmp_path / "x", wait_seconds=20):
            assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize("count", [2, 4])
def test_what_each_adds_under_the_lock_is_there(tmp_path, count):
    """Read, change, write: each process adds 20 lines to what it read."""
    path = tmp_path / "x" / "lines"

    def add(number: int) -> None:
        for line in range(20):
            with alone(tmp_path / "x", wait_seconds=30):
                before = path.read_text() if path.exists() else ""
                path.write_text(before + f"{number} {line}\n")

    adders = [functools.partial(add, number) for number in range(count)]
    assert many_processes.at_once(adders) == [""] * count
    assert sorted(path.read_text().splitlines()) == sorted(
        f"{number} {line}" for number in range(count) for line in range(20))


def test_a_place_where_no_folder_can_be_made_is_one_error(monkeypatch):
    monkeypatch.setattr(locks, "LEAVING_SECONDS", 0.05)
    with pytest.raises(RunError, match="Cannot write"), alone("/proc/none/x"):
        pass


def test_more_folders_are_kept_where_a_process_may_open_fewer_files(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        with locks.alone_in_each([tmp_path / str(number) for number in range(100)]):
            assert len(os.listdir(tmp_path)) == 100
        assert os.listdir(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_thread_enters_again_and_another_does_not(tmp_path):
    refused = []

    def enter() -> None:
        try:
            with alone(tmp_path / "x"):
                pass
        except InputError as error:
            refused.append(str(error))

    with alone(tmp_path / "x"), alone(tmp_path / "x"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        with pytest.raises(InputError, match="this process itself"):
            with alone(tmp_path / "x", again=False):
                pass
    assert len(refused) == 1
    enter()
    assert len(refused) == 1


def test_what_stayed_empty_is_removed_and_its_waiters_go_on(tmp_path):
    """They lock the folder that has the name, not the one that had it."""
    (tmp_path / "given").mkdir()
    with alone(tmp_path / "given"), alone(tmp_path / "a" / "b"):
        (tmp_path / "file").write_text("")
    assert sorted(os.listdir(tmp_path)) == ["file", "given"]
    with pytest.raises(InputError, match=r"A folder is expected(.|\n)*a file"):
        with alone(tmp_path / "file"):
            pass

    def wait() -> None:
        for _ in range(30):
            with alone(tmp_path / "x", wait_seconds=30):
                os.mkdir(tmp_path / "inside")  # fails where two are in at once
                os.rmdir(tmp_path / "inside")

    assert many_processes.at_once([wait] * 3) == [""] * 3
    assert not (tmp_path / "x").exists()


def test_a_folder_that_others_make_and_remove_is_never_taken_for_a_file(tmp_path):
    """One look says what stands there: two looks would see a folder, and then none."""
    def make_and_remove() -> None:
        while not (tmp_path / "end").exists():
            for change in (os.mkdir, os.rmdir):
                with contextlib.suppress(OSError):
                    change(tmp_path / "x")

    def enter() -> None:
        try:
            for _ in range(1_000):
                check_free(tmp_path / "x")
                with alone(tmp_path / "x", wait_seconds=30):
                    pass
        finally:
            (tmp_path / "end").write_text("")

    assert many_processes.at_once([make_and_remove, enter]) == ["", ""]


def test_a_place_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    """A bucket, and a disk whose system refuses the lock: other processes cannot be seen."""
    with alone("gs://bucket/x"):
        pass

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    start = time.monotonic()
    with alone(tmp_path / "x", again=False), alone(tmp_path / "x", again=False):
        pass
    assert time.monotonic() - start < 1
