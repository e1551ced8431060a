"""Reads numpy's files, npy and npz, of any contents: a shape is believed only if the file is as large."""

import io
import math
import zipfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage

_HEADS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_UNREADABLE = (ValueError, EOFError, OSError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError)
"""What numpy raises at a head that is no head: it is a Python expression that numpy parses."""


def read_head(file: BinaryIO, size: int, where: object) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Reads the head of an npy file, and leaves the file behind it.

    Args:
        file: at its start.
        size: its bytes.
        where: for errors.

    Returns:
        Shape, dtype, and whether the values are in Fortran's order.

    Raises:
        InputError: it is no head, or one of objects, or of more values than the file holds.
    """
    try:
        shape, in_fortran, dtype = _HEADS[npy.read_magic(file)](file)
    except _UNREADABLE as error:
        raise _damaged(where, str(error)[:200]) from error
    if dtype.hasobject:
        raise _damaged(where, "objects of Python, which are never read")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size - file.tell():
        raise _damaged(where, f"shape {list(shape)} of {dtype}, {needed} bytes, in {size - file.tell()}")
    return shape, dtype, in_fortran


def read_npy(content: bytes, where: object) -> np.ndarray:
    """Reads an array of any shape from the bytes of an npy file.

    Raises:
        InputError: they are not those of an array of numbers.
    """
    file = io.BytesIO(content)
    shape, dtype, in_fortran = read_head(file, len(content), where)
    count = math.prod(shape)
    if not count * dtype.itemsize:
        return np.zeros(shape, dtype)
    values = np.frombuffer(content, dtype, count, file.tell())
    return values.reshape(shape, order="F" if in_fortran else "C").copy()


def read_npz(path: storage.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads arrays of any shape from an npz file, by their names.

    Raises:
        InputError: the file is missing or damaged, or lacks an array.
    """
    content = storage.read_bytes(path)
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in names:
                facts = archive.getinfo(f"{name}.npy")
                if facts.file_size > _MOST_PACKED * max(1, facts.compress_size):
                    raise _damaged(path, f"{name} of {facts.file_size} bytes in {facts.compress_size}")
                found[name] = archive.read(facts)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, NotImplementedError,
            RuntimeError, UnicodeError) as error:
        raise _damaged(path, str(error)[:200]) from error
    return {name: read_npy(part, f"{path}, {name}") for name, part in found.items()}


_MOST_PACKED = 1100
"""A zip's method packs no more than 1,032 bytes into one."""


def _damaged(where: object, got: str) -> InputError:
    return InputError(describe("A file of arrays is damaged", where=where, got=got,
                               cure="fetch or write it again"))
