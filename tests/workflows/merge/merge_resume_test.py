"""What a kill or a power cut leaves of a merge, and what the next run makes of it."""

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.formats.tensors import safetensors_files
from elm_jax.formats.tensors.streaming import ArrayTensors
from elm_jax.merging.stream import CopiedLeaf
from elm_jax.runtime import staging, storage
from elm_jax.workflows.merge import output_files
from elm_jax.workflows.merge.merge_inputs import TensorsSource
from elm_jax.workflows.merge.output_files import JOURNAL

VALUES = {name: np.arange(6, dtype=np.int32).reshape(2, 3) + 10 * number
          for number, name in enumerate(("a", "b", "c"))}
IDENTITY = {"merge": 1}


class Leaf(CopiedLeaf):
    """Notes that it was written."""

    def __init__(self, name: str, written: list[str]) -> None:
        super().__init__(name, [TensorsSource(ArrayTensors(VALUES))], ["x"])
        self._written = written

    def look(self, workers):
        self._written.append(self.path)


def write(folder, identity=IDENTITY) -> list[str]:
    """Writes one leaf a file, and returns the leaves that were not believed to be done."""
    folder.mkdir(exist_ok=True)
    written = []
    output_files.write_merged(storage.as_path(folder), [Leaf(name, written) for name in VALUES], identity, 24,
                              workers=1, quiet=True)
    for name, tensor in safetensors_files.open_tensors(storage.as_path(folder)).items():
        rows = np.empty((2, 3), np.int32)
        tensor.fill(rows, 0)
        np.testing.assert_array_equal(rows, VALUES[name])
    return written


def test_what_is_done_is_not_done_again(tmp_path):
    assert write(tmp_path / "x") == ["a", "b", "c"] and write(tmp_path / "x") == []
    assert write(tmp_path / "x", {"merge": 2}) == ["a", "b", "c"]


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"short")])
def test_leaves_of_a_file_that_is_gone_are_written_again(spoil, monkeypatch, tmp_path):
    write(tmp_path / "x")
    spoil(sorted((tmp_path / "x").glob("*.safetensors"))[1])
    with monkeypatch.context() as patch:  # killed when the file is there again, and full of zeros
        patch.setattr(Leaf, "look", lambda self, workers: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "x")
    assert write(tmp_path / "x") == ["b"]


@pytest.mark.parametrize(("tail", "expected"), [
    (b'"a"\n\0\0\0\0\n"b"\n', ["b", "c"]), (b'"a"\n\xc3\n', ["b", "c"]), (b'"a"\n"b"\n"\xc3', ["c"]),
    (b'["a"]\n', ["a", "b", "c"]),
])
def test_a_spoiled_line_ends_the_journal(tail, expected, tmp_path):
    write(tmp_path / "x")
    first = (tmp_path / "x" / JOURNAL).read_bytes().split(b"\n")[0]
    (tmp_path / "x" / JOURNAL).write_bytes(first + b"\n" + tail)
    assert write(tmp_path / "x") == expected
    (tmp_path / "x" / JOURNAL).write_bytes(b"\0" * 50 + b"\xff\n")
    assert write(tmp_path / "x") == ["a", "b", "c"]


def test_half_written_files_of_an_earlier_run_are_gone(tmp_path):
    write(tmp_path / "x")
    (tmp_path / "x" / f"{JOURNAL}.tmp-1-ab").write_text("half")
    (tmp_path / "x" / "vocab.txt").write_text("another tokenizer's")
    write(tmp_path / "x")
    assert {path.suffix for path in (tmp_path / "x").iterdir()} == {".safetensors", ".json", ".journal"}


@pytest.mark.parametrize(("enter", "place"), [(staging.resumable, "x.partial"), (staging.workspace, "x")])
def test_a_folder_of_somebodys_own_stays(enter, place, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / place / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=rf"{place}(.|\n)*mine.txt(.|\n)*move or remove it"), \
            enter(tmp_path / "x", JOURNAL):
        pass
    assert (tmp_path / place / "mine.txt").read_text() == "mine"
    (tmp_path / place / "mine.txt").rename(tmp_path / place / f"{JOURNAL}.tmp-1-ab")
    with pytest.raises(InputError, match="no good"), enter(tmp_path / "x", JOURNAL):
        raise InputError("no good")
    assert not (tmp_path / place).exists()


def test_an_emptied_workspace_loses_its_journal_last(monkeypatch, tmp_path):
    write(tmp_path / "x")
    monkeypatch.setattr(output_files, "end_journal", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output_files.empty_workspace(storage.as_path(tmp_path / "x"))
    assert [path.name for path in (tmp_path / "x").iterdir()] == [JOURNAL]
    assert write(tmp_path / "x") == ["a", "b", "c"]
