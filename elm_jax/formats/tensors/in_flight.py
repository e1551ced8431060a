"""Reads and writes large arrays with TensorStore, with a limit on the bytes in flight.

By itself TensorStore starts all chunks of an array at once, and so holds almost a second copy of it.
"""

import collections
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np
import tensorstore as ts

from elm_jax.errors import RunError, describe
from elm_jax.formats.model import Index
from elm_jax.formats.tensors import boxes
from elm_jax.runtime import storage

BYTES = 1 << 26
"""Most bytes of chunks that are read, or written, at the same time."""
FAULTS = (ValueError, OSError, RuntimeError, KeyError)
"""Exceptions that TensorStore raises."""


def read(opened: ts.TensorStore, index: Index | None = None) -> np.ndarray:
    """Reads an array or a part of it; needs memory for the result and for two boxes of chunks.

    Args:
        opened: the array.
        index: a slice a dimension, counted from the start; None for all of it.
    """
    index = index if index is not None else (slice(None),) * len(opened.shape)
    spans = [range(size)[part] for part, size in zip(index, opened.shape, strict=True)]
    dtype = opened.dtype.numpy_dtype
    chunks = opened.chunk_layout.read_chunk.shape or opened.shape
    step = boxes.joined(spans, chunks, dtype.itemsize, BYTES // 2)
    parts = list(boxes.cut(spans, step))
    if len(parts) <= 1:
        return opened[tuple(slice(span.start, span.stop) for span in spans)].read().result()
    out = np.empty([len(span) for span in spans], dtype)
    reading: collections.deque[tuple[Index, ts.Future]] = collections.deque()
    for box in parts:
        reading.append((box, opened[box].read()))
        if len(reading) == 2:
            _take(reading, out, spans)
    while reading:
        _take(reading, out, spans)
    return out


def _take(reading: collections.deque[tuple[Index, ts.Future]], out: np.ndarray, spans: list[range]) -> None:
    """Copies a box into the result; a separate function, so that its buffer is freed before the next read."""
    box, future = reading.popleft()
    out[boxes.within(box, spans)] = future.result()


class Writes:
    """The pending writes of a checkpoint's arrays: at most `BYTES` in flight, or one larger write.

    All writes have ended when the block ends, also after an error: a late write would create its files again
    in a folder that was cleaned up.
    """

    def __init__(self) -> None:
        self._started: collections.deque[tuple[int, str, Any]] = collections.deque()
        self._bytes = 0

    def __enter__(self) -> "Writes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Waits for all pending writes; raises the first error."""
        try:
            if error is None:
                self.wait()
        finally:
            while self._started:
                with suppress(RunError):
                    self._finish_one()

    def start(self, target: ts.TensorStore, values: np.ndarray, where: str) -> None:
        """Starts to write an array or a box of it; the values must not change until the write has ended."""
        nbytes = math.prod(values.shape) * values.dtype.itemsize
        while self._started and self._bytes + nbytes > BYTES:
            self._finish_one()
        with writing(where):
            future = target.write(values, can_reference_source_data_indefinitely=True)
        self._started.append((nbytes, where, future))
        self._bytes += nbytes

    def wait(self) -> None:
        """Waits for all pending writes."""
        while self._started:
            self._finish_one()

    def _finish_one(self) -> None:
        nbytes, where, future = self._started.popleft()
        self._bytes -= nbytes
        with writing(where):
            future.result()


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Turns TensorStore's errors inside a block into one RunError."""
    try:
        yield
    except FAULTS as error:
        raise RunError(describe("Cannot write a tensor", where=where, got=str(error)[:300],
                                cure=storage.cure_of(error))) from error
