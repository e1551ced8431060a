"""Chunks cut short, and how arrays are cut into chunks."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts

from elm_jax.errors import InputError
from elm_jax.formats.tensors import boxes, in_flight, zarr_chunks, zarr_files

COMPRESSORS = {
    "none": None,
    "gzip": {"id": "gzip", "level": 1},
    "zstd": {"id": "zstd", "level": 1},
    "blosc": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1},
}
CONTENTS = {
    "random": np.random.default_rng(0).integers(0, 2**32, 60_000, dtype=np.uint32),
    "zeros": np.zeros(60_000, np.uint32),
    "ramp": np.arange(60_000, dtype=np.uint32) // 7,
    "one": np.ones(1, np.uint32),
}


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_chunk_cut_anywhere_is_seen(tmp_path, compressor, contents):
    values, spec = CONTENTS[contents], COMPRESSORS[compressor]
    metadata = {"shape": values.shape, "chunks": values.shape, "compressor": spec}
    array = ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"},
                     "dtype": "uint32", "metadata": metadata, "store_data_equal_to_fill_value": True},
                    create=True).result()
    array.write(values).result()
    chunk = tmp_path / "a" / "0"
    written = json.loads((tmp_path / "a" / ".zarray").read_text())["compressor"]
    whole = chunk.read_bytes()
    assert zarr_chunks.is_whole(str(chunk), written, values.nbytes)
    for length in sorted({0, 1, 4, 5, 17, len(whole) // 3, len(whole) // 2, len(whole) - 4, len(whole) - 1}):
        if 0 <= length < len(whole):
            chunk.write_bytes(whole[:length])
            assert not zarr_chunks.is_whole(str(chunk), written, values.nbytes), length
    chunk.write_bytes(whole + b"\0")
    assert not zarr_chunks.is_whole(str(chunk), written, values.nbytes)


@pytest.mark.parametrize("shape", [(7,), (32128, 2048), (2048, 24, 5120), (24, 1), (97, 89), (8192, 8192)])
@pytest.mark.parametrize("limit", [1 << 8, 1 << 20, 1 << 26])
def test_chunks_are_even_parts_below_the_limit(shape, limit):
    chunks = boxes.chunk_shape(shape, 4, limit)
    assert all(size % chunk == 0 for size, chunk in zip(shape, chunks, strict=True))
    assert math.prod(chunks) * 4 <= limit
    if math.prod(shape) * 4 <= limit:
        assert chunks == shape


def test_a_stack_is_cut_between_layers():
    assert boxes.chunk_shape((2048, 24, 64), 4, 1 << 26, layer_axis=1) == (2048, 1, 64)


@pytest.mark.parametrize("ocdbt", [False, True])
def test_what_is_written_in_many_chunks_is_read(tmp_path, ocdbt, monkeypatch):
    monkeypatch.setattr(in_flight, "BYTES", 1 << 9)
    values = np.random.default_rng(1).normal(size=(12, 5, 9)).astype(np.float32)
    folder = zarr_files.Folder(tmp_path, ocdbt=ocdbt)
    single = folder.create("a", values.shape, "float32", boxes.chunk_shape(values.shape, 4, 1 << 7))
    stack = folder.create("b", values.shape, "float32", boxes.chunk_shape(values.shape, 4, 1 << 7, 1))
    with in_flight.Writes() as writes:
        single.write(values, writes)
        for layer in (3, 0, 4, 1, 2):
            stack.write(values[:, layer], writes, layer)
    again = zarr_files.Folder(tmp_path)
    assert (again.ocdbt, again.names()) == (ocdbt, ["a", "b"])
    for array in again.open(["a", "b"]).values():
        assert array.faults() == []
        assert np.array_equal(array.read(), values)
        part = array.keeping_chunks().read((slice(3, 7), slice(1, 2), slice(0, 9)))
        assert np.array_equal(part, values[3:7, 1:2])


def test_a_database_that_is_not_one_is_an_error(tmp_path):
    (tmp_path / zarr_files.MANIFEST).write_bytes(b"not a manifest")
    with pytest.raises(InputError, match=r"database cannot be read"):
        zarr_files.Folder(tmp_path).names()


@pytest.mark.slow
def test_memory_is_bounded_by_a_leaf(tmp_path):
    """Writing and reading 14 leaves of 32 MB in a stack takes no more than a few of them."""
    program = f"""
import resource
import numpy as np
from elm_jax.formats.tensors import boxes, in_flight, zarr_files
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
shape = (2048, 14, 4096)  # 32 MB a layer
before = peak()
for ocdbt in (False, True):
    folder = zarr_files.Folder(zarr_files.epath.Path({str(tmp_path)!r}) / str(ocdbt), ocdbt=ocdbt)
    folder.path.mkdir()
    array = folder.create("a", shape, "float32", boxes.chunk_shape(shape, 4, 1 << 26, 1))
    with in_flight.Writes() as writes:
        for layer in range(14):
            array.write(np.full((2048, 4096), layer, np.float32), writes, layer)
    read = folder.open(["a"])["a"]
    for layer in range(14):
        part = read.read((slice(0, 2048), slice(layer, layer + 1), slice(0, 4096)))
        assert (part == layer).all()
print((peak() - before) / 2**25)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert float(done.stdout or "nan") < 8, (done.stdout, done.stderr[-2000:])
