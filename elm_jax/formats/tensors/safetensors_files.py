"""Reads and writes safetensors files: checked headers, tensors read by rows, shards written piece by piece.

A file is eight bytes (the header's length), a JSON header (name -> dtype, shape, offsets) and the
tensors' bytes. It is read with plain reads, not through a memory map: mapped pages would count as
resident memory, and a whole model would pile up there.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe, in_short
from elm_jax.formats.model import TensorSpec
from elm_jax.runtime import storage

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
"""Most bytes of a header: the library's own limit."""
_METADATA = "__metadata__"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WIDENED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""Types that are read as bfloat16, which holds each of their values."""
Contents = Callable[[str], Iterator[np.ndarray]]
"""A tensor's bytes by its name, as contiguous pieces in row-major order."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file (see `streaming.Stored`).

    Attributes:
        path: the file.
        shape: of the tensor.
        dtype: numpy's or ml_dtypes' name of the type that it is read in.
        offset: of its first byte in the file.
        narrow: name of its type in the file, if that is one of `_WIDENED`.
    """

    path: epath.Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    narrow: str | None = None

    @property
    def nbytes(self) -> int:
        """Number of its bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.narrow or self.dtype).itemsize

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Reads rows from `start` on, or parts of rows; from a bucket always whole rows (fewer requests)."""
        if self.narrow is not None:
            found = np.empty(rows.shape, np.dtype(self.narrow))
            dataclasses.replace(self, dtype=self.narrow, narrow=None).fill(found, start, column)
            rows[...] = found
            return
        width = math.prod(self.shape[1:])
        if rows.size == len(rows) * width:
            self._read([rows], start * width, rows.size)
        elif storage.is_local(self.path):
            self._read(rows, start * width + column, width)
        else:
            whole = np.empty((len(rows), width), rows.dtype)
            self._read([whole], start * width, whole.size)
            rows[...] = whole[:, column:column + rows.shape[1]]

    def _read(self, runs: Iterable[np.ndarray], first: int, step: int) -> None:
        """Reads contiguous runs of elements at a fixed stride."""
        # Without a buffer, which would read beyond a run.
        with _open(self.path) as file:
            for number, run in enumerate(runs):
                file.seek(self.offset + (first + number * step) * run.dtype.itemsize)
                target = memoryview(run.reshape(-1).view(np.uint8))
                while target:
                    count = file.readinto(target)
                    if not count:
                        raise InputError(describe("The file has become shorter while it was read",
                                                  where=self.path))
                    target = target[count:]


def _open(path: epath.Path) -> BinaryIO:
    """Opens a file, a local one without a buffer."""
    return open(path, "rb", buffering=0) if storage.is_local(path) else path.open("rb")


def read_header(path: storage.PathLike) -> dict[str, StoredTensor]:
    """Reads the header of a file and checks it against the file; returns its tensors.

    Raises:
        InputError: the file is truncated, or does not match its header; the first fault is named.
    """
    path = storage.require_file(path)
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise _fault(path, f"a header of {length} bytes in a file of {size} bytes",
                         "a header that lies inside the file", "truncated, or its header wrong")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, ValueError, RecursionError) as error:
        raise _fault(path, str(error)[:200], "a JSON object with each name once") from error
    if not isinstance(header, dict):
        raise _fault(path, type(header).__name__, "a JSON object")
    header.pop(_METADATA, None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return dict(pairs)


def _tensor(path: epath.Path, name: str, entry: Any, start: int) -> StoredTensor:
    where = f"{path}, tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _fault(where, json.dumps(entry)[:200], "dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _fault(where, f"shape {in_short(shape)}, data_offsets {in_short(offsets)}",
                     "whole numbers, none below 0")
    known = {**_DTYPES, **_WIDENED}
    if not isinstance(entry["dtype"], str):
        raise _fault(where, f"dtype {in_short(entry['dtype'])}", f"one of {', '.join(known)}")
    if entry["dtype"] not in known:
        raise InputError(describe(
            "This program does not read tensors of this type", where=where,
            got=f"dtype {entry['dtype']}"[:200], expected=f"one of {', '.join(known)}",
            cure="save the model in bfloat16 or float32"))
    dtype = known[entry["dtype"]]
    narrow = dtype if entry["dtype"] in _WIDENED else None
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if offsets[1] - offsets[0] != wanted:
        raise _fault(where, f"data_offsets {offsets}, which are {offsets[1] - offsets[0]} bytes",
                     f"{wanted} bytes for {entry['dtype']}{shape}")
    return StoredTensor(path, tuple(shape), "bfloat16" if narrow else dtype, start + offsets[0], narrow)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: epath.Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Raises InputError unless the tensors follow one another without overlap or gap up to the file's end."""
    before = "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != start:
            kind = "overlaps" if tensor.offset < start else "leaves a gap to"
            raise _fault(path, f"tensor {name} at byte {tensor.offset} {kind} {before}, "
                         f"which ends at {start}", "tensors one behind the other")
        start, before = start + tensor.nbytes, name
    if start != size:
        raise _fault(path, f"{size} bytes", f"{start} bytes, after the header",
                     "truncated" if size < start else "longer than its header says")


def _fault(where: Any, got: str, expected: str, fault: str | None = None) -> InputError:
    what = f"The safetensors file is {fault}" if fault else "The safetensors file's header is wrong"
    return InputError(describe(what, where=where, got=got, expected=expected,
                               cure="fetch or write the file again"))


def read_index(path: storage.PathLike) -> dict[str, str]:
    """Reads a ``*.index.json``: the file name of each tensor.

    Raises:
        InputError: no valid index, a file name that leads out of the folder, or files that are missing
            (all are named).
    """
    path = storage.as_path(path)
    value = storage.read_json(path, kind="index of the shards", schema_version=None)
    table = value.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(describe("The index of the shards has no weight_map", where=path,
                                  got=in_short(table), expected="the name of a file for every tensor"))
    for name, file in table.items():
        storage.require_name(file, f"{path}: weight_map/{name}", "file that the index of the shards names")
    files = dict.fromkeys(table.values())
    missing = [file for file in files if not (path.parent / file).exists()]
    if missing:
        held = next(name for name, file in table.items() if file == missing[0])
        raise InputError(describe("Shards are missing", where=path,
                                  got=f"no {', no '.join(missing)}"[:1000] + f", where {held} should be",
                                  expected=f"the {len(files)} files that {path.name} names",
                                  cure="fetch them again"))
    return dict(table)


def check_index(where: Any, table: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises InputError if the shards do not hold the tensors that the index lists; all are named."""
    wrong = [f"{name} is not in {file}" for name, file in table.items() if found.get(name) != file]
    wrong += [f"{name} in {file} is not in the index" for name, file in found.items() if name not in table]
    if wrong:
        raise InputError(describe("The shards and their index do not agree", where=where,
                                  got="; ".join(wrong)[:2000], cure="fetch the folder again"))


def open_tensors(folder: storage.PathLike) -> dict[str, StoredTensor]:
    """Opens the tensors of ``model.safetensors``, or of the shards that its index lists."""
    folder = storage.as_path(folder)
    if (folder / SINGLE_FILE).exists():
        return read_header(folder / SINGLE_FILE)
    table = read_index(folder / INDEX_FILE)
    tensors: dict[str, StoredTensor] = {}
    found: dict[str, str] = {}
    for file in dict.fromkeys(table.values()):
        for name, tensor in read_header(folder / file).items():
            found[name], tensors[name] = file, tensor
    check_index(folder / INDEX_FILE, table, found)
    return tensors


def write_file(path: storage.PathLike, specs: Mapping[str, TensorSpec], contents: Contents,
               metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file piece by piece: the header first, then each tensor's pieces.

    Args:
        path: the file.
        specs: of the tensors, in the order in which they are written.
        contents: gives one tensor at a time.
        metadata: strings for the header; transformers needs ``{'format': 'pt'}``.
    """
    text, _ = make_header(specs, metadata)
    path = storage.as_path(path)
    with storage.guard_writes(path), path.open("wb") as file:
        file.write(text)
        for name in specs:
            _write_pieces(file, contents(name))
        if storage.is_local(path):
            file.flush()
            os.fsync(file.fileno())


def make_header(specs: Mapping[str, TensorSpec],
                metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Bytes of a file's header, its length included, and the offset of each tensor in the file."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position, starts = 0, {}
    for name, spec in specs.items():
        starts[name], end = position, position + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape),
                        "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + start for name, start in starts.items()}


def _write_pieces(file: BinaryIO, pieces: Iterator[np.ndarray]) -> None:
    """Writes a tensor's pieces; a separate function, so that its memory is freed before the next is read."""
    for piece in pieces:
        file.write(piece.reshape(-1).view(np.uint8))


def write_tensors(folder: storage.PathLike, specs: Mapping[str, TensorSpec], contents: Contents,
                  max_shard_bytes: float) -> None:
    """Writes tensors into one file, or into shards followed by their index.

    Args:
        folder: exists.
        specs: of the tensors, in order.
        contents: asked for one tensor at a time.
        max_shard_bytes: most bytes of tensors in a file; one larger tensor gets a file of its own.
    """
    folder = storage.as_path(folder)
    files = name_shards(plan_shards(specs, max_shard_bytes))
    for file, names in files.items():
        write_file(folder / file, {name: specs[name] for name in names}, contents, {"format": "pt"})
    write_index(folder, files, specs)


def name_shards(shards: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    """Groups tensor names by shard, with the file names that transformers uses."""
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
            for number, names in enumerate(shards, start=1)}


def write_index(folder: epath.Path, files: Mapping[str, Sequence[str]],
                specs: Mapping[str, TensorSpec]) -> None:
    """Writes the index of several shards; a single file gets none."""
    if len(files) == 1:
        return
    table = {name: file for file, names in files.items() for name in names}
    total = {"total_size": sum(spec.nbytes for spec in specs.values())}
    storage.write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": dict(sorted(table.items()))})


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: float) -> list[Sequence[str]]:
    """Splits tensor names into shards, in order; a tensor that does not fit starts a new shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards
