"""Reads and writes zarr arrays, in folders or in one OCDBT database, with TensorStore.

Orbax and T5X write folders of arrays: either ``<name>/.zarray`` with the chunks beside it, or
``manifest.ocdbt``, a database of the same. Opening reads headers only.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers the name "bfloat16" with numpy)
import numpy as np
import tensorstore as ts
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats.model import Index
from elm_jax.formats.tensors import boxes, in_flight, zarr_chunks
from elm_jax.runtime import storage

MANIFEST = "manifest.ocdbt"
HEADER = ".zarray"
_OPENED_TOGETHER = 64
_CACHE_OVERHEAD = 1 << 20
"""TensorStore counts more than the chunks; what goes over the limit is dropped at once."""


class ZarrArray:
    """A zarr array on disk.

    Attributes:
        name: as in its folder.
        shape: of the array.
        dtype: numpy's or ml_dtypes' name.
        chunks: shape of a chunk; only whole chunks are read.
    """

    def __init__(self, folder: "Folder", name: str, opened: ts.TensorStore) -> None:
        metadata = opened.spec().to_json()["metadata"]
        self._folder, self._opened = folder, opened
        self._compressor = metadata.get("compressor")
        self._separator = metadata.get("dimension_separator", ".")
        self.name, self.shape = name, tuple(opened.shape)
        self.dtype = opened.dtype.name
        self.chunks = tuple(metadata["chunks"])

    def read(self, index: Index | None = None) -> np.ndarray:
        """Reads the array or a part of it.

        Args:
            index: a slice a dimension, counted from the start; None for all of it.

        Raises:
            InputError: a chunk is missing or damaged.
        """
        try:
            return in_flight.read(self._opened, index)
        except in_flight.FAULTS as error:
            raise InputError(describe(
                "A tensor cannot be read", where=f"{self._folder.path}, {self.name}", got=str(error)[:300],
                cure="copy the checkpoint again")) from error

    def keeping_chunks(self) -> "ZarrArray":
        """Returns the same array with a cache, which keeps decoded chunks as long as the result lives."""
        cache_bytes = math.prod(self._grid) * self._chunk_bytes + _CACHE_OVERHEAD
        folder = Folder(self._folder.path, ocdbt=self._folder.ocdbt, cache_bytes=cache_bytes)
        return folder.open([self.name])[self.name]

    @property
    def _chunk_bytes(self) -> int:
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def _grid(self) -> list[int]:
        return [-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)]

    def faults(self) -> list[str]:
        """Lists chunks that are missing or truncated, as ``name/0.0 (missing)``, without decoding them."""
        places = itertools.product(*map(range, self._grid))
        keys = [self._separator.join(map(str, place)) or "0" for place in places]
        found = self._folder.chunk_states(self.name, keys, self._compressor, self._chunk_bytes)
        return [f"{self.name}/{key} ({state})" for key, state in zip(keys, found, strict=True) if state]


class Folder:
    """A folder of zarr arrays.

    Attributes:
        path: the folder.
        ocdbt: whether the arrays are in an OCDBT database.
    """

    def __init__(self, path: epath.Path, *, ocdbt: bool | None = None, cache_bytes: int = 0) -> None:
        """Stores the arguments; opens no file.

        Args:
            path: the folder.
            ocdbt: None looks whether there is a database.
            cache_bytes: decoded chunks that are kept in memory.
        """
        self.path = path.resolve() if storage.is_local(path) else path
        self.ocdbt = (path / MANIFEST).exists() if ocdbt is None else ocdbt
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})

    def names(self) -> list[str]:
        """Names of all arrays."""
        if self.ocdbt:
            return sorted(name for name, keys in self._keys.items() if HEADER in keys)
        return sorted(child.name for child in self.path.iterdir()
                      if child.is_dir() and (child / HEADER).exists())

    def open(self, names: Iterable[str]) -> dict[str, ZarrArray]:
        """Opens arrays by their names.

        Raises:
            InputError: headers cannot be read; all such arrays are named.
        """
        opened, faults = {}, []
        for batch in _batches(names):
            futures = {name: ts.open(self._spec(name), open=True, context=self._context) for name in batch}
            for name, future in futures.items():
                try:
                    opened[name] = ZarrArray(self, name, future.result())
                except in_flight.FAULTS as error:
                    faults.append(f"{name}: {str(error)[:200]}")
        if faults:
            raise InputError(describe("Headers of tensors cannot be read", where=self.path,
                                      got="; ".join(faults), cure="copy the checkpoint again"))
        return opened

    def create(self, name: str, shape: Sequence[int], dtype: str, chunks: Sequence[int]) -> "NewArray":
        """Creates an array, to be filled."""
        # Chunks of zeros are written too, so that a missing chunk is always a fault; without
        # compression, as trained weights shrink little, and slowly.
        spec = {**self._spec(name), "dtype": dtype, "store_data_equal_to_fill_value": True,
                "metadata": {"shape": list(shape), "chunks": list(chunks), "compressor": None}}
        where = f"{self.path}, {name}"
        with in_flight.writing(where):
            return NewArray(ts.open(spec, create=True, context=self._context).result(), chunks, where)

    def chunk_states(self, name: str, keys: Sequence[str], compressor: Mapping[str, Any] | None,
                     decoded_bytes: int) -> list[str]:
        """State of each chunk: ``missing``, ``truncated``, or empty for one that looks whole."""
        if not self.ocdbt:
            return [self._file_state(name, key, compressor, decoded_bytes) for key in keys]
        states = []
        for batch in _batches(keys):
            # The database knows each value's length: if its last byte cannot be read, the file is truncated.
            tails = [self._store.read(f"{name}/{key}", byte_range=slice(-1, None)) for key in batch]
            states += [self._value_state(tail) for tail in tails]
        return states

    def _file_state(self, name: str, key: str, compressor: Mapping[str, Any] | None, decoded: int) -> str:
        path = self.path / name / key
        if not path.exists():
            return "missing"
        if storage.is_local(path) and not zarr_chunks.is_whole(os.fspath(path), compressor, decoded):
            return "truncated"
        return ""

    @staticmethod
    def _value_state(tail: ts.Future) -> str:
        try:
            return "" if tail.result().value else "missing"  # of a file that is gone, an empty value comes
        except in_flight.FAULTS:
            return "truncated"

    @property
    def _base(self) -> Any:
        if storage.is_local(self.path):
            return {"driver": "file", "path": f"{self.path}/"}
        return f"{self.path}/"

    def _spec(self, name: str) -> dict[str, Any]:
        if self.ocdbt:
            kvstore = {"driver": "ocdbt", "base": self._base, "path": f"{name}/"}
        elif storage.is_local(self.path):
            kvstore = {"driver": "file", "path": f"{self.path / name}/"}
        else:
            kvstore = f"{self.path / name}/"
        return {"driver": "zarr", "kvstore": kvstore}

    @functools.cached_property
    def _store(self) -> ts.KvStore:
        return ts.KvStore.open({"driver": "ocdbt", "base": self._base}).result()

    @functools.cached_property
    def _keys(self) -> dict[str, set[str]]:
        """Keys of the database, grouped by array: its chunks and its header."""
        try:
            found: dict[str, set[str]] = {}
            for key in self._store.list().result():
                name, _, chunk = key.decode().rpartition("/")
                found.setdefault(name, set()).add(chunk)
            return found
        except (*in_flight.FAULTS, UnicodeDecodeError) as error:
            raise InputError(describe("The checkpoint's database cannot be read", where=self.path / MANIFEST,
                                      got=str(error)[:300], cure="copy the checkpoint again")) from error


class NewArray:
    """A zarr array that is being written."""

    def __init__(self, opened: ts.TensorStore, chunks: Sequence[int], where: str) -> None:
        self._opened, self._chunks, self._where = opened, tuple(chunks), where

    def write(self, values: np.ndarray, writes: in_flight.Writes, layer: int | None = None) -> None:
        """Starts to write the whole array, or one layer of a stack, chunk by chunk.

        Args:
            values: the contents; they must not change until they are written.
            writes: the pending writes, to which these are added.
            layer: place in the array's second dimension, whose chunks hold one layer each.
        """
        target, chunks = self._opened, self._chunks
        if layer is not None:
            target, chunks = target[:, layer], (chunks[0], *chunks[2:])
        for box in boxes.cut([range(size) for size in values.shape], chunks):
            writes.start(target[box], values[box], self._where)


def _batches(items: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _OPENED_TOGETHER)):
        yield batch
