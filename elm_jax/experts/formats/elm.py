"""This program's own base folder: base.json, weights in Orbax's form, vocabulary.model, the marker.

`write_elm` and Orbax's own saving of a whole tree (`storage.save_tree`) give the same kind of folder; this
one holds few leaves at a time and cuts them into chunks, so that a slice can be read without the rest.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from elm_jax import storage, trees
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import InputError, describe
from elm_jax.experts.card import utc_now
from elm_jax.experts.formats import checks, streaming
from elm_jax.experts.formats.hashed import HashedTensors
from elm_jax.experts.formats.model import Index, Model, Origin, Tensors, TensorSpec
from elm_jax.models.t5 import T5Network
from elm_jax.models.t5_config import T5Config

SCHEMA_VERSION = 1
FACTS_FILE = "base.json"
VOCABULARY_FILE = "vocabulary.model"
WEIGHTS = "weights"
FACTS = "elm"
"""Key of `Model.facts`: ``{'fingerprint': ..., 'training': ...}`` of the folder that was read."""
CHUNK_BYTES = 1 << 25
"""Of a leaf on disk. What a reader of a slice reads too much is less than a chunk."""
GROUP_BYTES = 1 << 26
"""Of leaves that are in memory together while they are written, unless one alone is larger."""


def is_elm(folder: epath.Path) -> bool:
    """Whether a folder is, or was going to be, a base folder of this program."""
    return any((folder / name).exists() for name in (storage.MARKER, FACTS_FILE, WEIGHTS))


class ElmTensors:
    """`Tensors` of an Orbax folder, read leaf by leaf and slice by slice through TensorStore."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        metadata = trees.flatten(storage.tree_metadata(folder))
        self.specs = {path: TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
                      for path, leaf in metadata.items()}
        self.origins = {path: Origin(path) for path in metadata}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """A whole leaf, or the chunks of it that a part lies in."""
        folder = storage.absolute(self._folder)
        base = str(folder) if not storage.is_local(folder) else f"file://{folder}"
        spec = {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": f"{base}/",
                                              "path": f"{path.replace('/', '.')}/"}}
        try:
            stored = ts.open(spec, open=True).result()
            return (stored if index is None else stored[index]).read().result()
        except (ValueError, OSError) as error:
            raise InputError(describe(
                "The weights cannot be read", where=f"{self._folder}, leaf {path}", got=str(error)[:300],
                cure="fetch or write the folder again")) from error


def open_elm(folder: storage.PathLike) -> Model:
    """Opens a base folder; leaves are checked against its config, and not yet read.

    The model's `check` compares what was read with the fingerprint that the folder records.

    Raises:
        InputError: the folder is not whole; leaves do not fit the config (all are named); the
            vocabulary is larger than the embedding.
    """
    folder = storage.require_committed(folder, "base model")
    facts = storage.read_json(folder / FACTS_FILE, kind="base's description", schema_version=SCHEMA_VERSION)
    config = T5Config.from_dict(facts["network"])
    tensors = ElmTensors(folder / WEIGHTS)
    check_fits(tensors, config, folder)
    proto = (folder / facts["vocabulary"]).read_bytes() if facts["vocabulary"] else None
    if proto is not None:
        size = Vocabulary(proto, where=str(folder / facts["vocabulary"])).size
        if size > config.vocab_size:
            raise InputError(describe("The vocabulary is larger than the embedding", where=folder, got=size,
                                      expected=f"at most {config.vocab_size}"))
    own = {"fingerprint": facts["fingerprint"], "training": facts["training"]}
    hashed = HashedTensors(tensors, facts["fingerprint"], folder,
                           "The base's weights are not those that were written",
                           "fetch or train the base again")
    return Model("elm", str(folder), config, hashed, proto, {**facts.get("facts", {}), FACTS: own},
                 check=hashed.check)


def check_fits(tensors: Tensors, config: T5Config, where: Any) -> None:
    """Raises one InputError that names all leaves that do not fit the network, and all of a wrong type."""
    wanted = trees.flatten(T5Network(config).abstract_params())
    checks.check_leaves("The base does not fit its network config", where,
                        {path: spec.shape for path, spec in tensors.specs.items()},
                        {path: leaf.shape for path, leaf in wanted.items()},
                        "use the config that the base was made with")
    checks.check_dtypes(where, {path: spec.dtype for path, spec in tensors.specs.items()})


def write_elm(folder: storage.PathLike, model: Model) -> dict[str, Origin]:
    """Writes a base folder as a stream; nothing stands under its name before it is whole.

    Args:
        folder: does not exist, or is empty.
        model: dtypes on disk stay as they are.

    Returns:
        Where each leaf lies now.

    Raises:
        InputError: the folder is taken; the model is not the one that its folder records.
        RunError: the disk is full.
    """
    training = model.facts.get(FACTS, {}).get("training") or {"converted_from": model.kind}
    with storage.staged(folder) as target:
        fingerprint = save_leaves(target / WEIGHTS, model.tensors)
        model.check()
        write_facts(target, model.config, fingerprint, model.vocabulary, training,
                    {key: value for key, value in model.facts.items() if key != FACTS})
        storage.commit(target)
    return {path: Origin(path) for path in model.tensors.specs}


def write_facts(folder: epath.Path, config: T5Config, fingerprint: str, vocabulary: bytes | None,
                training: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes ``base.json`` and the vocabulary."""
    if vocabulary is not None:
        with storage.guard_writes(folder):
            (folder / VOCABULARY_FILE).write_bytes(vocabulary)
    storage.write_json(folder / FACTS_FILE, {
        "schema_version": SCHEMA_VERSION,
        "network": config.to_dict(),
        "fingerprint": fingerprint,
        "vocabulary": None if vocabulary is None else VOCABULARY_FILE,
        "training": dict(training),
        **({"facts": dict(facts)} if facts else {}),
        "created": utc_now(),
    })


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf that Orbax writes: its contents are read when their turn comes."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int


class _FewLeavesAtATime(ocp.type_handlers.NumpyHandler):
    """Writes a few leaves after another, where Orbax's own handler takes all at once.

    Attributes:
        tensors: of all leaves, which are read and written in the order of its `specs`.
        fingerprint: grows with every leaf, in another thread while leaves are written; None if the
            order is not that of a fingerprint.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.tensors = tensors
        in_order = list(tensors.specs) == sorted(tensors.specs)
        self.fingerprint = trees.Fingerprint() if in_order else None

    async def serialize(self, values: Sequence[_Leaf], infos: Sequence[Any],
                        args: Sequence[Any] | None = None) -> Sequence[Any]:
        """Writes all leaves; nothing is left to wait for."""
        args = args or [ocp.SaveArgs()] * len(values)
        by_path = {leaf.path: (leaf, info, arg) for leaf, info, arg in zip(values, infos, args, strict=True)}
        arrays = streaming.read_ahead(self.tensors, self.tensors.specs)
        with ThreadPoolExecutor(max_workers=1) as thread:
            for group in in_groups([by_path[path] for path in self.tensors.specs], lambda it: it[0].nbytes):
                await self._write(thread, group, arrays)
        return []

    async def _write(self, thread: ThreadPoolExecutor, group: Sequence[tuple[_Leaf, Any, Any]],
                     read: Iterator[np.ndarray]) -> None:
        """Writes leaves together. A function of its own: they are gone before the next are read."""
        leaves, infos, args = zip(*group, strict=True)
        arrays = [next(read) for _ in leaves]
        adding = thread.submit(self._add, [leaf.path for leaf in leaves], arrays[:])
        # One call a leaf: a call for many raises the first failure and leaves the other writes behind,
        # which then make files in a folder that was cleaned up.
        writings = []
        for array, info, arg in zip(arrays, infos, args, strict=True):
            writings += await super().serialize([array], [info], [arg])
        with ExitStack() as waits_for_all:
            for wait in (adding.result, *(writing.result for writing in writings)):
                waits_for_all.callback(wait)

    def _add(self, paths: Sequence[str], arrays: list[np.ndarray]) -> None:
        """Empties the list, for the executor keeps its arguments a moment longer than it works."""
        for path in paths:
            array = arrays.pop(0)
            if self.fingerprint is not None:
                streaming.add_to_fingerprint(self.fingerprint, path, array)


def in_groups(leaves: Sequence[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Neighbours that are written together: at most `GROUP_BYTES`, or one larger leaf alone.

    Every writing ends with the disk's own confirmation, and a T5 has hundreds of leaves that are small.
    """
    group: list[Any] = []
    for leaf in leaves:
        if group and sum(map(size, group)) + size(leaf) > GROUP_BYTES:
            yield group
            group = []
        group.append(leaf)
    if group:
        yield group


def save_leaves(folder: epath.Path, tensors: Tensors) -> str:
    """Writes all leaves with Orbax, few in memory at a time, and returns their fingerprint.

    Leaves are read in the order of `tensors.specs`, which may be cheaper than that of the fingerprint: a
    stack of all layers is then read once. The fingerprint is then taken from what was written.
    """
    handler = _FewLeavesAtATime(tensors)
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler()))
    tree = trees.unflatten({path: _Leaf(path, spec.shape, np.dtype(spec.dtype), spec.nbytes)
                            for path, spec in tensors.specs.items()})
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    # Without compression, as other formats have it: trained weights shrink little, and slowly.
    orbax = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with storage.guard_writes(folder), ocp.Checkpointer(orbax) as checkpointer:
        checkpointer.save(storage.absolute(folder), args=ocp.args.PyTreeSave(tree, save_args=in_chunks))
    return str(handler.fingerprint or streaming.fingerprint(ElmTensors(folder)))
