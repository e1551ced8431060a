"""This program's base folders: base.json, weights in Orbax's format, the vocabulary, the commit marker.

`write_elm` gives the same kind of folder as Orbax's own saving of a whole tree (`tree_files.save_tree`), but
holds only one large leaf in memory at a time.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.elm import base_json
from elm_jax.formats.model import Index, Model, Origin, Tensors, TensorSpec
from elm_jax.formats.tensors import boxes, in_flight, orbax_files, streaming, zarr_files
from elm_jax.formats.tensors.hashed import HashedTensors
from elm_jax.models import families
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import staging, storage, tree_files, trees

WEIGHTS = "weights"
FACTS = "elm"
"""Key of `Model.facts`: ``{'fingerprint': ..., 'training': ...}`` of the folder that was read."""
CHUNK_BYTES = 1 << 25
"""Size of a leaf's chunks on disk: a reader of a slice reads less than a chunk too much."""


def is_elm(folder: epath.Path) -> bool:
    """Whether a folder is a base folder of this program, a half-written one included.

    A folder ``weights`` alone does not count: other programs write one too. It must hold Orbax's arrays.
    """
    marks = (storage.MARKER, base_json.FILE, f"{WEIGHTS}/{orbax_files.METADATA_FILE}",
             f"{WEIGHTS}/{zarr_files.MANIFEST}")
    return any((folder / mark).exists() for mark in marks)


class ElmTensors:
    """`Tensors` of an Orbax folder, read leaf by leaf and slice by slice with TensorStore."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        metadata = trees.flatten(tree_files.tree_metadata(folder))
        with storage.guard_reads(folder):
            self.specs = {path: TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
                          for path, leaf in metadata.items()}
        self.origins = {path: Origin(path) for path in metadata}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a whole leaf, or the chunks that contain a part of it."""
        folder = storage.absolute(self._folder)
        base = str(folder) if not storage.is_local(folder) else f"file://{folder}"
        spec = {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": f"{base}/",
                                              "path": f"{path.replace('/', '.')}/"}}
        try:
            return in_flight.read(ts.open(spec, open=True).result(), index)
        except in_flight.FAULTS as error:
            raise InputError(describe(
                "The weights cannot be read", where=f"{self._folder}, leaf {path}", got=str(error)[:300],
                cure="fetch or write the folder again")) from error


def open_elm(folder: storage.PathLike) -> Model:
    """Opens a base folder; checks its leaves against its config without reading them.

    The model's `check` compares what was read with the fingerprint that the folder records.

    Raises:
        InputError: the folder is not whole; leaves do not fit the config (all are named); the
            vocabulary is larger than the embedding.
    """
    folder = storage.require_committed(folder, "base model")
    facts = base_json.read(folder)
    config = families.config_of(facts["network"], folder / base_json.FILE)
    tensors = ElmTensors(folder / WEIGHTS)
    check_fits(tensors, config, folder)
    vocabulary = base_json.read_vocabulary(folder, facts["vocabulary"], config, facts.get("facts", {}))
    own = {"fingerprint": facts["fingerprint"], "training": facts["training"]}
    hashed = HashedTensors(tensors, facts["fingerprint"], f"{folder}, fingerprint in {base_json.FILE}",
                           "The base's weights are not those that were written",
                           "fetch or train the base again")
    return Model("elm", str(folder), config, hashed, vocabulary, {**facts.get("facts", {}), FACTS: own},
                 check=hashed.check)


def check_fits(tensors: Tensors, config: NetworkConfig, where: Any) -> None:
    """Raises one InputError that names all leaves of a wrong name, shape or type."""
    wanted = trees.flatten(families.network_of(config).abstract_params())
    tree_checks.check_leaves("The base does not fit its network config", where,
                             {path: spec.shape for path, spec in tensors.specs.items()},
                             {path: leaf.shape for path, leaf in wanted.items()},
                             "use the config that the base was made with")
    tree_checks.check_dtypes(where, {path: spec.dtype for path, spec in tensors.specs.items()})


def write_elm(folder: storage.PathLike, model: Model) -> dict[str, Origin]:
    """Writes a base folder leaf by leaf; it gets its final name when it is whole.

    Args:
        folder: does not exist, or is empty.
        model: dtypes on disk stay as they are.

    Returns:
        The place of each leaf in the output.

    Raises:
        InputError: the folder is taken; the model is not the one that its folder records.
        RunError: the disk is full.
    """
    training = model.facts.get(FACTS, {}).get("training") or {"converted_from": model.kind}
    with staging.staged(folder, late_writes=False) as target:
        fingerprint = save_leaves(target / WEIGHTS, model.tensors)
        model.check()
        base_json.write(target, model.config, fingerprint, model.vocabulary, training,
                        {key: value for key, value in model.facts.items() if key != FACTS})
        for name, value in model.beside.items():
            storage.write_json(target / name, value)
        storage.commit(target)
    return {path: Origin(path) for path in model.tensors.specs}


def save_leaves(folder: epath.Path, tensors: Tensors) -> str:
    """Writes all leaves in Orbax's format; returns their fingerprint.

    Memory holds one leaf, the leaves that are read ahead, and pending writes. Leaves are read in the
    order of `tensors.specs`, which may be cheaper than that of the fingerprint: a stack of all layers is
    then read once. The fingerprint is then computed from the files.
    """
    tree = orbax_files.NewTree(storage.absolute(folder))
    in_order = list(tensors.specs) == sorted(tensors.specs)
    fingerprint = trees.Fingerprint() if in_order else None
    leaves = streaming.read_ahead(tensors, tensors.specs)
    with ThreadPoolExecutor(max_workers=1) as thread, in_flight.Writes() as writes:
        for path in tensors.specs:
            _save(tree, path, next(leaves), writes, thread, fingerprint)
    tree.finish()
    return str(fingerprint or streaming.fingerprint(ElmTensors(folder)))


def _save(tree: orbax_files.NewTree, path: str, values: np.ndarray, writes: in_flight.Writes,
          thread: ThreadPoolExecutor, fingerprint: trees.Fingerprint | None) -> None:
    """Starts to write a leaf and hashes it meanwhile; a large leaf is freed before the next is read."""
    chunks = boxes.chunk_shape(values.shape, values.dtype.itemsize, CHUNK_BYTES)
    array = tree.create(path.split("/"), values.shape, values.dtype.name, chunks)
    hashing = thread.submit(_hash, fingerprint, path, [values])
    array.write(values, writes)
    if values.nbytes > in_flight.BYTES:
        writes.wait()
    hashing.result()


def _hash(fingerprint: trees.Fingerprint | None, path: str, leaf: list[np.ndarray]) -> None:
    """Hashes the values, and empties the list: the executor would keep them in memory longer."""
    values = leaf.pop()
    if fingerprint is not None:
        streaming.add_to_fingerprint(fingerprint, path, values)
