"""T5X's checkpoints: both of its layouts (Orbax, and zarr folders beside a msgpack file), both of its trees.

Tensors are read through TensorStore when they are asked for, and written one leaf at a time. The optimizer's
state stays behind. What is written holds a model's parameters and its step: T5X infers and evaluates from
it as it is, and starts training from it with a fresh optimizer if its gin says so::

    utils.RestoreCheckpointConfig:
      assignment_map = ((r'state/param_states/.*', None),)
      fallback_to_scratch = True
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from flax import serialization

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.experts.formats import (
    boxes,
    checks,
    in_flight,
    orbax_files,
    streaming,
    t5x_folders,
    zarr_files,
)
from elm_jax.experts.formats.model import Index, Model, Origin, TensorSpec
from elm_jax.models import convert_t5x
from elm_jax.models.convert_t5x import Form, Place
from elm_jax.models.t5_config import T5Config
from elm_jax.runtime import staging, storage
from elm_jax.vocabularies.vocabulary import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)

FACTS = "t5x"
"""Key of `Model.facts`: ``{'step': 1000, 'scanned': False, 'own_biases': False}``, in which form it lay."""
TARGET = "target."
"""What the names of a model's parameters begin with, in a checkpoint of T5X."""
STEP = "state.step"
LARGEST_STEP = 2**31 - 1
"""T5X keeps it as an int32."""
VOCABULARY_FILES = tuple(kind.FILE for kind in (SentencePieceVocabulary, ByteVocabulary, TokenizerVocabulary))
NETWORK_FILE = "network.gin"
GIN_FILES = (NETWORK_FILE, "config.gin")
CHUNK_BYTES = 1 << 26
"""Of what is written. T5X's own aim: fits many ways to split an array over hosts."""
_VERSION = 3
"""Of the msgpack file; see T5X's `checkpoints.VERSION`."""


class T5XTensors:
    """`Tensors` of a T5X checkpoint. Reading them in the order of `specs` reads each stack only once."""

    def __init__(self, stored: Mapping[str, t5x_folders.Stored], tree: convert_t5x.Tree) -> None:
        """Reads nothing.

        Args:
            stored: arrays by T5X's name without ``target``.
            tree: which leaf lies in which of them.
        """
        self._places = {path: tree.places[path][0] for path in convert_t5x.in_cheap_order(tree)}
        self._stored, self._config = stored, tree.config
        self._kept: t5x_folders.Stored | None = None
        shapes = convert_t5x.leaf_shapes(tree.config)
        self.specs = {path: TensorSpec(shapes[path], stored[place.name].dtype)
                      for path, place in self._places.items()}
        self.origins = {path: _origin(place) for path, place in self._places.items()}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """A whole leaf, or a part of it; only the chunks that it lies in are read.

        Raises:
            InputError: a chunk is damaged.
        """
        place, shape = self._places[path], self.specs[path].shape
        stored = self._array(place)
        index = index if index is not None else (slice(None),) * len(shape)
        spans = [range(size)[part] for part, size in zip(index, shape, strict=True)]
        joined = convert_t5x.joined_axis(path)
        split = joined is not None and len(stored.shape) == 3 + (place.layer is not None)
        box = [slice(span.start, span.stop) for span in spans]
        if split:
            size = self._config.head_dim
            heads = slice(spans[joined].start // size, -(-spans[joined].stop // size))
            box[joined:joined + 1] = [heads, slice(0, size)]
            first = spans[joined].start - heads.start * size
        if place.layer is not None:
            box.insert(convert_t5x.LAYER_AXIS, slice(place.layer, place.layer + 1))
        part = stored.read(tuple(box))
        if place.layer is not None:
            part = part.squeeze(convert_t5x.LAYER_AXIS)
        if split:
            width = (heads.stop - heads.start) * size
            part = part.reshape(*part.shape[:joined], width, *part.shape[joined + 2:])
            part = part[(slice(None),) * joined + (slice(first, first + len(spans[joined])),)]
        return np.ascontiguousarray(part)

    def _array(self, place: Place) -> t5x_folders.Stored:
        """The tensor to read. Where chunks hold several layers, those of one stack are kept."""
        stored = self._stored[place.name]
        if place.layer is None or stored.chunks[convert_t5x.LAYER_AXIS] == 1:
            return stored
        kept = self._kept
        if kept is None or kept.name != stored.name:
            kept = self._kept = None  # lets go of the stack before: two are too much for the memory
            kept = self._kept = stored.keeping_chunks()
        return kept


def open_t5x(folder: storage.PathLike, vocabulary_path: storage.PathLike | None = None, *,
             scanned: bool | None = None) -> Model:
    """Opens a T5X checkpoint; names, shapes and the length of every chunk are checked, contents not read.

    Args:
        folder: a model's folder (its newest whole checkpoint is taken), a ``checkpoint_<step>`` in it,
            or the file ``checkpoint`` of the older layout.
        vocabulary_path: a vocabulary's file, which T5X keeps elsewhere; None takes one of
            `VOCABULARY_FILES` that lies in the folder or beside it.
        scanned: whether layers must be stacked; None takes either.

    Raises:
        InputError: there is no checkpoint, or it is half written, truncated, of another network or
            optimiser alone; names and shapes that do not fit are listed, all at once.
    """
    checkpoint = t5x_folders.find(storage.as_path(folder))
    where = checkpoint.folder
    contents = t5x_folders.contents(checkpoint)
    stored = _parameters(contents, where)
    tree = _checked_tree(stored, where, scanned)
    tensors = T5XTensors(stored, tree)
    notes = (*checkpoint.notes, *tree.notes, *_check_biases(tensors, stored, tree, where),
             *_left_out(contents.names()))
    _check_gin(tree.config, where)
    vocabulary = _vocabulary(vocabulary_path, where)
    checks.check_vocabulary(vocabulary, tree.config.vocab_size, vocabulary_path or where)
    facts = {FACTS: {"step": _read_step(contents, checkpoint), **dataclasses.asdict(tree.form)}}
    return Model("t5x", str(where), tree.config, tensors, vocabulary, facts, notes)


def parameter_shapes(folder: storage.PathLike) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a checkpoint by T5X's own name, of whatever network it is.

    Raises:
        InputError: there is no checkpoint, or it is half written or holds no parameters.
    """
    checkpoint = t5x_folders.find(storage.as_path(folder))
    stored = _parameters(t5x_folders.contents(checkpoint), checkpoint.folder)
    return {name: array.shape for name, array in stored.items()}


def _parameters(contents: t5x_folders.Contents, where: epath.Path) -> dict[str, t5x_folders.Stored]:
    """The parameters among all tensors, by T5X's name without ``target``."""
    names = sorted(name for name in contents.names() if name.startswith(TARGET))
    if not names:
        raise InputError(describe("The checkpoint holds no parameters", where=where,
                                  got=", ".join(sorted(contents.names())[:20]) or "no tensor",
                                  expected=f"names that begin with {TARGET!r}"))
    opened = contents.open(names)
    return {name.removeprefix(TARGET).replace(".", "/"): array for name, array in opened.items()}


def _origin(place: Place) -> Origin:
    return Origin(TARGET + place.name.replace("/", "."), layer=place.layer)


def _checked_tree(stored: Mapping[str, t5x_folders.Stored], where: epath.Path,
                  scanned: bool | None) -> convert_t5x.Tree:
    """The tree that the checkpoint holds, after all that can be checked without its contents."""
    found = {name: array.shape for name, array in stored.items()}
    tree = convert_t5x.read_tree(found, where)
    if scanned is not None and scanned != tree.form.scanned:
        kinds = {True: "layers stacked (scanned)", False: "one tensor a layer (not scanned)"}
        raise InputError(describe("The checkpoint is of the other kind", where=where,
                                  got=kinds[tree.form.scanned], expected=kinds[scanned]))
    checks.check_leaves("The checkpoint does not hold a T5", where, found, tree.wanted,
                        convert_t5x.shape_hint(tree, found))
    checks.check_dtypes(where, {name: array.dtype for name, array in stored.items()})
    faults = [fault for array in stored.values() for fault in array.faults()]
    if faults:
        raise InputError(describe("The checkpoint's files are not whole", where=where,
                                  got=f"{len(faults)} chunks: {', '.join(faults)}",
                                  cure="copy the checkpoint again"))
    return tree


def _check_biases(tensors: T5XTensors, stored: Mapping[str, t5x_folders.Stored], tree: convert_t5x.Tree,
                  where: epath.Path) -> tuple[str, ...]:
    """Relative position biases of all layers must be equal: this program's network has one a stack."""
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


def _read_step(contents: t5x_folders.Contents, checkpoint: t5x_folders.Checkpoint) -> int:
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


def _vocabulary(path: storage.PathLike | None, where: epath.Path) -> bytes | None:
    if path is not None:
        path = storage.as_path(path)
        if not path.exists():
            raise InputError(describe("There is no such vocabulary", where=path))
        return storage.read_bytes(path)
    near = (folder / name for folder in (where, where.parent) for name in VOCABULARY_FILES)
    return next((storage.read_bytes(file) for file in near if file.exists()), None)


def _check_gin(config: T5Config, where: epath.Path) -> None:
    """T5X writes its gin config beside its checkpoints: what it says of the network must be so."""
    for file in (folder / name for folder in (where, where.parent) for name in GIN_FILES):
        if file.exists():
            convert_t5x.check_gin(storage.read_text(file), config, file)


def write_t5x(folder: storage.PathLike, model: Model, *, layout: str = "orbax",
              scanned: bool | None = None, step: int | None = None) -> dict[str, Origin]:
    """Writes a model's folder with one checkpoint that T5X restores, as a stream.

    Nothing stands under the folder's name before it is whole. Beside the checkpoint lie the network's
    dimensions as gin (``network.gin``) and the vocabulary.

    Args:
        folder: does not exist, or is empty.
        model: dtypes on disk stay as they are.
        layout: ``orbax`` is what T5X writes today; ``zarr``, the older one, is read by T5X of any age.
        scanned: True for scalable T5, layers stacked; False for minimal T5; None for the form in which a
            T5X checkpoint lay that the model comes from, minimal T5 where there was none.
        step: of the checkpoint; None takes the model's own, or 0.

    Returns:
        Where each leaf lies now.

    Raises:
        InputError: the folder is taken, T5X has no such network, or the model is not the one that its folder
            records.
        RunError: the disk is full.
    """
    if layout not in _LAYOUTS:
        raise unknown_name("layout of T5X checkpoints", layout, _LAYOUTS)
    form = _form(model, scanned)
    if step is None:
        step = int(model.facts.get(FACTS, {}).get("step", 0))
    _check_writable(model, form, step)
    with staging.staged(folder) as target:
        checkpoint = _LAYOUTS[layout](target / f"{t5x_folders.PREFIX}{step}")
        origins = _write_leaves(checkpoint, model, form)
        model.check()
        for name, value in model.beside.items():
            storage.write_json(target / name, value)
        _write_beside(target, model, form)
        checkpoint.finish(step)
    return origins


def _form(model: Model, scanned: bool | None) -> Form:
    """The form to write: the one that is asked for, else the one that the model had in T5X."""
    if scanned is not None:
        return convert_t5x.SCALABLE if scanned else convert_t5x.MINIMAL
    if model.config.adapter is not None:  # T5X's scalable network has none
        return convert_t5x.MINIMAL
    facts = model.facts.get(FACTS, {})
    stacked = bool(facts.get("scanned"))
    return Form(stacked, stacked or bool(facts.get("own_biases")))


def _check_writable(model: Model, form: Form, step: int) -> None:
    """All that can be wrong, before anything is written."""
    config, tensors = model.config, model.tensors
    if not 0 <= step <= LARGEST_STEP:
        raise InputError(describe("A checkpoint's step is wrong", got=step,
                                  expected=f"a whole number from 0 to {LARGEST_STEP}"))
    if config.adapter is not None and form.own_biases:
        raise InputError(describe("T5X's scalable network has no adapters", where=model.where,
                                  got="--scanned for a model with adapters",
                                  cure="write its layers one by one (--no-scanned)"))
    distances = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
    if distances != (convert_t5x.BUCKETS, convert_t5x.MAX_DISTANCE):
        raise InputError(describe("T5X's networks have other relative positions", where=model.where,
                                  got="{} buckets up to distance {}".format(*distances),
                                  expected=f"{convert_t5x.BUCKETS} buckets up to {convert_t5x.MAX_DISTANCE}"))
    checks.check_leaves("The tensors do not fit the network", model.where,
                        {path: spec.shape for path, spec in tensors.specs.items()},
                        convert_t5x.leaf_shapes(config))
    checks.check_dtypes(model.where, {path: spec.dtype for path, spec in tensors.specs.items()})
    mixed = sorted(name for name, dtypes in _dtypes(model, form).items() if len(dtypes) > 1)
    if mixed:
        raise InputError(describe("Layers of different dtypes cannot be stacked", where=model.where,
                                  got=", ".join(mixed), cure="write them unstacked (scanned=False)"))


def _dtypes(model: Model, form: Form) -> dict[str, set[str]]:
    """By tensor: the dtypes of its layers."""
    dtypes: dict[str, set[str]] = {}
    for path, spec in model.tensors.specs.items():
        for place in convert_t5x.places(path, model.config, form):
            dtypes.setdefault(place.name, set()).add(spec.dtype)
    return dtypes


class _NewCheckpoint(Protocol):
    """A step's folder that is being written."""

    def create(self, name: str, shape: tuple[int, ...], dtype: str,
               chunks: tuple[int, ...]) -> zarr_files.NewArray:
        """Lists an array, and makes it."""
        ...

    def finish(self, step: int) -> None:
        """Writes the step, and last the files without which T5X reads nothing."""
        ...


class _Writer:
    """Writes leaves into T5X's tree."""

    def __init__(self, checkpoint: _NewCheckpoint, config: T5Config, form: Form) -> None:
        self._checkpoint, self._config, self._form = checkpoint, config, form
        self._shapes = convert_t5x.tensor_shapes(config, form)
        self._created: dict[str, zarr_files.NewArray] = {}

    def write(self, path: str, values: np.ndarray, writes: in_flight.Writes) -> None:
        """Starts to write a leaf. A large one is written when this returns."""
        if self._form.own_biases:
            values = values.reshape(convert_t5x.split_heads(path, values.shape, self._config))
        for place in convert_t5x.places(path, self._config, self._form):
            self._array(place, values.dtype).write(values, writes, place.layer)
        if values.nbytes > in_flight.BYTES:
            writes.wait()

    def _array(self, place: Place, dtype: np.dtype) -> zarr_files.NewArray:
        name = _origin(place).name
        if name not in self._created:
            axis = None if place.layer is None else convert_t5x.LAYER_AXIS
            shape = self._shapes[place.name]
            chunks = boxes.chunk_shape(shape, dtype.itemsize, CHUNK_BYTES, axis)
            self._created[name] = self._checkpoint.create(name, shape, dtype.name, chunks)
        return self._created[name]


def _write_leaves(checkpoint: _NewCheckpoint, model: Model, form: Form) -> dict[str, Origin]:
    """Writes all leaves, in the order in which the model reads them cheaply."""
    writer, paths = _Writer(checkpoint, model.config, form), list(model.tensors.specs)
    leaves = streaming.read_ahead(model.tensors, paths)
    with in_flight.Writes() as writes:
        for path in paths:
            writer.write(path, next(leaves), writes)
    return {path: _origin(convert_t5x.places(path, model.config, form)[0]) for path in paths}


def _write_beside(folder: epath.Path, model: Model, form: Form) -> None:
    storage.write_text(folder / NETWORK_FILE, convert_t5x.gin_text(model.config, form))
    if model.vocabulary is not None:
        with storage.guard_writes(folder):
            file = Vocabulary.from_bytes(model.vocabulary, model.where).FILE
            (folder / file).write_bytes(model.vocabulary)


class _OrbaxCheckpoint:
    """Orbax's layout: an item ``state`` with all arrays."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self._tree = orbax_files.NewTree(folder / t5x_folders.ITEMS[0])

    def create(self, name: str, shape: tuple[int, ...], dtype: str,
               chunks: tuple[int, ...]) -> zarr_files.NewArray:
        """Makes an array under the keys of the tree of parameters that its name joins."""
        return self._tree.create(name.split("."), shape, dtype, chunks)

    def finish(self, step: int) -> None:
        """Writes the step, then what Orbax writes last."""
        with in_flight.Writes() as writes:
            self.create(STEP, (), "int32", ()).write(np.asarray(step, np.int32), writes)
        self._tree.finish(self._folder)


class _ZarrCheckpoint:
    """The older layout: a folder an array, and a msgpack file with TensorStore's specs of them."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        with storage.guard_writes(folder):
            folder.mkdir(parents=True)
        self._arrays = zarr_files.Folder(folder, ocdbt=False)
        self._tree: dict[str, Any] = {}

    def create(self, name: str, shape: tuple[int, ...], dtype: str,
               chunks: tuple[int, ...]) -> zarr_files.NewArray:
        """Makes an array, and lists it as T5X does: its spec, with a path relative to the checkpoint."""
        *parents, leaf = name.split(".")
        node = self._tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = {"driver": "zarr", "dtype": dtype, "kvstore": {"driver": "file", "path": f"{name}/"},
                      "metadata": {"shape": list(shape), "chunks": list(chunks), "compressor": None}}
        return self._arrays.create(name, shape, dtype, chunks)

    def finish(self, step: int) -> None:
        """Writes the list, and the step in it."""
        self._tree["state"] = {"step": np.asarray(step, np.int32)}
        packed = serialization.msgpack_serialize({"version": _VERSION, "optimizer": self._tree})
        with storage.guard_writes(self._folder):
            (self._folder / t5x_folders.TREE_FILE).write_bytes(packed)


_LAYOUTS = {"orbax": _OrbaxCheckpoint, "zarr": _ZarrCheckpoint}
