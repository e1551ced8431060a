"""Writes T5X checkpoints, in both of T5X's layouts."""

from typing import Any, Protocol

import numpy as np
from etils import epath
from flax import serialization

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.formats import tree_checks
from elm_jax.formats.model import Model, Origin
from elm_jax.formats.t5x import t5x_folders
from elm_jax.formats.t5x.t5x_checkpoints import (
    FACTS,
    LARGEST_STEP,
    NETWORK_FILE,
    STEP,
    origin_of,
)
from elm_jax.formats.tensors import boxes, in_flight, orbax_files, streaming, zarr_files
from elm_jax.models.t5 import t5x_names
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.t5x_names import Form, TensorPlace
from elm_jax.runtime import staging, storage
from elm_jax.vocabularies.vocabulary import Vocabulary

CHUNK_BYTES = 1 << 26
"""Size of written chunks, T5X's own: it suits many ways to split an array over hosts."""
_VERSION = 3
"""Version of the msgpack file; see T5X's `checkpoints.VERSION`."""


def write_t5x(folder: storage.PathLike, model: Model, *, layout: str = "orbax",
              scanned: bool | None = None, step: int | None = None) -> dict[str, Origin]:
    """Writes a model folder with one checkpoint that T5X restores, leaf by leaf.

    The folder gets its final name when it is whole. Beside the checkpoint it holds the network's
    dimensions as gin (``network.gin``) and the vocabulary.

    Args:
        folder: does not exist, or is empty.
        model: dtypes on disk stay as they are.
        layout: ``orbax`` is what T5X writes today; ``zarr``, the older one, is read by T5X of any age.
        scanned: True for scalable T5, layers stacked; False for minimal T5; None for the form of the T5X
            checkpoint that the model was read from, or minimal T5 if it came from another format.
        step: of the checkpoint; None takes the model's own, or 0.

    Returns:
        The place of each leaf in the output.

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
    with staging.staged(folder, late_writes=False) as target:
        checkpoint = _LAYOUTS[layout](target / f"{t5x_folders.PREFIX}{step}")
        origins = _write_leaves(checkpoint, model, form)
        model.check()
        for name, value in model.beside.items():
            storage.write_json(target / name, value)
        _write_beside(target, model, form)
        checkpoint.finish(step)
    return origins


def _form(model: Model, scanned: bool | None) -> Form:
    """The form to write: the requested one, else the one that the model had in T5X."""
    if scanned is not None:
        return t5x_names.SCALABLE if scanned else t5x_names.MINIMAL
    if model.config.adapter is not None:  # T5X's scalable network has none
        return t5x_names.MINIMAL
    facts = model.facts.get(FACTS, {})
    stacked = bool(facts.get("scanned"))
    return Form(stacked, stacked or bool(facts.get("own_biases")))


def _check_writable(model: Model, form: Form, step: int) -> None:
    """Raises InputError for every reason why T5X could not hold the model, before anything is written."""
    config, tensors = model.config, model.tensors
    if config.family != T5Config.family:
        raise InputError(describe("T5X's checkpoints hold T5s", where=model.where,
                                  got=f"a network of family {config.family!r}",
                                  cure="write another form: --to elm or --to hf"))
    if config.sparse is not None:
        raise InputError(describe("T5X's own networks have no sparse layers", where=model.where,
                                  got=f"{config.sparse.num_experts} experts",
                                  cure="write another form: --to elm or --to hf"))
    if not 0 <= step <= LARGEST_STEP:
        raise InputError(describe("A checkpoint's step is wrong", got=step,
                                  expected=f"a whole number from 0 to {LARGEST_STEP}"))
    if config.adapter is not None and form.own_biases:
        raise InputError(describe("T5X's scalable network has no adapters", where=model.where,
                                  got="--scanned for a model with adapters",
                                  cure="write its layers one by one (--no-scanned)"))
    distances = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
    if distances != (t5x_names.BUCKETS, t5x_names.MAX_DISTANCE):
        raise InputError(describe("T5X's networks have other relative positions", where=model.where,
                                  got="{} buckets up to distance {}".format(*distances),
                                  expected=f"{t5x_names.BUCKETS} buckets up to {t5x_names.MAX_DISTANCE}"))
    tree_checks.check_leaves("The tensors do not fit the network", model.where,
                             {path: spec.shape for path, spec in tensors.specs.items()},
                             t5x_names.leaf_shapes(config))
    tree_checks.check_dtypes(model.where, {path: spec.dtype for path, spec in tensors.specs.items()})
    mixed = sorted(name for name, dtypes in _dtypes(model, form).items() if len(dtypes) > 1)
    if mixed:
        raise InputError(describe("Layers of different dtypes cannot be stacked", where=model.where,
                                  got=", ".join(mixed), cure="write them unstacked (scanned=False)"))


def _dtypes(model: Model, form: Form) -> dict[str, set[str]]:
    """The dtypes of the layers of each tensor."""
    dtypes: dict[str, set[str]] = {}
    for path, spec in model.tensors.specs.items():
        for place in t5x_names.places(path, model.config, form):
            dtypes.setdefault(place.name, set()).add(spec.dtype)
    return dtypes


class _NewCheckpoint(Protocol):
    """The folder of a step that is being written."""

    def create(self, name: str, shape: tuple[int, ...], dtype: str,
               chunks: tuple[int, ...]) -> zarr_files.NewArray:
        """Creates an array and lists it."""
        ...

    def finish(self, step: int) -> None:
        """Writes the step, and last the files without which T5X does not read the folder."""
        ...


class _Writer:
    """Writes leaves as tensors of T5X's tree."""

    def __init__(self, checkpoint: _NewCheckpoint, config: T5Config, form: Form) -> None:
        self._checkpoint, self._config, self._form = checkpoint, config, form
        self._shapes = t5x_names.tensor_shapes(config, form)
        self._created: dict[str, zarr_files.NewArray] = {}

    def write(self, path: str, values: np.ndarray, writes: in_flight.Writes) -> None:
        """Starts to write a leaf; returns when a large leaf is written."""
        if self._form.own_biases:
            values = values.reshape(t5x_names.split_heads(path, values.shape, self._config))
        for place in t5x_names.places(path, self._config, self._form):
            self._array(place, values.dtype).write(values, writes, place.layer)
        if values.nbytes > in_flight.BYTES:
            writes.wait()

    def _array(self, place: TensorPlace, dtype: np.dtype) -> zarr_files.NewArray:
        name = origin_of(place).name
        if name not in self._created:
            axis = None if place.layer is None else t5x_names.LAYER_AXIS
            shape = self._shapes[place.name]
            chunks = boxes.chunk_shape(shape, dtype.itemsize, CHUNK_BYTES, axis)
            self._created[name] = self._checkpoint.create(name, shape, dtype.name, chunks)
        return self._created[name]


def _write_leaves(checkpoint: _NewCheckpoint, model: Model, form: Form) -> dict[str, Origin]:
    """Writes all leaves, in the order that is cheapest to read."""
    writer, paths = _Writer(checkpoint, model.config, form), list(model.tensors.specs)
    leaves = streaming.read_ahead(model.tensors, paths)
    with in_flight.Writes() as writes:
        for path in paths:
            writer.write(path, next(leaves), writes)
    return {path: origin_of(t5x_names.places(path, model.config, form)[0]) for path in paths}


def _write_beside(folder: epath.Path, model: Model, form: Form) -> None:
    storage.write_text(folder / NETWORK_FILE, t5x_names.gin_text(model.config, form))
    if model.vocabulary is not None:
        with storage.guard_writes(folder):
            file = Vocabulary.from_bytes(model.vocabulary, model.where).FILE
            (folder / file).write_bytes(model.vocabulary)


class _OrbaxCheckpoint:
    """A checkpoint in Orbax's layout: an item ``state`` with all arrays."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self._tree = orbax_files.NewTree(folder / t5x_folders.ITEMS[0])

    def create(self, name: str, shape: tuple[int, ...], dtype: str,
               chunks: tuple[int, ...]) -> zarr_files.NewArray:
        """Creates an array under the tree keys that its name joins."""
        return self._tree.create(name.split("."), shape, dtype, chunks)

    def finish(self, step: int) -> None:
        """Writes the step, then Orbax's last files."""
        with in_flight.Writes() as writes:
            self.create(STEP, (), "int32", ()).write(np.asarray(step, np.int32), writes)
        self._tree.finish(self._folder)


class _ZarrCheckpoint:
    """A checkpoint in the older layout: one folder for each array, and a msgpack file with their specs."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        with storage.guard_writes(folder):
            folder.mkdir(parents=True)
        self._arrays = zarr_files.Folder(folder, ocdbt=False)
        self._tree: dict[str, Any] = {}

    def create(self, name: str, shape: tuple[int, ...], dtype: str,
               chunks: tuple[int, ...]) -> zarr_files.NewArray:
        """Creates an array and lists its spec as T5X does, with a path relative to the checkpoint."""
        *parents, leaf = name.split(".")
        node = self._tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = {"driver": "zarr", "dtype": dtype, "kvstore": {"driver": "file", "path": f"{name}/"},
                      "metadata": {"shape": list(shape), "chunks": list(chunks), "compressor": None}}
        return self._arrays.create(name, shape, dtype, chunks)

    def finish(self, step: int) -> None:
        """Writes the msgpack file, which holds the list and the step."""
        self._tree["state"] = {"step": np.asarray(step, np.int32)}
        packed = serialization.msgpack_serialize({"version": _VERSION, "optimizer": self._tree})
        with storage.guard_writes(self._folder):
            (self._folder / t5x_folders.TREE_FILE).write_bytes(packed)


_LAYOUTS = {"orbax": _OrbaxCheckpoint, "zarr": _ZarrCheckpoint}
