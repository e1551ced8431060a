"""Flat arrays in numpy's file format, read only where the file is as long as its head says."""

import io
import os
import tokenize
from typing import BinaryIO

import numpy as np

from elm_jax.runtime import storage

_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_head(file: BinaryIO, dtype: np.dtype | type) -> int:
    """Reads the head of an array; returns its number of values, and leaves the file where they begin.

    Raises:
        TypeError: another dtype, or a shape that is not flat.
        ValueError: another format, or more values than the file holds.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADS:
        raise ValueError(f"version {version} of numpy's format")
    try:
        shape, _, found = _HEADS[version](file)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:  # what numpy lets through
        raise ValueError(f"a head that cannot be read: {error}") from error
    if found != np.dtype(dtype) or len(shape) != 1:
        raise TypeError(f"{found}{list(shape)}, expected flat {np.dtype(dtype)}")
    begin = file.tell()
    held = file.seek(0, os.SEEK_END) - begin
    if not 0 <= shape[0] * found.itemsize <= held:
        raise ValueError(f"{held} bytes of values, expected {shape[0]} values of {found}")
    file.seek(begin)
    return shape[0]


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
