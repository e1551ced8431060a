"""Reads the header of a GGUF file: metadata, and name, type, shape and place of every tensor.

A header holds a few hundred thousand short items (tokens, merges). The package ``gguf`` keeps an array of
each of them, and loops as often as a damaged count says; this reader checks every length against the file,
and takes a tenth of the time. The names of types and the sizes of their blocks come from the package.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe

MAGIC = b"GGUF"
VERSIONS = (2, 3)
QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Types of tensors that are read."""
_ALIGNMENT = 32
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
            11: "<i8", 12: "<f8"}
"""NumPy's dtype of a value by the number of its type."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_FETCH = "fetch the file again"


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor in a GGUF file.

    Attributes:
        quantisation: name of its type, one of `QUANTISATIONS`.
        shape: rows first, as NumPy counts (the file has the reverse).
        offset: of its first byte in the file.
        nbytes: its size in the file.
    """

    quantisation: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands in front of the tensors.

    Attributes:
        metadata: values by key: numbers, booleans, texts, arrays of numbers, lists of texts.
        tensors: by name, in the file's order.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


class _Cursor:
    """Reads a file's header from front to back; never beyond the file's end."""

    def __init__(self, path: epath.Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self.size, self.place = path, file, size, 0

    def take(self, count: int, what: str) -> bytes:
        """Reads `count` bytes of `what`.

        Raises:
            InputError: the file ends before.
        """
        if count > self.size - self.place:
            raise InputError(describe(
                "The GGUF file is cut short", where=self._path, cure=_FETCH,
                got=f"{self.size} bytes, where {what} ends at byte {self.place + count}"))
        self.place += count
        return self._file.read(count)

    def count(self, what: str) -> int:
        """Reads a number u64."""
        return int.from_bytes(self.take(8, what), "little")

    def number(self, what: str) -> int:
        """Reads a number u32."""
        return int.from_bytes(self.take(4, what), "little")

    def text(self, what: str) -> str:
        """Reads a text in UTF-8."""
        found = self.take(self.count(what), what)
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise InputError(describe("A text in the GGUF file is no UTF-8", where=f"{self._path}, {what}",
                                      got=repr(found[:100]), cure=_FETCH)) from error

    def value(self, kind: int, what: str) -> Any:
        """Reads a value of a type given by its number; an array as an array or as a list of texts."""
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            inner, count = self.number(what), self.count(what)
            if inner == _STRING:
                if count > (self.size - self.place) // 8:  # each text has eight bytes at least
                    self.take(8 * count, what)
                return [self.text(what) for _ in range(count)]
            dtype = self._dtype(inner, what)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        dtype = self._dtype(kind, what)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def _dtype(self, kind: int, what: str) -> np.dtype:
        if kind not in _SCALARS:
            raise InputError(describe("A value in the GGUF file has an unknown type", where=self._path,
                                      got=f"{what}: type {kind}", cure=_FETCH))
        return np.dtype(_SCALARS[kind])


def read_header(path: epath.Path) -> Header:
    """Reads and checks the header of a file; reads no tensor.

    Raises:
        InputError: the file is no GGUF of a known version; it is cut short; a value is damaged; tensors have
            a quantisation that this program does not read (all are named).
    """
    size = path.stat().length
    with path.open("rb") as file:
        cursor = _Cursor(path, file, size)
        num_tensors, num_values = _read_counts(path, cursor)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.text("the metadata's keys")
            if key in metadata:
                raise InputError(describe("A key stands twice in the GGUF file", where=path, got=repr(key),
                                          cure=_FETCH))
            metadata[key] = cursor.value(cursor.number(key), key)
        found = [_read_entry(path, cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise InputError(describe("The GGUF file's alignment is wrong", where=path, got=repr(alignment),
                                  expected="a number from 1", cure=_FETCH))
    return Header(metadata, _placed(path, found, -(-cursor.place // alignment) * alignment, size))


def _read_counts(path: epath.Path, cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of metadata values, behind the magic word and the version."""
    magic = cursor.take(4, "the magic word") if cursor.size >= 4 else b""
    if magic != MAGIC:
        raise InputError(describe("The file is no GGUF", where=path, got=f"it begins with {magic!r}",
                                  expected=repr(MAGIC)))
    version = cursor.number("the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise InputError(describe(
            "The GGUF file's version is not read", where=path,
            got="numbers with the highest byte first" if swapped else f"version {version}",
            expected=f"version {' or '.join(map(str, VERSIONS))}, the lowest byte first",
            cure="convert the model with a current llama.cpp"))
    return cursor.count("the number of tensors"), cursor.count("the number of values")


def _read_entry(path: epath.Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type and relative offset of the next tensor."""
    what = "the table of tensors"
    name, dimensions = cursor.text(what), cursor.number(what)
    if dimensions > _MOST_DIMENSIONS:
        raise InputError(describe("A tensor in the GGUF file has too many dimensions", cure=_FETCH,
                                  where=f"{path}, {name}", got=dimensions, expected=_MOST_DIMENSIONS))
    shape = tuple(cursor.count(what) for _ in range(dimensions))[::-1]
    return name, shape, cursor.number(what), cursor.count(what)


def _placed(path: epath.Path, found: list[tuple[str, tuple[int, ...], int, int]], start: int,
            size: int) -> dict[str, TensorEntry]:
    """Tensors by name with their places in the file, checked against its size."""
    import gguf  # late: most models lie in other files, and it takes 0.2 s

    names = {int(each): each.name for each in gguf.GGMLQuantizationType}
    unknown = [f"{name}: {names.get(kind, f'type {kind}')}" for name, _, kind, _ in found
               if names.get(kind) not in QUANTISATIONS]
    if unknown:
        raise InputError(describe(
            "Tensors of a quantisation that is not read", where=path,
            got=", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""),
            expected=", ".join(QUANTISATIONS), cure="take a file of another quantisation: Q8_0, Q4_K_M, F16"))
    tensors: dict[str, TensorEntry] = {}
    for name, shape, kind, offset in found:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if name in tensors or not shape or shape[-1] % block:
            raise InputError(describe(
                "A tensor's entry in the GGUF file is wrong", where=f"{path}, {name}", cure=_FETCH,
                got="the name stands twice" if name in tensors else f"shape {list(shape)}",
                expected=f"one entry, rows of whole blocks of {block} values for {names[kind]}"))
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > size:
            raise InputError(describe(
                "The GGUF file is cut short", where=path, cure=_FETCH,
                got=f"{size} bytes, where tensor {name} ends at byte {start + offset + nbytes}"))
        tensors[name] = TensorEntry(names[kind], shape, start + offset, nbytes)
    return tensors
