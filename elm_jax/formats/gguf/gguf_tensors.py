"""Tensors of a GGUF file, dequantised block of rows by block of rows, as `streaming.Stored`.

Files are read with plain reads: pages of a memory map would count as resident memory and pile up.
F32, F16 and BF16 keep their type; quantised tensors become float32, with the dequantiser of the package
``gguf``.
"""

import dataclasses
import math

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats.gguf.gguf_header import TensorEntry
from elm_jax.formats.tensors import streaming
from elm_jax.runtime import storage

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_VALUES = 1 << 20
"""Values that are dequantised together; the dequantiser needs some ten bytes more for each."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file (see `streaming.Stored`)."""

    path: epath.Path
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, rows first."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """Name of the dtype in which it is read."""
        return _PLAIN.get(self.entry.quantisation, "float32")

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Reads rows from `start` on, or parts of rows; a vector counts as rows of one value."""
        if len(self.shape) == 1:
            rows[...] = self._rows(0, 1)[0, start:start + len(rows)]
            return
        width = math.prod(self.shape[1:])
        target = rows.reshape(len(rows), -1)
        step = max(1, _BLOCK_VALUES // width)
        for first in range(0, len(rows), step):
            part = target[first:first + step]
            part[...] = self._rows(start + first, len(part))[:, column:column + part.shape[1]]

    def raw(self, start: int, count: int = streaming.PIECE_BYTES) -> bytes:
        """Reads at most `count` bytes as they stand in the file, from the tensor's byte `start` on."""
        count = min(count, self.entry.nbytes - start)
        with open(self.path, "rb") if storage.is_local(self.path) else self.path.open("rb") as file:
            file.seek(self.entry.offset + start)
            contents = file.read(count)
        if len(contents) != count:
            raise InputError(describe("The file has become shorter while it was read", where=self.path))
        return contents

    def _rows(self, start: int, count: int) -> np.ndarray:
        """Reads whole rows [count, width]."""
        total = 1 if len(self.shape) == 1 else self.shape[0]
        row_bytes = self.entry.nbytes // total
        packed = np.frombuffer(self.raw(start * row_bytes, count * row_bytes), np.uint8)
        packed = packed.reshape(count, row_bytes)
        if self.entry.quantisation in _PLAIN:
            return packed.view(np.dtype(self.dtype))
        import gguf  # late, as in `gguf_header`

        return gguf.dequantize(packed, gguf.GGMLQuantizationType[self.entry.quantisation])


@dataclasses.dataclass(frozen=True)
class RowsOf:
    """Rows of another stored tensor, in any order (see `streaming.Stored`).

    Attributes:
        stored: a matrix or a vector.
        rows: i64[N], the row of `stored` for each row; neighbours are read together, so they should lie near
            each other.
    """

    stored: streaming.Stored
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, rows first."""
        return (len(self.rows), *self.stored.shape[1:])

    @property
    def dtype(self) -> str:
        """Name of the dtype."""
        return self.stored.dtype

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Reads rows from `start` on, or parts of rows."""
        wanted = self.rows[start:start + len(rows)]
        if not len(wanted):
            return
        low, high = int(wanted.min()), int(wanted.max()) + 1
        block = np.empty((high - low, *rows.shape[1:]), rows.dtype)
        self.stored.fill(block, low, column)
        rows[...] = block[wanted - low]
