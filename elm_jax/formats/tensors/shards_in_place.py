"""Safetensors files of a fixed layout, whose tensors can be written in any order and by several threads.

Threads write parts of tensors at their final offsets. A run that resumes another one does not write again
what was written and flushed before.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.formats.model import TensorSpec
from elm_jax.formats.tensors import safetensors_files
from elm_jax.runtime import staging, storage


class ShardsInPlace:
    """The safetensors files of one checkpoint on a local disk, open for writing.

    Attributes:
        specs: of the tensors, in their order.
        files: names of the tensors by file.
    """

    def __init__(self, folder: epath.Path, specs: Mapping[str, TensorSpec], max_shard_bytes: float) -> None:
        """Stores the arguments; opens no file.

        Args:
            folder: exists.
            specs: of the tensors, in the order of the files.
            max_shard_bytes: most bytes of tensors in a file; one larger tensor gets a file of its own.
        """
        self.folder, self.specs = folder, dict(specs)
        shards = safetensors_files.plan_shards(specs, max_shard_bytes)
        self.files = safetensors_files.name_shards(shards)
        self._file_of = {name: file for file, names in self.files.items() for name in names}
        self._open: dict[str, int] = {}
        self._starts: dict[str, int] = {}

    def held(self) -> set[str]:
        """Names of the tensors whose files exist in full length; call it before the files are opened."""
        lengths = {file: len(self._header(file)[0]) + sum(self.specs[name].nbytes for name in names)
                   for file, names in self.files.items()}
        return {name for name, file in self._file_of.items()
                if (self.folder / file).exists() and (self.folder / file).stat().length == lengths[file]}

    def __enter__(self) -> "ShardsInPlace":
        """Opens the files; creates missing ones in their full length."""
        with storage.guard_writes(self.folder):
            for file in self.files:
                self._begin(file)
        staging.sync_names(self.folder)
        return self

    def __exit__(self, *_: Any) -> None:
        """Closes the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def _header(self, file: str) -> tuple[bytes, dict[str, int]]:
        specs = {name: self.specs[name] for name in self.files[file]}
        return safetensors_files.make_header(specs, {"format": "pt"})

    def _begin(self, file: str) -> None:
        text, starts = self._header(file)
        self._starts |= starts
        descriptor = self._open[file] = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o666)
        size = len(text) + sum(self.specs[name].nbytes for name in self.files[file])
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)  # fails now if the disk is too small
        os.pwrite(descriptor, text, 0)

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Writes a part of a tensor.

        Args:
            name: of the tensor.
            first: place of the part's first element, row by row.
            values: flat and contiguous, in the tensor's dtype.
        """
        descriptor = self._open[self._file_of[name]]
        position = self._starts[name] + first * values.dtype.itemsize
        rest = memoryview(values.view(np.uint8))
        with storage.guard_writes(self.folder):
            while rest:
                count = os.pwrite(descriptor, rest, position)
                rest, position = rest[count:], position + count

    def flush(self) -> None:
        """Waits until everything written so far is on the disk."""
        with storage.guard_writes(self.folder):
            for descriptor in self._open.values():
                os.fdatasync(descriptor)

    def finish(self) -> None:
        """Writes the index, when all tensors are written."""
        self.flush()
        safetensors_files.write_index(self.folder, self.files, self.specs)
