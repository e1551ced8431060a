"""Safetensors files: headers that lie, slices that read no more than they must, files the library reads."""

import json
import os
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from elm_jax.errors import InputError, RunError
from elm_jax.formats.model import Origin, TensorSpec
from elm_jax.formats.tensors import safetensors_files, streaming, torch_files
from elm_jax.formats.tensors.safetensors_files import StoredTensor
from elm_jax.runtime import staging, storage

F32_2X3 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(("header", "data", "words"), [
    ({"a": {**F32_2X3, "data_offsets": [0, 28]}}, bytes(28), r"28 bytes(.|\n)*24 bytes for F32\[2, 3\]"),
    ({"a": {**F32_2X3, "shape": [2, 4]}}, bytes(24), r"24 bytes(.|\n)*32 bytes for F32\[2, 4\]"),
    ({"a": {**F32_2X3, "dtype": "F64"}}, bytes(24), r"48 bytes for F64\[2, 3\]"),
    ({"a": {**F32_2X3, "dtype": "F99"}}, bytes(24), "dtype F99"),
    ({"a": {**F32_2X3, "shape": [-2, -3]}}, bytes(24), "none below 0"),
    ({"a": {**F32_2X3, "shape": [2, 3.0]}}, bytes(24), "whole numbers"),
    ({"a": {**F32_2X3, "data_offsets": [24, 0]}}, bytes(24), "-24 bytes"),
    ({"a": {"dtype": "F32", "shape": [6]}}, bytes(24), "dtype, shape and data_offsets"),
    ({"a": F32_2X3, "b": {**F32_2X3, "data_offsets": [12, 36]}}, bytes(36), "tensor b(.|\n)*overlaps a"),
    ({"a": F32_2X3, "b": F32_2X3}, bytes(24), "overlaps"),
    ({"a": F32_2X3, "b": {**F32_2X3, "data_offsets": [32, 56]}}, bytes(56), "leaves a gap to a"),
    ({"a": {**F32_2X3, "data_offsets": [8, 32]}}, bytes(32), "leaves a gap to the header"),
    ({"a": F32_2X3}, bytes(20), "truncated"),
    ({"a": F32_2X3}, bytes(30), "longer than its header says"),
    (b'{"a": ', bytes(24), "JSON object"),
    (b"[1, 2]", bytes(24), "list"),
    (b'{"a": 1, "a": 2}', b"", "'a' stands twice"),
    (b"\xff\xfe", b"", "JSON object"),
    (b"[" * 100_000, b"", "JSON object"),
])
def test_a_header_that_lies_is_refused(tmp_path, header, data, words):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=words) as caught:
        safetensors_files.read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, (1 << 60).to_bytes(8, "little") + b"{}",
                                     (99).to_bytes(8, "little") + b"{}"])
def test_a_header_beyond_the_file(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="truncated, or its header wrong"):
        safetensors_files.read_header(path)


@pytest.fixture
def file(tmp_path):
    """Tensors of every float type, written by the safetensors library."""
    draw = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(70, 30, generator=draw).to(torch.bfloat16),
               "bias": torch.randn(11, generator=draw), "half": torch.randn(5, 9, generator=draw).half(),
               "empty": torch.zeros(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors", tensors


def test_float8_is_read_as_bfloat16_and_other_types_are_named(tmp_path):
    """A valid file is not called damaged; each value is the one that torch reads."""
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    tensors = {name: every.clone().view(getattr(torch, f"float8_{name}")) for name in ("e4m3fn", "e5m2")}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    stored = safetensors_files.read_header(tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    for found in (stored, torch_files.TorchFiles().stored(storage.as_path(tmp_path / "x.bin"))):
        for name, tensor in tensors.items():
            assert found[name].dtype == "bfloat16"
            for part in (None, (slice(3, 9), slice(5, 6))):
                read = streaming.read_part(found[name], part, transposed=True)
                wanted = tensor.float().numpy().T[part or ...]
                np.testing.assert_array_equal(read.astype(np.float32), wanted)
    assert {tensor.nbytes for tensor in stored.values()} == {256}
    path = write(tmp_path / "y.safetensors", {"a": {**F32_2X3, "dtype": "F8_E8M0"}})
    with pytest.raises(InputError, match=r"does not read tensors of this type(.|\n)*F8_E8M0") as caught:
        safetensors_files.read_header(path)
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("piece_bytes", [64, 1000, 1 << 20])
def test_tensors_and_their_parts_are_those_of_the_library(file, monkeypatch, piece_bytes):
    monkeypatch.setattr(streaming, "PIECE_BYTES", piece_bytes)
    path, tensors = file
    stored = safetensors_files.read_header(path)
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(streaming.read_part(stored[name]).astype(np.float32),
                                      tensor.float().numpy())
    weight = tensors["weight"].float().numpy()
    for part in [(slice(3, 50), slice(None)), (slice(None), slice(7, 8)), (slice(69, 70), slice(0, 30)),
                 (slice(10, 10), slice(0, 5))]:
        read = streaming.read_part(stored["weight"], part)
        assert read.flags.c_contiguous and read.dtype.name == "bfloat16"
        np.testing.assert_array_equal(read.astype(np.float32), weight[part])
        turned = streaming.read_part(stored["weight"], part[::-1], transposed=True)
        assert turned.flags.c_contiguous
        np.testing.assert_array_equal(turned.astype(np.float32), weight.T[part[::-1]])


def test_a_slice_reads_only_its_rows(file, monkeypatch):
    path, _ = file
    tensors = streaming.StoredTensors({"leaf": safetensors_files.read_header(path)["weight"]},
                                      {"leaf": Origin("weight", transposed=True)})
    rows, fill = [], StoredTensor.fill
    monkeypatch.setattr(StoredTensor, "fill", lambda self, into, start, column=0: (
        rows.append((start, len(into))), fill(self, into, start, column))[1])
    assert tensors.read("leaf", (slice(None), slice(20, 30))).shape == (30, 10)
    assert rows == [(20, 10)]


def test_the_library_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE_BYTES", 256)
    draw = np.random.default_rng(0)
    arrays = {"a": draw.standard_normal((31, 17)).astype("bfloat16"), "b": draw.standard_normal(5)}
    specs = {"a": TensorSpec((17, 31), "bfloat16"), "b": TensorSpec((5,), "float64")}
    safetensors_files.write_file(tmp_path / "x.safetensors", specs,
                                 lambda name: streaming.pieces(arrays[name], name == "a"), {"format": "pt"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"} and sorted(opened.keys()) == ["a", "b"]
        np.testing.assert_array_equal(opened.get_tensor("a").float().numpy(),
                                      arrays["a"].T.astype(np.float32))
        np.testing.assert_array_equal(opened.get_tensor("b").numpy(), arrays["b"])
    assert (int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") + 8) % 8 == 0


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 5), (5, 40), (64, 1), (1, 64)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pieces_of_a_transpose(shape, dtype, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE_BYTES", 200)
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for view in (array, array[:, ::2], np.asfortranarray(array)):
        for transposed in (False, True):
            whole = np.concatenate([piece.reshape(-1) for piece in streaming.pieces(view, transposed)])
            wanted = view.T if transposed else view
            np.testing.assert_array_equal(whole.astype(np.float32), wanted.reshape(-1).astype(np.float32))


def test_a_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(RunError, match=r"Cannot write(.|\n)*No space left"):
        safetensors_files.write_file("/dev/full", {"a": TensorSpec((10_000,), "float32")},
                                     lambda name: iter([np.zeros(10_000, np.float32)]))


def test_staged_folders(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "left over").write_text("by a killed run")
    (tmp_path / "x").mkdir()
    with staging.staged(tmp_path / "x") as target:
        assert not list(target.iterdir())
        (target / "a").write_text("a")
        assert not list((tmp_path / "x").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "a").exists()
    with pytest.raises(InputError, match="target exists already"), staging.staged(tmp_path / "x"):
        pass
    with pytest.raises(KeyError), staging.staged(tmp_path / "y") as target:
        (target / "a").write_text("a")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def bytes_read():
    """By every read of this process."""
    return int(pathlib.Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_slice_reads_its_own_bytes_only(tmp_path, transposed, axis):
    """Split eight ways along either side, as the stored tensor lies or turned round."""
    values = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    safetensors.numpy.save_file({"a": values}, tmp_path / "x.safetensors")
    stored = safetensors_files.read_header(tmp_path / "x.safetensors")["a"]
    lying = values.T if transposed else values
    bytes_read()
    for number in range(8):
        index = [slice(0, size) for size in lying.shape]
        size = lying.shape[axis] // 8
        index[axis] = slice(number * size, (number + 1) * size)
        before = bytes_read()
        part = streaming.read_part(stored, tuple(index), transposed)
        read = bytes_read() - before
        np.testing.assert_array_equal(part, lying[tuple(index)])
        assert values.nbytes // 8 <= read < values.nbytes // 8 + 4096
