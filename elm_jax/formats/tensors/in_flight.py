"""Large arrays through TensorStore with few bytes on their way at a time.

TensorStore by itself starts all chunks of an array at once, and holds most of a second copy meanwhile.
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

BYTES = 1 << 26
"""Of chunks that are read, or written, at the same time."""
FAULTS = (ValueError, OSError, RuntimeError, KeyError)
"""What TensorStore raises."""


def read(opened: ts.TensorStore, index: Index | None = None) -> np.ndarray:
    """An array or a part of it: memory for it, and for two boxes of chunks.

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
    """A function of its own: what was read is gone before more is asked for."""
    box, future = reading.popleft()
    out[boxes.within(box, spans)] = future.result()


class Writes:
    """Writes on their way, of all arrays of a checkpoint: at most `BYTES`, or one that is larger.

    Nothing is on its way any more when the block ends, also when it ends with an error: a write that comes
    late would make its files anew in a folder that was cleaned up.
    """

    def __init__(self) -> None:
        self._started: collections.deque[tuple[int, str, Any]] = collections.deque()
        self._bytes = 0

    def __enter__(self) -> "Writes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Waits for all; of several errors, the first is raised."""
        try:
            if error is None:
                self.wait()
        finally:
            while self._started:
                with suppress(RunError):
                    self._finish_one()

    def start(self, target: ts.TensorStore, values: np.ndarray, where: str) -> None:
        """Starts to write an array or a box of one; nobody may change the values before all is written."""
        nbytes = math.prod(values.shape) * values.dtype.itemsize
        while self._started and self._bytes + nbytes > BYTES:
            self._finish_one()
        with writing(where):
            future = target.write(values, can_reference_source_data_indefinitely=True)
        self._started.append((nbytes, where, future))
        self._bytes += nbytes

    def wait(self) -> None:
        """Waits for everything that was started."""
        while self._started:
            self._finish_one()

    def _finish_one(self) -> None:
        nbytes, where, future = self._started.popleft()
        self._bytes -= nbytes
        with writing(where):
            future.result()


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Turns TensorStore's errors into one RunError."""
    try:
        yield
    except FAULTS as error:
        raise RunError(describe("Cannot write a tensor", where=where, got=str(error)[:300],
                                cure="free space or choose another folder, then start again")) from error
