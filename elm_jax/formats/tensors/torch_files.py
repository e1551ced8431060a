"""Reads PyTorch's checkpoint files with ``weights_only``: a file that holds code is refused.

torch is imported only for such files. They are memory-mapped, not loaded; since mapped pages count as
resident memory once they are read, the file is mapped again after every `_REOPEN_BYTES`.
"""

import dataclasses
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats.tensors.safetensors_files import check_index, read_index
from elm_jax.runtime import storage

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"
_REOPEN_BYTES = 1 << 27
_WIDENED = {f"torch.{name}": "torch.bfloat16" for name in ("float8_e4m3fn", "float8_e5m2")}
"""Types that are read as bfloat16, which holds each of their values."""
_REFUSALS = ("GLOBAL", "Unsupported operand", "Unsupported class")
"""Words of torch's errors for a file that holds more than tensors."""


class TorchFiles:
    """The PyTorch files of one folder, at most one of them mapped at a time.

    Attributes:
        whole: files that are read into memory as a whole: those of torch before 1.6 cannot be mapped.
    """

    def __init__(self) -> None:
        self.whole: set[epath.Path] = set()
        self._path: epath.Path | None = None
        self._tensors: Mapping[str, Any] = {}
        self._read = 0

    def open(self, path: epath.Path) -> Mapping[str, Any]:
        """Opens a file; returns its tensors by name, not yet read."""
        if path != self._path or (self._read > _REOPEN_BYTES and path not in self.whole):
            self._tensors = {}  # unmaps the old file before the new one is mapped
            if not zipfile.is_zipfile(path):
                self.whole.add(path)
            self._tensors = _tensors(path, load(path, mapped=path not in self.whole))
            self._path, self._read = path, 0
        return self._tensors

    def stored(self, path: epath.Path) -> dict[str, "TorchTensor"]:
        """Opens a file; returns its tensors as `streaming.Stored`."""
        return {name: TorchTensor(self, path, name, tuple(tensor.shape),
                                   _WIDENED.get(str(tensor.dtype), str(tensor.dtype)).removeprefix("torch."))
                for name, tensor in self.open(path).items()}

    def fill(self, path: epath.Path, name: str, rows: np.ndarray, start: int, column: int) -> None:
        """Reads rows, or parts of rows, of one tensor."""
        tensor = self.open(path)[name]
        part = (tensor if tensor.ndim else tensor.reshape(1))[start:start + len(rows)]
        if rows.shape != tuple(part.shape):
            part = part[:, column:column + rows.shape[1]]
        if rows.dtype.kind == "V":  # bfloat16, which torch does not give to numpy
            part = part.to(_torch(path).bfloat16)
            part, rows = part.contiguous().view(_torch(path).uint16), rows.view(np.uint16)
        rows[...] = part.numpy()
        self._read += rows.nbytes


def _tensors(path: epath.Path, value: Any) -> dict[str, Any]:
    """Checks that a loaded file is a dictionary of tensors by name."""
    torch = _torch(path)
    wrong = "nothing" if isinstance(value, Mapping) and not value else type(value).__name__
    if isinstance(value, Mapping) and value:
        wrong = ", ".join(str(name) for name, tensor in value.items()
                          if not isinstance(name, str) or not isinstance(tensor, torch.Tensor))
    if wrong:
        raise InputError(describe("The file holds something else than tensors by name", where=path,
                                  got=wrong[:300]))
    return {name: tensor.detach() for name, tensor in value.items()}


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor in a PyTorch file (see `streaming.Stored`)."""

    files: TorchFiles
    path: epath.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Reads rows from `start` on, or parts of rows."""
        self.files.fill(self.path, self.name, rows, start, column)


def load(path: storage.PathLike, mapped: bool = False) -> Any:
    """Loads tensors and plain containers onto the CPU with ``torch.load``.

    Raises:
        InputError: torch is not installed; the file holds code; the file is damaged.
    """
    torch = _torch(path)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch lists none, and one class lies in a module not to be imported here
        if not any(word in str(error) for word in _REFUSALS):
            raise _damaged(path, error) from error
        raise InputError(describe(
            "The file is refused: it holds something else than tensors, which may be code", where=path,
            got=_first_line(error), expected="what torch.load(..., weights_only=True) reads",
            cure="fetch the model as safetensors")) from error


def _damaged(path: Any, error: Exception) -> InputError:
    return InputError(describe("The PyTorch file is truncated or damaged", where=path,
                               got=_first_line(error), cure="fetch the file again"))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line]
    named = [line for line in lines if any(word in line for word in _REFUSALS)]
    return (named or lines or [type(error).__name__])[0][:300]


def _torch(path: Any) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(describe("Reading this file needs PyTorch, which is not installed", where=path,
                                  cure="pip install torch, or fetch the model as safetensors")) from error
    return torch


def open_tensors(folder: storage.PathLike) -> tuple[dict[str, TorchTensor], tuple[str, ...]]:
    """Opens the tensors of ``pytorch_model.bin`` or of its shards; also returns notes for the report."""
    folder = storage.as_path(folder)
    files, table = TorchFiles(), None
    if not (folder / SINGLE_FILE).exists():
        table = read_index(folder / INDEX_FILE)
    tensors: dict[str, TorchTensor] = {}
    for name in dict.fromkeys(table.values()) if table else [SINGLE_FILE]:
        tensors |= files.stored(folder / name)
    if table is not None:
        check_index(folder / INDEX_FILE, table, {name: tensor.path.name for name, tensor in tensors.items()})
    if not files.whole:
        return tensors, ()
    names = ", ".join(sorted(path.name for path in files.whole))
    return tensors, (f"Written by PyTorch before 1.6, so each read into memory as a whole: {names} (as "
                     "safetensors, or saved again by a newer PyTorch, a model is read tensor by tensor)",)
