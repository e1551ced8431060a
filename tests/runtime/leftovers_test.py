"""What dead processes left under temporary names goes; what may be a living one's stays."""

import os
import subprocess
import sys
import tempfile

import pytest
from etils import epath

from elm_jax.data.preparing.prepared_folder import PreparedFolder
from elm_jax.runtime import leftovers, storage

DEAD = [f"a.json.tmp-{leftovers.HOST}-1-0123abcd", f"validation.tmp-{leftovers.HOST}-1-0123abcd.partial"]
OTHERS = ["a.json.tmp-ffffffff-1-0123abcd", "a.json.tmp-1-0123abcd", "train.tmp-ffffffff-1-0123abcd.partial"]
USERS = ["a.tmp", "a.tmp-1", "a.json.tmp-old-1-0123abcd", "mine.partial", "a.json", "run.20261130.partial"]


def make(folder, names):
    for name in names:
        if name.endswith(".partial"):
            (folder / name).mkdir()
            (folder / name / "x.npy").touch()
        else:
            (folder / name).touch()


def test_a_write_clears_what_this_host_s_dead_left_and_nothing_else(tmp_path):
    make(tmp_path, DEAD + OTHERS + USERS)
    with leftovers.new_file(str(tmp_path / "b")) as file, leftovers.new_folder(str(tmp_path / "c")) as folder:
        alive = [os.path.basename(name) for name in (file.name, folder)]
        storage.write_text(tmp_path / "own.json", "{}")
        assert sorted(os.listdir(tmp_path)) == sorted([*OTHERS, *USERS, *alive, "own.json"])
        os.rename(file.name, tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == sorted([*OTHERS, *USERS, "b", "own.json"])


def test_another_host_s_counts_as_dead_after_a_day(tmp_path):
    make(tmp_path, OTHERS + USERS)
    for name in OTHERS + USERS:
        os.utime(tmp_path / name, (0, 0))
    leftovers.clear(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(USERS)


def test_names_of_older_versions_are_theirs_among_prepared_arrays_alone(tmp_path):
    (tmp_path / "task" / "train.0123abcd.partial").mkdir(parents=True)
    os.utime(tmp_path / "task" / "train.0123abcd.partial", (0, 0))
    leftovers.clear(str(tmp_path / "task"))
    assert os.listdir(tmp_path / "task")
    PreparedFolder(epath.Path(tmp_path), None).clear()
    assert not os.listdir(tmp_path / "task")


def test_what_a_disk_without_locks_holds_is_judged_as_another_host_s(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    make(tmp_path, DEAD)
    monkeypatch.setattr(leftovers.fcntl, "flock", refuse)
    storage.write_text(tmp_path / "own.json", "{}")
    assert sorted(os.listdir(tmp_path)) == sorted([*DEAD, "own.json"])


def test_what_is_cleared_between_its_making_and_its_lock_is_made_again(tmp_path, monkeypatch):
    lock, taken = leftovers.fcntl.flock, []

    def late(descriptor, how):
        if not taken:
            taken.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            leftovers.clear(str(tmp_path))
        lock(descriptor, how)

    monkeypatch.setattr(leftovers.fcntl, "flock", late)
    storage.write_text(tmp_path / "own.json", "{}")
    assert os.listdir(tmp_path) == ["own.json"] and len(taken) == 1


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), leftovers.new_file(str(tmp_path / "b")):
        raise KeyError
    with pytest.raises(KeyError), leftovers.new_folder(str(tmp_path / "b")):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_temporary_folders_are_this_user_s_and_go(tmp_path, monkeypatch):
    """Also those of a process that was killed, with the next one's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make(tmp_path, ["mine", f"elm.tmp-{leftovers.HOST}-1-0123abcd.partial"])
    with leftovers.scratch_folder() as folder:
        assert os.stat(folder).st_mode & 0o777 == 0o700 and len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["mine"]


def test_a_process_s_folder_is_there_as_long_as_it(tmp_path):
    program = ("from elm_jax.runtime import leftovers\nimport os\n"
               "here = leftovers.process_folder()\nassert here == leftovers.process_folder()\n"
               "if os.fork() == 0:\n    raise SystemExit(os.path.exists(here) - 1)\n"
               "assert os.wait()[1] == 0 and os.path.exists(here)\n")
    subprocess.run([sys.executable, "-S", "-c", program], check=True, timeout=60, env={
        **os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)})
    assert os.listdir(tmp_path) == []
