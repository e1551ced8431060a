"""This program's own base folder: base.json, weights in Orbax's form, vocabulary.model, the marker.

`write_elm` and Orbax's own saving of a whole tree (`storage.save_tree`) give the same kind of folder; this
one holds one leaf at a time, cut into chunks, so that a slice can be read without the rest.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    return Model("elm", str(folder), config, tensors, proto, {**facts.get("facts", {}), FACTS: own})


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
        InputError: the folder is taken.
        RunError: the disk is full.
    """
    training = model.facts.get(FACTS, {}).get("training") or {"converted_from": model.kind}
    with storage.staged(folder) as target:
        fingerprint = save_leaves(target / WEIGHTS, model.tensors)
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


class _Leaf:
    """A leaf that Orbax writes: its contents are read when their turn comes."""

    def __init__(self, tensors: Tensors, path: str) -> None:
        self.path = path
        self.shape, self.dtype = tensors.specs[path].shape, np.dtype(tensors.specs[path].dtype)
        self._tensors = tensors

    def read(self) -> np.ndarray:
        return self._tensors.read(self.path)


class _LeafByLeaf(ocp.type_handlers.NumpyHandler):
    """Writes leaves one after another, where Orbax's own handler takes all at once.

    Attributes:
        order: paths in the order in which they are read and written.
        fingerprint: grows with every leaf, in another thread while the leaf is written; None if the
            order is not that of a fingerprint.
    """

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.order = {path: number for number, path in enumerate(order)}
        self.fingerprint = trees.Fingerprint() if list(order) == sorted(order) else None

    async def serialize(self, values: Sequence[_Leaf], infos: Sequence[Any],
                        args: Sequence[Any] | None = None) -> Sequence[Any]:
        """Writes all leaves; nothing is left to wait for."""
        args = args or [ocp.SaveArgs()] * len(values)
        in_order = sorted(range(len(values)), key=lambda number: self.order[values[number].path])
        with ThreadPoolExecutor(max_workers=1) as thread:
            for number in in_order:
                await self._write(thread, values[number], infos[number], args[number])
        return []

    async def _write(self, thread: ThreadPoolExecutor, leaf: _Leaf, info: Any, arg: Any) -> None:
        """Writes one leaf. A function of its own, so that it is gone before the next is read."""
        array = leaf.read()
        adding = thread.submit(self._add, leaf.path, [array])
        for writing in await super().serialize([array], [info], [arg]):
            writing.result()
        adding.result()

    def _add(self, path: str, box: list[np.ndarray]) -> None:
        """Empties the box, for the executor keeps its arguments a moment longer than it works."""
        array = box.pop()
        if self.fingerprint is not None:
            streaming.add_to_fingerprint(self.fingerprint, path, array)


def save_leaves(folder: epath.Path, tensors: Tensors) -> str:
    """Writes all leaves with Orbax, one in memory at a time, and returns their fingerprint.

    Leaves are read in the order of `tensors.specs`, which may be cheaper than that of the fingerprint: a
    stack of all layers is then read once. The fingerprint is then taken from what was written.
    """
    handler = _LeafByLeaf(list(tensors.specs))
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler()))
    tree = trees.unflatten({path: _Leaf(tensors, path) for path in tensors.specs})
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    # Without compression, as other formats have it: trained weights shrink little, and slowly.
    orbax = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with storage.guard_writes(folder), ocp.Checkpointer(orbax) as checkpointer:
        checkpointer.save(storage.absolute(folder), args=ocp.args.PyTreeSave(tree, save_args=in_chunks))
    return str(handler.fingerprint or streaming.fingerprint(ElmTensors(folder)))
