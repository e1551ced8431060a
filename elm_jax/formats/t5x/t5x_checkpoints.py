"""Reads T5X's checkpoints: both layouts (Orbax; zarr with a msgpack file) and both parameter trees.

Tensors are read through TensorStore on request, and written one leaf at a time. The optimizer's
state stays behind. What is written holds a model's parameters and its step: T5X infers and evaluates from
it as it is, and starts training from it with a fresh optimizer if its gin says so::

    utils.RestoreCheckpointConfig:
      assignment_map = ((r'state/param_states/.*', None),)
      fallback_to_scratch = True
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.model import Index, Model, Origin, TensorSpec
from elm_jax.formats.t5x import t5x_folders
from elm_jax.models.t5 import t5x_names
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.t5x_names import TensorPlace
from elm_jax.runtime import storage
from elm_jax.vocabularies.vocabulary import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
)

FACTS = "t5x"
"""Key of `Model.facts`: ``{'step': 1000, 'scanned': False, 'own_biases': False}``, as it was read."""
TARGET = "target."
"""Prefix of the names of a model's parameters in a T5X checkpoint."""
STEP = "state.step"
LARGEST_STEP = 2**31 - 1
"""Largest step: T5X stores it as an int32."""
VOCABULARY_FILES = tuple(kind.FILE for kind in (SentencePieceVocabulary, ByteVocabulary, TokenizerVocabulary))
NETWORK_FILE = "network.gin"
GIN_FILES = (NETWORK_FILE, "config.gin")


class T5XTensors:
    """`Tensors` of a T5X checkpoint; reading in the order of `specs` reads each stack of layers once."""

    def __init__(self, stored: Mapping[str, t5x_folders.Stored], tree: t5x_names.Tree) -> None:
        """Stores the arguments; reads nothing.

        Args:
            stored: arrays by T5X's name without ``target``.
            tree: the array of each leaf.
        """
        self._places = {path: tree.places[path][0] for path in t5x_names.in_cheap_order(tree)}
        self._stored, self._config = stored, tree.config
        self._kept: t5x_folders.Stored | None = None
        shapes = t5x_names.leaf_shapes(tree.config)
        self.specs = {path: TensorSpec(shapes[path], stored[place.name].dtype)
                      for path, place in self._places.items()}
        self.origins = {path: origin_of(place) for path, place in self._places.items()}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf, or the chunks that contain a part of it.

        Raises:
            InputError: a chunk is damaged.
        """
        place, shape = self._places[path], self.specs[path].shape
        stored = self._array(place)
        index = index if index is not None else (slice(None),) * len(shape)
        spans = [range(size)[part] for part, size in zip(index, shape, strict=True)]
        joined = t5x_names.joined_axis(path)
        split = joined is not None and len(stored.shape) == 3 + (place.layer is not None)
        box = [slice(span.start, span.stop) for span in spans]
        if split:
            size = self._config.head_dim
            heads = slice(spans[joined].start // size, -(-spans[joined].stop // size))
            box[joined:joined + 1] = [heads, slice(0, size)]
            first = spans[joined].start - heads.start * size
        if place.layer is not None:
            box.insert(t5x_names.LAYER_AXIS, slice(place.layer, place.layer + 1))
        part = stored.read(tuple(box))
        if place.layer is not None:
            part = part.squeeze(t5x_names.LAYER_AXIS)
        if split:
            width = (heads.stop - heads.start) * size
            part = part.reshape(*part.shape[:joined], width, *part.shape[joined + 2:])
            part = part[(slice(None),) * joined + (slice(first, first + len(spans[joined])),)]
        return np.ascontiguousarray(part)

    def _array(self, place: TensorPlace) -> t5x_folders.Stored:
        """The stored tensor of a leaf; if its chunks hold several layers, they stay cached for the stack."""
        stored = self._stored[place.name]
        if place.layer is None or stored.chunks[t5x_names.LAYER_AXIS] == 1:
            return stored
        kept = self._kept
        if kept is None or kept.name != stored.name:
            kept = self._kept = None  # frees the previous stack: two do not fit into memory
            kept = self._kept = stored.keeping_chunks()
        return kept


def open_t5x(folder: storage.PathLike, vocabulary_path: storage.PathLike | None = None, *,
             scanned: bool | None = None, experts_per_token: int | None = None) -> Model:
    """Opens a T5X checkpoint; checks names, shapes and chunk sizes without reading contents.

    Args:
        folder: a model's folder (its newest whole checkpoint is taken), a ``checkpoint_<step>`` in it,
            or the file ``checkpoint`` of the older layout.
        vocabulary_path: a vocabulary's file, which T5X keeps elsewhere; None takes one of
            `VOCABULARY_FILES` in the folder or beside it.
        scanned: whether layers must be stacked; None takes either.
        experts_per_token: of a network with experts; None takes what the gin config beside it says, or 1.

    Raises:
        InputError: there is no checkpoint, or it is half written, truncated, of another network, or holds
            optimiser state only; all names and shapes that do not fit are listed.
    """
    checkpoint = t5x_folders.find(storage.as_path(folder))
    where = checkpoint.folder
    contents = t5x_folders.contents(checkpoint)
    stored = _parameters(contents, where)
    tree = t5x_names.read_tree({name: array.shape for name, array in stored.items()}, where,
                               _run_config(where), experts_per_token)
    _check_tree(tree, stored, where, scanned)
    if experts_per_token is not None and tree.config.sparse is None:
        raise InputError(describe("The checkpoint has no experts", where=where,
                                  got=f"experts_per_token {experts_per_token}", cure="leave it out"))
    tensors = T5XTensors(stored, tree)
    notes = (*checkpoint.notes, *tree.notes, *_check_biases(tensors, stored, tree, where),
             *_left_out(contents.names()))
    _check_gin(tree.config, where)
    vocabulary, vocabulary_path = _vocabulary(vocabulary_path, where)
    tree_checks.check_vocabulary(vocabulary, tree.config, vocabulary_path)
    facts = {FACTS: {"step": _read_step(contents, checkpoint), **dataclasses.asdict(tree.form)}}
    return Model("t5x", str(where), tree.config, tensors, vocabulary, facts, notes)


def parameter_shapes(folder: storage.PathLike) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a checkpoint by T5X's own name, for any network.

    Raises:
        InputError: there is no checkpoint, or it is half written or holds no parameters.
    """
    checkpoint = t5x_folders.find(storage.as_path(folder))
    stored = _parameters(t5x_folders.contents(checkpoint), checkpoint.folder)
    return {name: array.shape for name, array in stored.items()}


def _parameters(contents: t5x_folders.Contents, where: epath.Path) -> dict[str, t5x_folders.Stored]:
    """The parameters among all stored tensors, by T5X's name without ``target``."""
    names = sorted(name for name in contents.names() if name.startswith(TARGET))
    if not names:
        raise InputError(describe("The checkpoint holds no parameters", where=where,
                                  got=", ".join(sorted(contents.names())[:20]) or "no tensor",
                                  expected=f"names that begin with {TARGET!r}"))
    opened = contents.open(names)
    return {name.removeprefix(TARGET).replace(".", "/"): array for name, array in opened.items()}


def origin_of(place: TensorPlace) -> Origin:
    """Origin of a leaf, as reports of a conversion name it."""
    return Origin(TARGET + place.name.replace("/", "."), layer=place.layer)


def _run_config(where: epath.Path) -> str:
    """The gin config beside a checkpoint; empty if there is none."""
    files = (folder / name for folder in (where, where.parent) for name in GIN_FILES[::-1])
    return next((storage.read_text(file) for file in files if file.exists()), "")


def _check_tree(tree: t5x_names.Tree, stored: Mapping[str, t5x_folders.Stored], where: epath.Path,
                scanned: bool | None) -> None:
    """All checks of the tree that a checkpoint holds which need no contents."""
    found = {name: array.shape for name, array in stored.items()}
    if scanned is not None and scanned != tree.form.scanned:
        kinds = {True: "layers stacked (scanned)", False: "one tensor a layer (not scanned)"}
        raise InputError(describe("The checkpoint is of the other kind", where=where,
                                  got=kinds[tree.form.scanned], expected=kinds[scanned]))
    tree_checks.check_leaves("The checkpoint does not hold a T5", where, found, tree.wanted,
                             t5x_names.shape_hint(tree, found))
    tree_checks.check_dtypes(where, {name: array.dtype for name, array in stored.items()})
    faults = [fault for array in stored.values() for fault in array.faults()]
    if faults:
        raise InputError(describe("The checkpoint's files are not whole", where=where,
                                  got=f"{len(faults)} chunks: {', '.join(faults)}",
                                  cure="copy the checkpoint again"))


def _check_biases(tensors: T5XTensors, stored: Mapping[str, t5x_folders.Stored], tree: t5x_names.Tree,
                  where: epath.Path) -> tuple[str, ...]:
    """Raises InputError unless all layers of a stack have equal position biases, as this program's do."""
    notes = []
    for path, places in tree.places.items():
        if len(places) == 1:
            continue
        first = tensors.read(path)
        different = 0
        for place in places:
            copy = stored[place.name].read()
            copy = copy if place.layer is None else copy[:, place.layer]
            different += copy.tobytes() != first.tobytes()
        if different:
            raise InputError(describe(
                "Layers have relative position biases of their own (as umT5's have)",
                where=f"{where}, {path}",
                got=f"{different} of {len(places)} layers differ from the first",
                expected="the same bias in every layer, as T5, T5 1.1 and mT5 have"))
        notes.append(f"The relative position bias of the {path.partition('/')[0]} lies there once a layer; "
                     "all are equal, one is kept")
    return tuple(notes)


def _left_out(names: set[str]) -> tuple[str, ...]:
    others = [name for name in names if not name.startswith(TARGET) and name != STEP]
    return (f"Left out: {len(others)} tensors of the optimizer's state",) if others else ()


def _read_step(contents: t5x_folders.Contents, checkpoint: t5x_folders.StepCheckpoint) -> int:
    if STEP not in contents.names():
        return checkpoint.step or 0
    stored = contents.open([STEP])[STEP]
    step, got = None, f"{stored.dtype}{list(stored.shape)}"
    # A run of T5X that was resumed carries its step in float32.
    if math.prod(stored.shape) == 1 and np.dtype(stored.dtype).kind in "iuf":
        step = float(stored.read().reshape(()))
        got = f"{step} ({got})"
    if step is None or not (step.is_integer() and 0 <= step <= LARGEST_STEP):
        raise InputError(describe("The checkpoint's step is wrong", where=checkpoint.folder,
                                  got=got, expected=f"one whole number from 0 to {LARGEST_STEP}"))
    return int(step)


def _vocabulary(path: storage.PathLike | None, where: epath.Path) -> tuple[bytes | None, epath.Path]:
    """The contents of a vocabulary's file, and where it lies."""
    if path is not None:
        path = storage.as_path(path)
        if not path.exists():
            raise InputError(describe("There is no such vocabulary", where=path,
                                      got=storage.what_is_there(path), cure="check the path"))
        return storage.read_bytes(path), path
    near = (folder / name for folder in (where, where.parent) for name in VOCABULARY_FILES)
    file = next((file for file in near if file.exists()), None)
    return (None, where) if file is None else (storage.read_bytes(file), file)


def _check_gin(config: T5Config, where: epath.Path) -> None:
    """Raises InputError if the gin config beside a checkpoint contradicts the config from its shapes."""
    for file in (folder / name for folder in (where, where.parent) for name in GIN_FILES):
        if file.exists():
            t5x_names.check_gin(storage.read_text(file), config, file)
