"""Hashes tensors while they are read, to check them against the fingerprint that their folder records."""

import collections
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.formats.model import Index, Tensors
from elm_jax.formats.tensors import streaming
from elm_jax.runtime import trees

_SMALL = 1 << 20
"""Largest leaf, in bytes, that is read for the hash alone when the caller has skipped it."""


class HashedTensors:
    """`Tensors` that are checked against a recorded fingerprint.

    A fingerprint hashes the leaves in alphabetical order, and each of them row by row. Parts that are read in
    that order are hashed as they are read; `check` reads the others.
    """

    def __init__(self, tensors: Tensors, recorded: str, where: Any, fault: str, cure: str, *,
                 as_float32: bool = True) -> None:
        """Stores the arguments; reads nothing.

        Args:
            tensors: the tensors to check.
            recorded: their recorded fingerprint.
            where: their folder.
            fault: the error message if the fingerprint differs.
            cure: what the user can do then.
            as_float32: whether values are hashed in float32, as a base's, or in their own dtype.
        """
        self._tensors, self.specs, self.origins = tensors, tensors.specs, tensors.origins
        self._recorded, self._as_float32 = recorded, as_float32
        self._where, self._fault, self._cure = where, fault, cure
        self._whole = trees.Fingerprint()
        self._left = collections.deque(sorted(tensors.specs))
        self._row = 0  # of the first of them: what lies before it is hashed

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf or a part of it, and hashes it if it is the next part in order."""
        rows = self._rows(path, index)
        if index is None:  # the caller may be one of many hosts, which reads only its own parts
            self._pass_small_ones(path)
        array = self._tensors.read(path, index)
        if rows is not None and self._left and self._left[0] == path and rows.start == self._row:
            self._add(array)
        return array

    def check(self) -> None:
        """Hashes the remaining parts and compares the fingerprint with the recorded one.

        Raises:
            InputError: the leaves are not those of which the fingerprint was recorded, or cannot be read.
        """
        while self._left:
            self._read_rest()
        if str(self._whole) != self._recorded:
            raise InputError(describe(self._fault, where=self._where, got=self._whole,
                                      expected=self._recorded, cure=self._cure))

    def _rows(self, path: str, index: Index | None) -> range | None:
        """The rows that a part consists of; None if it holds parts of rows."""
        shape = self.specs[path].shape
        spans = [range(size)[part] for part, size in zip(index or (), shape, strict=False)]
        if any(len(span) < size for span, size in zip(spans[1:], shape[1:], strict=False)):
            return None
        return spans[0] if spans else range(shape[0] if shape else 1)

    def _pass_small_ones(self, path: str) -> None:
        """Reads and hashes skipped small leaves before this one, such as norms that an expert replaces."""
        while self._left and self._left[0] < path and self.specs[self._left[0]].nbytes <= _SMALL:
            self._read_rest()

    def _read_rest(self) -> None:
        """Reads and hashes the rest of the first leaf that is not hashed yet."""
        path = self._left[0]
        shape = self.specs[path].shape
        rest = (slice(self._row, shape[0]), *(slice(0, size) for size in shape[1:])) if self._row else None
        self._add(self._tensors.read(path, rest))

    def _add(self, rows: np.ndarray) -> None:
        path = self._left[0]
        spec = self.specs[path]
        if self._row == 0:
            self._whole.begin(path, spec.shape, "float32" if self._as_float32 else spec.dtype)
        for piece in streaming.pieces(rows):
            self._whole.add(piece.astype(np.float32, copy=False) if self._as_float32 else piece)
        self._row += len(rows) if spec.shape else 1
        if not spec.shape or self._row == spec.shape[0]:
            self._left.popleft()
            self._row = 0
