"""Storage: nothing half written is ever taken for whole."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from elm_jax.errors import InputError, RunError
from elm_jax.runtime import sharding, staging, storage, tree_files


def test_a_folder_is_whole_only_with_its_marker(tmp_path):
    folder = storage.begin(tmp_path / "x")
    (folder / "part").write_text("half")
    with pytest.raises(InputError, match="not whole"):
        storage.require_committed(folder, "thing")
    storage.commit(folder)
    assert storage.require_committed(folder, "thing") == folder
    for damaged in ("", "{", "[]", "{}", '{"schema_version": 2}'):
        (folder / storage.MARKER).write_text(damaged)
        for ask in (storage.is_committed, lambda place: storage.require_committed(place, "thing")):
            with pytest.raises(InputError, match=rf"marker of this \w+ is damaged(.|\n)*{storage.MARKER}"):
                ask(folder)


def test_begin_takes_the_marker_away_before_anything_else(tmp_path, monkeypatch):
    folder = storage.begin(tmp_path / "x")
    (folder / "part").mkdir()
    storage.commit(folder)

    def power_cut(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", power_cut)
    with pytest.raises(KeyboardInterrupt):
        storage.begin(folder)
    assert not storage.is_committed(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no expert here"):
        storage.require_committed(tmp_path / "none", "expert")


def test_a_half_written_line_is_dropped_and_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    storage.append_jsonl(path, [{"a": 1}, {"a": 2}])
    end = path.stat().st_size
    with open(path, "ab") as file:
        file.write('{"a": 3, "ß'.encode()[:-1])  # in the middle of a letter
    assert storage.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert storage.read_jsonl_behind(path, 9, 1) == ([{"a": 2}], end, 2)
    storage.append_jsonl(path, [{"a": 4}])
    assert storage.read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2"):
        storage.read_jsonl(path)


def test_schema_version_is_checked(tmp_path):
    path = tmp_path / "card.json"
    storage.write_json(path, {"schema_version": 7})
    with pytest.raises(InputError, match=r"got: 7\n  expected: 1"):
        storage.read_json(path, kind="card", schema_version=1)
    path.write_text("{")
    with pytest.raises(InputError, match=r"not valid JSON\n  where: .*line 1"):
        storage.read_json(path, kind="card", schema_version=1)


def test_tree_comes_back_whole_and_onto_a_mesh(tmp_path):
    tree = {"a": {"b": np.arange(12, dtype=np.float32).reshape(4, 3)}, "c": np.ones(8, np.int32)}
    tree_files.save_tree(tmp_path / "weights", tree)
    back = tree_files.restore_tree(tmp_path / "weights")
    assert np.array_equal(back["a"]["b"], tree["a"]["b"]) and back["c"].dtype == np.int32
    mesh = sharding.make_mesh(4, 2)
    target = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target), tree)
    split = tree_files.restore_tree(tmp_path / "weights", like)
    assert split["a"]["b"].sharding == target
    assert np.array_equal(np.asarray(split["a"]["b"]), tree["a"]["b"])


def test_weights_that_do_not_fit_name_the_leaf(tmp_path):
    tree_files.save_tree(tmp_path / "weights", {"a": np.ones((2, 3), np.float32)})
    with pytest.raises(InputError, match=r"leaf a: float32\[2, 3\] against float32\[2, 4\]"):
        tree_files.restore_tree(tmp_path / "weights", {"a": jax.ShapeDtypeStruct((2, 4), np.float32)})
    with pytest.raises(InputError, match="no weights here"):
        tree_files.restore_tree(tmp_path / "nothing")


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(tmp_path):
    """A process whose files may not grow past 4 kB meets the kernel's own error."""
    path = tmp_path / "value.json"
    storage.write_json(path, {"schema_version": 1})
    program = (
        "import resource, signal\n"
        "from elm_jax.runtime import storage\n"
        "from elm_jax.errors import RunError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    storage.write_text({str(path)!r}, 'x' * 100000)\n"
        "except RunError as error:\n"
        "    print(error)\n")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "Cannot write" in result.stdout and str(path) in result.stdout, result.stderr
    assert storage.read_json(path, kind="value", schema_version=1) == {"schema_version": 1}
    assert os.listdir(tmp_path) == ["value.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def make_loop(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / "x.json"


@pytest.mark.parametrize(("make", "cure", "kind"), [
    (lambda folder: folder / ("n" * 300), "give a shorter name(.|\\n)*255 bytes", InputError),
    (lambda folder: folder, "a folder has the name of a file", RunError),
    (lambda folder: folder / "file" / "x.json", "a file, or a link", RunError),
    (make_loop, "a file, or a link that leads nowhere", RunError),
])
def test_a_refused_write_says_what_to_do_about_its_own_reason(tmp_path, make, cure, kind):
    (tmp_path / "file").write_text("")
    with pytest.raises(kind, match=f"Cannot write(.|\n)*cure: {cure}"):
        storage.write_text(make(tmp_path), "x")


@pytest.mark.parametrize(("error", "cure"), [
    (OSError(errno.ENOSPC, "no"), "free space or choose"), (OSError(errno.EDQUOT, "no"), "within the quota"),
    (OSError(errno.EROFS, "no"), "mounted read-only"), (OSError(errno.EACCES, "no"), "that you may write"),
    (OSError(errno.ELOOP, "no"), "links of the path lead in a circle"),
    (OSError(errno.EMFILE, "no"), "limit on open files"), (OSError(errno.EIO, "no"), "choose another folder"),
    (ValueError("RESOURCE_EXHAUSTED: x"), "free space or choose"),
    (RuntimeError("Error: Permission denied: [path]"), "that you may write"),
])
def test_what_libraries_say_of_a_refused_write_has_the_cure_of_its_reason(error, cure):
    with pytest.raises(RunError, match=f"cure: .*{cure}"), storage.guard_writes("here"):
        raise error


def test_a_full_disk_under_orbax_is_one_clear_error_too(tmp_path):
    """Orbax reports it as a ValueError of its own."""
    program = (
        "import resource, signal, sys\n"
        "import numpy as np\n"
        "from elm_jax.runtime import tree_files\n"
        "from elm_jax.errors import RunError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "values = np.random.default_rng(0).normal(size=(300, 300))\n"
        "try:\n"
        f"    tree_files.save_tree({str(tmp_path / 'weights')!r}, {{'a': values}})\n"
        "except RunError as error:\n"
        "    print(error)\n")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("Cannot write") and str(tmp_path) in result.stdout, result.stderr[-2000:]


def test_damaged_weights_are_one_clear_error(tmp_path):
    values = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    tree_files.save_tree(tmp_path / "weights", {"a": values})
    largest = max((path for path in (tmp_path / "weights").rglob("*") if path.is_file()),
                  key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 100_000
    with open(largest, "rb+") as file:
        file.truncate(1000)
    for like in (None, {"a": jax.ShapeDtypeStruct((300, 300), np.float32)}):
        with pytest.raises(InputError, match="The weights cannot be read"):
            tree_files.restore_tree(tmp_path / "weights", like)


def test_read_only_place_is_a_run_error(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="No space left"):
        storage.write_text(tmp_path / "x", "text")
    assert os.listdir(tmp_path) == []


def test_two_processes_do_not_write_one_folder(tmp_path):
    """The second is refused and takes nothing away from the first; a killed one blocks nobody."""
    with staging.staged(tmp_path / "x") as target:
        (target / "part").write_text("first")
        with pytest.raises(InputError, match="Another process is writing this folder"):
            with staging.staged(tmp_path / "x"):
                pass
        assert (target / "part").read_text() == "first"
    assert (tmp_path / "x" / "part").read_text() == "first" and os.listdir(tmp_path) == ["x"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    program = ("import os, signal, sys\nfrom elm_jax.runtime import staging\n"
               "with staging.staged(sys.argv[1]) as target:\n"
               "    (target / 'old').mkdir()\n    os.symlink('/', target / 'link')\n"
               "    os.kill(os.getpid(), signal.SIGKILL)\n")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert (tmp_path / "x.partial" / "old").exists()
    with staging.staged(tmp_path / "x") as target:
        assert list(target.iterdir()) == []
    assert os.listdir(tmp_path) == ["x"] and os.path.exists("/etc")


def test_a_folder_that_failed_is_gone(tmp_path):
    with pytest.raises(KeyError):
        with staging.staged(tmp_path / "x") as target:
            (target / "part").write_text("half")
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_texts_that_are_none(tmp_path):
    (tmp_path / "x").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"no text(.|\n)*byte 3 is 0xff"):
        storage.read_text(tmp_path / "x")
    with pytest.raises(InputError, match="a folder"):
        storage.read_text(tmp_path)


def test_every_reader_passes_over_a_byte_order_mark_and_empty_last_lines(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert storage.read_text(path) == '{"a": 1}\n'
    assert storage.read_json(path, kind="file", schema_version=None) == {"a": 1}
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\n\n \n')
    assert storage.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    storage.append_jsonl(path, [{"a": 3}])
    assert storage.read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    path.write_bytes(b'{"a": "\xff"}\n')
    for read in (storage.read_text, storage.read_jsonl):
        with pytest.raises(InputError, match=r"(?s)no text.*byte 7 is 0xff"):
            read(path)


def test_a_missing_path_says_what_is_there_instead(tmp_path):
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(InputError, match=r"1 entries, nearest: results.jsonl"):
        storage.read_text(tmp_path / "result.jsonl")
    with pytest.raises(InputError, match=r"no folder .*nowhere"):
        storage.require_committed(tmp_path / "nowhere" / "base", "base")
