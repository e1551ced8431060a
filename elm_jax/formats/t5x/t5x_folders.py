"""T5X's checkpoint folders: finds the newest whole checkpoint and lists its arrays.

A model folder holds ``checkpoint_<step>`` folders. T5X's current layout (Orbax) keeps the arrays in an item
``state`` of the step; the older one has them in the step itself, beside a msgpack file ``checkpoint``
that names them and holds small ones. Both give an array the name ``target.encoder.layers_0...``.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import serialization

from elm_jax.errors import InputError, describe
from elm_jax.formats.leaf_names import T5X_TREE_FILE as TREE_FILE
from elm_jax.formats.model import Index
from elm_jax.formats.tensors import orbax_files, zarr_files
from elm_jax.runtime import storage

ITEMS = ("state", "default")
"""Names of the arrays' folder within a step: T5X's, and Orbax's default."""
PREFIX = "checkpoint_"
_STEP = re.compile(rf"{PREFIX}(\d+)")
_UNFINISHED = re.compile(r"\.orbax-checkpoint-tmp|\.tmp-\d+$|\.partial$")
_TENSORFLOW = b"model_checkpoint_path"
_SPEC_KEYS = {"driver", "kvstore", "metadata"}


class InlineArray:
    """An array that is stored in the msgpack file itself."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.shape, self.dtype = name, tuple(values.shape), values.dtype.name
        self.chunks = self.shape
        self._values = values

    def read(self, index: Index | None = None) -> np.ndarray:
        """Returns the array or a part of it."""
        return self._values if index is None else self._values[index]

    def keeping_chunks(self) -> "InlineArray":
        """Returns the array itself, which is in memory already."""
        return self

    def faults(self) -> list[str]:
        """Returns no faults: the array is in memory already."""
        return []


Stored = zarr_files.ZarrArray | InlineArray


@dataclasses.dataclass(frozen=True)
class StepCheckpoint:
    """The checkpoint of one step.

    Attributes:
        folder: of the step.
        arrays: folder of its arrays.
        step: from the folder's name; None if it has another.
        notes: which of several it is.
    """

    folder: epath.Path
    arrays: epath.Path
    step: int | None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contents:
    """The arrays of a checkpoint, by name.

    Attributes:
        folder: of the arrays.
        listed: name of an array (``target.encoder...``) -> its name in the folder.
        inline: arrays that the msgpack file holds.
    """

    folder: zarr_files.Folder
    listed: Mapping[str, str]
    inline: Mapping[str, np.ndarray]

    def open(self, names: list[str]) -> dict[str, Stored]:
        """Opens arrays by their names."""
        opened = self.folder.open(self.listed[name] for name in names if name not in self.inline)
        return {name: InlineArray(name, self.inline[name]) if name in self.inline
                else opened[self.listed[name]] for name in names}

    def names(self) -> set[str]:
        """Names of all arrays."""
        return {*self.listed, *self.inline}


def is_t5x(folder: epath.Path) -> bool:
    """Whether a folder is a T5X checkpoint, a half-written one included, or contains such checkpoints."""
    if not folder.is_dir():
        return folder.name == TREE_FILE and folder.exists()
    named_so = _STEP.fullmatch(folder.name) or _UNFINISHED.search(folder.name)
    return bool(named_so or _arrays_folder(folder)) or any(
        _STEP.match(child.name) for child in folder.iterdir())


def find(folder: epath.Path) -> StepCheckpoint:
    """Finds the checkpoint in a T5X model's folder, a step's folder, or a folder of a step's arrays.

    Raises:
        InputError: there is none, or it is half written.
    """
    if not folder.exists():
        raise InputError(describe("There is no such folder", where=folder,
                                  got=storage.what_is_there(folder), cure="check the path"))
    if not folder.is_dir():
        folder = folder.parent
    if _UNFINISHED.search(folder.name):
        raise _half_written(folder, "its name is that of a folder which is still being written")
    if _arrays_folder(folder) or _STEP.fullmatch(folder.name):
        return _step(folder)
    return _newest(folder)


def contents(checkpoint: StepCheckpoint) -> Contents:
    """Lists the arrays of a checkpoint; reads headers, and the small arrays in the msgpack file."""
    folder = zarr_files.Folder(checkpoint.arrays)
    there = folder.names()
    listed, inline = {name: name for name in there}, {}
    for name, leaf in _tree(checkpoint.arrays):
        if isinstance(leaf, np.ndarray | np.generic):
            inline[name] = np.asarray(leaf)
        elif isinstance(leaf, dict):
            listed.pop(name, None)
            stored = _stored_name(name, leaf, checkpoint.arrays)
            if stored in there:
                listed[name] = stored
    return Contents(folder, listed, inline)


def _arrays_folder(folder: epath.Path) -> epath.Path | None:
    """Folder of a step's arrays; the step's folder or that folder itself may be given."""
    marks = (zarr_files.MANIFEST, orbax_files.METADATA_FILE, TREE_FILE)
    for candidate in (*(folder / item for item in ITEMS), folder):
        if candidate.is_dir() and any((candidate / mark).exists() for mark in marks):
            return candidate
    return None


def _step(folder: epath.Path) -> StepCheckpoint:
    """The checkpoint of one step, which must be whole."""
    reason = _why_half_written(folder)
    if reason:
        raise _half_written(folder, reason)
    arrays = _arrays_folder(folder)
    parent = folder.parent if folder.name in ITEMS else folder
    match = _STEP.fullmatch(parent.name)
    return StepCheckpoint(parent, arrays or folder, int(match.group(1)) if match else None)


def _newest(folder: epath.Path) -> StepCheckpoint:
    """The newest whole checkpoint in a model's folder."""
    children = [child for child in folder.iterdir() if child.name.startswith(PREFIX)]
    steps = sorted((child for child in children if _STEP.fullmatch(child.name)),
                   key=lambda child: int(_STEP.fullmatch(child.name).group(1)), reverse=True)
    unfinished = {child.name: "still being written" for child in children if _UNFINISHED.search(child.name)}
    for child in steps:
        reason = _why_half_written(child)
        if reason is None:
            notes = []
            if len(steps) > 1:
                notes.append(f"Read {child.name}, the newest whole one of {len(steps)} checkpoints")
            if unfinished:
                notes.append("Left out as half written: " + ", ".join(
                    f"{name} ({why})" for name, why in sorted(unfinished.items())))
            return dataclasses.replace(_step(child), notes=tuple(notes))
        unfinished[child.name] = reason
    if unfinished:
        raise _half_written(folder, ", ".join(f"{name}: {why}" for name, why in sorted(unfinished.items())))
    raise InputError(describe(
        "There is no T5X checkpoint here", where=folder,
        got=", ".join(sorted(child.name for child in folder.iterdir())[:20]) or "an empty folder",
        expected=f"{PREFIX}<step>/, or a step's own folder"))


def _why_half_written(step: epath.Path) -> str | None:
    """Name of a last-written file that a checkpoint lacks; None if the checkpoint is whole."""
    arrays = _arrays_folder(step)
    if arrays is None:
        return f"it has no {TREE_FILE} file, and no {ITEMS[0]} that is whole"
    ocdbt = (arrays / zarr_files.MANIFEST).exists()
    tree = (arrays / TREE_FILE).exists()
    if not ocdbt and any(child.name.startswith("ocdbt.process_") for child in arrays.iterdir()):
        return f"it has no {zarr_files.MANIFEST}"
    if not tree and not (arrays / orbax_files.METADATA_FILE).exists():
        return f"it has no {orbax_files.METADATA_FILE}"
    if not storage.is_local(step) and arrays != step and not (step / orbax_files.COMMIT_FILE).exists():
        return f"it has no {orbax_files.COMMIT_FILE}"
    return None


def _half_written(folder: epath.Path, reason: str) -> InputError:
    return InputError(describe("The checkpoint is half written", where=folder, got=reason,
                               cure="give a checkpoint that was written to its end, or copy it again"))


def _tree(arrays: epath.Path) -> Iterator[tuple[str, Any]]:
    """Leaves of the msgpack file by dotted name; none if there is no such file."""
    path = arrays / TREE_FILE
    if not path.exists():
        return
    raw = path.read_bytes()
    if raw.startswith(_TENSORFLOW):
        raise InputError(describe("This is a checkpoint of TensorFlow, not of T5X", where=path,
                                  cure="convert it with T5X's convert_tf_checkpoint first"))
    try:
        tree = serialization.msgpack_restore(raw)
    except Exception as error:  # msgpack's and numpy's errors at damaged bytes have no common class
        raise InputError(describe("The checkpoint's list of tensors cannot be read", where=path,
                                  got=f"{type(error).__name__}: {error}"[:300],
                                  cure="copy the checkpoint again")) from error
    if not isinstance(tree, dict):
        raise InputError(describe("The checkpoint's list of tensors is no dictionary", where=path,
                                  got=type(tree).__name__))
    yield from _leaves(tree.get("optimizer", tree), "")


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and not set(node) >= _SPEC_KEYS:
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _stored_name(name: str, spec: Mapping[str, Any], where: epath.Path) -> str:
    """Folder name of a leaf's array, from its TensorStore spec; the rest of the spec is ignored."""
    kvstore = spec["kvstore"] if isinstance(spec["kvstore"], dict) else {}
    path = str(kvstore.get("path", spec.get("path", ""))).rstrip("/")
    if not path or "/" in path or path in (".", ".."):
        raise InputError(describe("A tensor lies outside of its checkpoint", where=f"{where}, {name}",
                                  got=path, expected="the name of a folder in it"))
    return path
