"""Cuts arrays into boxes, one index range for each dimension: chunks on disk, parts to read or write."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from elm_jax.formats.model import Index


def chunk_shape(shape: Sequence[int], itemsize: int, limit: int,
                layer_axis: int | None = None) -> tuple[int, ...]:
    """Shape of the chunks that an array is cut into: equal parts of at most `limit` bytes.

    The largest dimension is divided first, so that hosts that each want a part of it read little else.

    Args:
        shape: of the array.
        itemsize: bytes an element.
        limit: most bytes a chunk.
        layer_axis: dimension that stacks layers: a chunk holds one of them.
    """
    chunks = [1 if axis == layer_axis else max(1, size) for axis, size in enumerate(shape)]
    while math.prod(chunks) * itemsize > limit and max(chunks, default=1) > 1:
        axis = int(np.argmax(chunks))
        chunks[axis] //= next(number for number in range(2, chunks[axis] + 1) if chunks[axis] % number == 0)
    return tuple(chunks)


def cut(spans: Sequence[range], step: Sequence[int]) -> Iterator[Index]:
    """Cuts a part of an array into boxes, in row-major order.

    Args:
        spans: of the part, a range a dimension.
        step: shape of a box; boxes begin at multiples of it, and those at the edges are smaller.
    """
    starts = [range(span.start // size * size, span.stop, size)
              for span, size in zip(spans, step, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(max(start, span.start), min(start + size, span.stop))
                    for start, size, span in zip(corner, step, spans, strict=True))


def joined(spans: Sequence[range], chunks: Sequence[int], itemsize: int, limit: int) -> tuple[int, ...]:
    """Shape of boxes of whole chunks: as many chunks of a part as fit into `limit` bytes, at least one.

    Args:
        spans: of the part.
        chunks: shape of a chunk.
        itemsize: bytes an element.
        limit: most bytes a box of several chunks.
    """
    step = list(chunks)
    for axis in reversed(range(len(step))):
        room = limit // max(1, math.prod(step) * itemsize)
        step[axis] *= max(1, min(room, -(-len(spans[axis]) // step[axis])))
    return tuple(step)


def within(box: Index, spans: Sequence[range]) -> Index:
    """A box relative to the start of a part, instead of to the start of the array."""
    return tuple(slice(part.start - span.start, part.stop - span.start)
                 for part, span in zip(box, spans, strict=True))
