"""Arrays in numpy's file formats, read only where the file is as long as its head says."""

import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage

_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_head(file: BinaryIO, dtype: np.dtype | type) -> int:
    """Reads the head of an array; returns its number of values, and leaves the file where they begin.

    Raises:
        TypeError: another dtype, or a shape that is not flat.
        ValueError: another format, or more values than the file holds.
    """
    shape, _, found = _any_head(file)
    if found != np.dtype(dtype) or len(shape) != 1:
        raise TypeError(f"{found}{list(shape)}, expected flat {np.dtype(dtype)}")
    begin = file.tell()
    held = file.seek(0, os.SEEK_END) - begin
    if not 0 <= shape[0] * found.itemsize <= held:
        raise ValueError(f"{held} bytes of values, expected {shape[0]} values of {found}")
    file.seek(begin)
    return shape[0]


def _any_head(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the head of an array of any kind: its shape, whether in Fortran's order, and its dtype."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADS:
        raise ValueError(f"version {version} of numpy's format")
    try:
        return _HEADS[version](file)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:  # of numpy
        raise ValueError(f"a head that cannot be read: {error}") from error


def read_flat(path: storage.PathLike, dtype: np.dtype | type, *, mapped: bool = False) -> np.ndarray:
    """Reads a flat array that fills its file, dtype[n]; mapped into memory on a local disk if asked.

    Raises:
        OSError: the file cannot be read.
        TypeError: the array has another dtype, or is not flat.
        ValueError: the file is of another format, or of another length than its head says.
    """
    local = storage.is_local(path)
    with open(path, "rb") if local else io.BytesIO(storage.as_path(path).read_bytes()) as file:
        count = read_head(file, dtype)
        begin, size = file.tell(), count * np.dtype(dtype).itemsize
        if file.seek(0, os.SEEK_END) != begin + size:
            raise ValueError(f"{file.tell()} bytes, expected {begin + size}")
        if local and mapped and count:
            return np.memmap(path, dtype, "r", begin, (count,)).view(np.ndarray)
        file.seek(begin)
        return np.frombuffer(file.read(size), dtype).copy()


def read_npz(path: storage.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads arrays of any shape from an npz file, by their names.

    Raises:
        InputError: the file is missing or damaged, or lacks an array.
    """
    content, place = storage.read_bytes(path), str(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = {}
            for name in names:
                place = f"{path}, {name}"
                facts = archive.getinfo(f"{name}.npy")
                if facts.file_size > _MOST_PACKED * max(1, facts.compress_size):
                    raise ValueError(f"{facts.file_size} bytes, packed into {facts.compress_size}")
                found[name] = _of_any_shape(archive.read(facts))
            return found
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, EOFError, OSError,
            NotImplementedError, RuntimeError) as error:
        raise InputError(describe("A file of arrays is damaged", where=place, got=str(error)[:200],
                                  cure="fetch or write it again")) from error


_MOST_PACKED = 1100
"""The method of zip files packs no more than 1,032 bytes into one."""


def _of_any_shape(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    shape, in_fortran, dtype = _any_head(file)
    if dtype.hasobject:
        raise TypeError("objects of Python, which are never read")
    count, held = math.prod(shape), len(content) - file.tell()
    if min(shape, default=0) < 0 or count * dtype.itemsize != held or not dtype.itemsize:
        raise ValueError(f"{held} bytes of values, expected shape {list(shape)} of {dtype}")
    values = np.frombuffer(content, dtype, count, file.tell()) if count else np.zeros(0, dtype)
    return values.reshape(shape, order="F" if in_fortran else "C").copy()
