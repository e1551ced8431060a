"""Reads and copies tensors in pieces, so that a converter can handle models larger than the memory.

At most one whole tensor is in memory; it is transposed, cast, hashed and written in pieces of
`PIECE_BYTES`.
"""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from elm_jax.formats.model import Index, Origin, Tensors, TensorSpec
from elm_jax.formats.tensors import boxes, leaf_values
from elm_jax.runtime import trees

PIECE_BYTES = 1 << 24
AHEAD_BYTES = 1 << 26
_STRIPE = 16
"""Rows that are transposed together. A transposition writes one short run a column: runs of 16 fill
a cache line. Tried 4 to 64 on float32 and bfloat16: 16 is the best, three times as fast as all rows."""


class Stored(Protocol):
    """A tensor that is stored in a file.

    Attributes:
        shape: as in the file.
        dtype: numpy's or ml_dtypes' name.
    """

    shape: tuple[int, ...]
    dtype: str

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Reads as many rows as the contiguous array `rows` has, from row `start` on.

        Args:
            rows: of the tensor's other dimensions; or, of a matrix, parts of rows.
            start: the first row.
            column: where parts of rows begin.
        """
        ...


class StoredTensors:
    """`Tensors` backed by files: a stored tensor for each leaf, or for each entry of a leaf's first axis.

    A tensor may be transposed.
    """

    def __init__(self, stored: Mapping[str, Stored | Sequence[Stored]], origins: Mapping[str, Origin]
                 ) -> None:
        self._stored = stored
        self.origins = origins
        self.specs = {path: _spec_of(tensor, origins[path].transposed) for path, tensor in stored.items()}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a whole leaf, or a part of it, as a contiguous array."""
        found, transposed = self._stored[path], self.origins[path].transposed
        if not isinstance(found, Sequence):
            return read_part(found, index, transposed)
        shape = self.specs[path].shape
        entries, *inner = index if index is not None else (slice(None),) * len(shape)
        sizes = [len(range(size)[part]) for part, size in zip((entries, *inner), shape, strict=True)]
        whole = np.empty(sizes, np.dtype(self.specs[path].dtype))
        for entry, tensor in zip(whole, found[entries], strict=True):
            read_part(tensor, tuple(inner), transposed, entry)
        return whole


class ArrayTensors:
    """`Tensors` backed by arrays in memory."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._flat = trees.flatten(dict(params))
        self.specs = {path: TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
                      for path, leaf in self._flat.items()}
        self.origins = {path: Origin(path) for path in self._flat}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Returns a leaf, or a view of a part of it."""
        array = np.asarray(self._flat[path])
        return array if index is None else array[index]


class CastTensors:
    """`Tensors` cast to another floating-point type; `where` is their folder, for errors."""

    def __init__(self, tensors: Tensors, dtype: str, where: Any) -> None:
        self._tensors, self._where = tensors, where
        self.origins = tensors.origins
        self.specs = {path: TensorSpec(spec.shape, dtype) for path, spec in tensors.specs.items()}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf or a part of it and casts it (rounded to nearest); a large one is read in boxes.

        Raises:
            InputError: a value is too large for the type.
        """
        found, wanted = self._tensors.specs[path], self.specs[path]
        if found.dtype == wanted.dtype:
            return self._tensors.read(path, index)
        index = index if index is not None else (slice(None),) * len(found.shape)
        spans = [range(size)[part] for part, size in zip(index, found.shape, strict=True)]
        cast = np.empty([len(span) for span in spans], np.dtype(wanted.dtype))
        # Boxes are long in the dimension that chunks are cut in and that rows in files are many in.
        step = boxes.chunk_shape(found.shape, np.dtype(found.dtype).itemsize, AHEAD_BYTES)
        for box in boxes.cut(spans, step):
            part = self._tensors.read(path, box)
            cast[boxes.within(box, spans)] = leaf_values.cast_leaf(part, wanted.dtype, path, self._where)
        return cast


def _spec_of(tensor: Stored | Sequence[Stored], transposed: bool) -> TensorSpec:
    """Shape and dtype of the leaf that a stored tensor, or one for each entry of its first axis, holds."""
    if not isinstance(tensor, Sequence):
        return TensorSpec(_turned(tensor.shape, transposed), tensor.dtype)
    return TensorSpec((len(tensor), *_turned(tensor[0].shape, transposed)), tensor[0].dtype)


def read_part(stored: Stored, index: Index | None = None, transposed: bool = False,
              out: np.ndarray | None = None) -> np.ndarray:
    """Reads a stored tensor, or a part of it, in this program's orientation.

    Args:
        stored: the tensor.
        index: a slice for each dimension, in this program's orientation; None for all of it.
        transposed: whether the two dimensions in the file are swapped.
        out: a contiguous array of the part's shape and dtype that is filled; None makes one.

    Returns:
        A contiguous array. For a vector or a matrix, a local file is read only where the part is, row by row
        for parts of rows; for a tensor of more dimensions, all rows that the part touches.
    """
    shape = _turned(stored.shape, transposed)
    index = index if index is not None else (slice(None),) * len(shape)
    spans = [range(size)[part] for part, size in zip(index, shape, strict=True)]
    if out is None:
        out = np.empty([len(span) for span in spans], np.dtype(stored.dtype))
    if out.size == 0:
        return out
    if out.ndim == 0:
        stored.fill(out.reshape(1), 0)
        return out
    lying, target = (spans[::-1], out.T) if transposed else (spans, out)
    rows, inner = lying[0], tuple(slice(span.start, span.stop) for span in lying[1:])
    if not transposed and out.shape[1:] == stored.shape[1:]:
        stored.fill(out, rows.start)
        return out
    of_rows = len(inner) == 1
    shape, column = ((len(lying[1]),), inner[0].start) if of_rows else (stored.shape[1:], 0)
    buffer = np.empty((min(len(rows), _rows_a_piece(shape, out.dtype)), *shape), out.dtype)
    for start in range(0, len(rows), len(buffer)):
        block = buffer[:len(rows) - start]
        stored.fill(block, rows.start + start, column)
        copy(target[start:start + len(block)], block if of_rows else block[(slice(None), *inner)])
    return out


def read_ahead(tensors: Tensors, paths: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields leaves in order, while another thread reads the next ones.

    At most `AHEAD_BYTES` are read ahead; a larger leaf is read when its turn comes.
    """
    rest, waiting, ahead = collections.deque(paths), collections.deque(), 0
    with ThreadPoolExecutor(max_workers=1) as thread:
        while rest or waiting:
            if not waiting:
                waiting.append((0, thread.submit(tensors.read, rest.popleft())))
            size, reading = waiting.popleft()
            box, reading = [reading.result()], None  # keeps no reference while the caller works on the leaf
            ahead -= size
            while rest and ahead + tensors.specs[rest[0]].nbytes <= AHEAD_BYTES:
                size = tensors.specs[rest[0]].nbytes
                waiting.append((size, thread.submit(tensors.read, rest.popleft())))
                ahead += size
            yield box.pop()


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies ``target[...] = source``, in cache-sized stripes if the two have different memory orders."""
    target, source = _as_integers(target), _as_integers(source)
    slow = int(np.argmax(source.strides)) if source.ndim == 2 else 0
    if source.ndim != 2 or slow == int(np.argmax(target.strides)):
        target[...] = source
        return
    for start in range(0, source.shape[slow], _STRIPE):
        stripe = (slice(None),) * slow + (slice(start, start + _STRIPE),)
        target[stripe] = source[stripe]


def pieces(array: np.ndarray, transposed: bool = False) -> Iterator[np.ndarray]:
    """Yields the contents of an array or of its transpose in row-major order, as contiguous pieces."""
    view = array.T if transposed else array
    if view.flags.c_contiguous:
        flat = view.reshape(-1)
        step = max(1, PIECE_BYTES // view.dtype.itemsize)
        yield from (flat[start:start + step] for start in range(0, flat.size, step))
        return
    step = max(1, PIECE_BYTES // max(1, view[:1].nbytes))
    for start in range(0, len(view), step):
        part = view[start:start + step]
        block = np.empty(part.shape, part.dtype)
        copy(block, part)
        yield block


def fingerprint(tensors: Tensors) -> str:
    """Fingerprint of all leaves in float32 (as `trees.fingerprint`), with one leaf in memory at a time."""
    whole = trees.Fingerprint()
    for path in sorted(tensors.specs):
        add_to_fingerprint(whole, path, tensors.read(path))
    return str(whole)


def add_to_fingerprint(whole: trees.Fingerprint, path: str, array: np.ndarray) -> None:
    """Adds a leaf's values to a fingerprint, in float32."""
    whole.leaf(path, array.shape, "float32", (piece.astype(np.float32) for piece in pieces(array)))


def equal(left: Stored, right: Stored) -> bool:
    """Whether two stored tensors are equal to the bit; compares them piece by piece."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.shape:
        return read_part(left).tobytes() == read_part(right).tobytes()
    step = _rows_a_piece(left.shape[1:], np.dtype(left.dtype))
    ours, theirs = (np.empty((min(left.shape[0], step), *left.shape[1:]), np.dtype(left.dtype))
                    for _ in range(2))
    for start in range(0, left.shape[0], step):
        a, b = ours[:left.shape[0] - start], theirs[:left.shape[0] - start]
        left.fill(a, start)
        right.fill(b, start)
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return False
    return True


def _turned(shape: Sequence[int], transposed: bool) -> tuple[int, ...]:
    return tuple(shape)[::-1] if transposed else tuple(shape)


def _rows_a_piece(row: Sequence[int], dtype: np.dtype) -> int:
    return max(1, PIECE_BYTES // max(1, math.prod(row) * dtype.itemsize))


def _as_integers(array: np.ndarray) -> np.ndarray:
    """Views values as integers of the same bits, which numpy copies faster than ml_dtypes' types."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array
