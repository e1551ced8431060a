"""Bases: a full parameter tree with its network config and vocabulary, read from a folder of any kind."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import BatchForm, form_of
from elm_jax.data.prompts.chat_templates import ChatTemplate
from elm_jax.formats import detect, tree_checks
from elm_jax.formats.elm import base_json, elm_folders
from elm_jax.formats.hf import folder_files
from elm_jax.formats.model import Index, Model
from elm_jax.formats.tensors import leaf_values, streaming
from elm_jax.models import families
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import hosts, sharding, storage, tree_files, trees
from elm_jax.runtime.sharding import Rules
from elm_jax.types import FlatParams, Params
from elm_jax.vocabularies import hf_tokenizer
from elm_jax.vocabularies.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base model: parameters, network config and vocabulary, onto which overlays are put.

    Attributes:
        name: what its user calls it: its folder's name, that of a T5X run above ``checkpoint_<step>``,
            or the hub's.
        params: nested dictionary of float32 arrays, without adapters; numpy's, or jax's on a mesh.
        config: the network's config, without adapters.
        fingerprint: hash over leaf names, shapes, dtypes and contents.
        vocabulary: its vocabulary, of whichever kind; None if the folder carries none.
        vocabulary_path: a file that holds it, for SeqIO.
        path: the folder it was read from; ``hf://`` and its name if it came from the hub.
        chat_template: how it wants questions framed, if it came with such a template.
    """

    name: str
    params: Params
    config: NetworkConfig
    fingerprint: str
    vocabulary: Vocabulary | None = None
    vocabulary_path: str | None = None
    path: str | None = None
    chat_template: ChatTemplate | None = None

    def __repr__(self) -> str:
        """Says what it is, without its parameters."""
        return (f"Base({self.name!r}, {self.config.family}, {trees.count(self.params):,} parameters, "
                f"fingerprint={self.fingerprint!r}, path={self.path!r})")

    def reference(self) -> dict[str, str]:
        """The entry that an expert's card keeps of its base: name, fingerprint, and the path as a hint."""
        where = {} if self.path is None else {"path": self.path}
        return {"name": self.name, "fingerprint": self.fingerprint, **where}


def save_base(
    folder: storage.PathLike, params: Params, config: NetworkConfig,
    vocabulary_path: storage.PathLike | None, training: dict[str, Any],
) -> None:
    """Writes ``base.json``, ``weights/`` and the vocabulary; the commit marker last.

    Args:
        folder: emptied first.
        params: the full tree, without adapters.
        config: network config without an adapter.
        vocabulary_path: file of a vocabulary to copy, of any kind (`Vocabulary.load`), or None.
        training: what it was trained on; kept in ``base.json``.

    With several processes, every process calls this; parameters that are split over them are written shard by
    shard.
    """
    folder = storage.begin(folder)
    hosts.barrier()
    tree_files.save_tree(folder / elm_folders.WEIGHTS, params)
    vocabulary = None if vocabulary_path is None else storage.read_bytes(vocabulary_path)
    base_json.write(folder, config, trees.fingerprint(params), vocabulary, training, {})
    storage.commit(folder)
    hosts.barrier()


def load_base(folder: storage.PathLike, *, mesh: Mesh | None = None,
              rules: Rules = sharding.DEFAULT_RULES) -> Base:
    """Reads a base from a folder of any supported kind, or from the hub.

    Args:
        folder: of this program's own kind, of Hugging Face's or of T5X's; or a hub name, as
            ``google/t5-v1_1-small``.
        mesh: puts the parameters onto it as they are read: each process reads only the shards of its own
            devices (of chunked files, the chunks that contain them). With several processes no one reads all
            of it, so the recorded fingerprint is not checked; if none is recorded, the first process reads
            all leaves once, one at a time, and sends the fingerprint to the others.
        rules: sharding rules, from logical axes of the parameters to axes of the mesh.

    Returns:
        The base in float32, whatever the dtype on disk: numpy arrays, or jax arrays on the mesh.

    Raises:
        InputError: the folder is not whole, or holds an expert's adapters; leaves do not fit the config (all
            are named); the contents are not those that were written, or not finite; the vocabulary does not
            fit the embedding.
    """
    return base_of(detect.open_model(folder), mesh, rules)


def load_vocabulary(folder: storage.PathLike) -> tuple[Vocabulary | None, str | None]:
    """Reads a base's vocabulary, and the path of a file that holds it, without the parameters."""
    return _vocabulary(detect.open_model(folder))


def load_reading(folder: storage.PathLike) -> tuple[Vocabulary | None, BatchForm]:
    """Reads how a base reads texts: its vocabulary and the form of its batches, without the parameters."""
    model = detect.open_model(folder)
    return _vocabulary(model)[0], form_of(families.network_of(model.config))


def load_reader(folder: storage.PathLike) -> Base:
    """Reads all of a base but its parameters, for what only reads and renders texts as it does."""
    model = detect.open_model(folder)
    vocabulary, path = _vocabulary(model)
    return Base(model.name, {}, model.config, "", vocabulary, path, model.address, _chat_template(model))


def base_of(model: Model, mesh: Mesh | None = None, rules: Rules = sharding.DEFAULT_RULES) -> Base:
    """Reads the base of an opened model (see `load_base`)."""
    tree_checks.check_base(model.config, model.where)
    recorded = model.facts.get(elm_folders.FACTS, {}).get("fingerprint")
    if mesh is None:
        params = {path: leaf_values.read_float32(model.tensors.read(path), path, model.where)
                  for path in model.tensors.specs}
        model.check()
        fingerprint = recorded or trees.fingerprint(params)
    else:
        params = read_onto(mesh, model, rules)
        if jax.process_count() == 1:  # which has read all of it
            model.check()
        fingerprint = recorded or _told_fingerprint(model)
    vocabulary, vocabulary_path = _vocabulary(model)
    return Base(name=model.name, params=trees.unflatten(params),
                config=model.config, fingerprint=fingerprint, vocabulary=vocabulary,
                vocabulary_path=vocabulary_path, path=model.address, chat_template=_chat_template(model))


def _vocabulary(model: Model) -> tuple[Vocabulary | None, str | None]:
    """The vocabulary and its file: the folder's own, or a temporary one if it is stored in another form."""
    if model.vocabulary is None:
        return None, None
    vocabulary = Vocabulary.from_bytes(model.vocabulary, model.where)
    for name in (vocabulary.FILE, hf_tokenizer.SENTENCEPIECE_FILE):
        path = storage.as_path(model.where) / name
        if path.exists() and path.read_bytes() == model.vocabulary:
            return vocabulary, str(path)
    return vocabulary, vocabulary.file()


def _chat_template(model: Model) -> ChatTemplate | None:
    """The template that a tokenizer of Hugging Face's form brought, wherever the model lies now."""
    tokenizer = model.facts.get(folder_files.FACTS, {}).get("tokenizer", {})
    return ChatTemplate.of_tokenizer(tokenizer.get(hf_tokenizer.CONFIG_FILE, {}),
                                     f"{hf_tokenizer.CONFIG_FILE} of {model.where}, chat_template")


def read_onto(mesh: Mesh, model: Model, rules: Rules = sharding.DEFAULT_RULES) -> FlatParams:
    """Reads all leaves onto a mesh in float32; each process reads the shards of its own devices."""
    network = families.network_of(model.config)
    shardings = trees.flatten(
        sharding.tree_shardings(network.logical_axes(), network.abstract_params(), mesh, rules))
    return {path: _leaf_onto(model, path, shardings[path]) for path in sorted(model.tensors.specs)}


def _leaf_onto(model: Model, path: str, where: jax.sharding.Sharding) -> jax.Array:
    shape = model.tensors.specs[path].shape

    def read(index: Index) -> np.ndarray:
        return leaf_values.read_float32(model.tensors.read(path, index), path, model.where)

    held = where.addressable_devices_indices_map(shape).values()
    spans = _around([[range(size)[part] for part, size in zip(index, shape, strict=True)] for index in held])
    if spans is not None:  # adjacent parts are read together: a chunk that several of them share only once
        own = read(tuple(slice(span.start, span.stop) for span in spans))
        return jax.make_array_from_callback(shape, where, lambda index: own[_inside(index, spans)])
    parts: dict[str, np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        if str(index) not in parts:  # devices that hold the same part share one read
            parts[str(index)] = read(index)
        return parts[str(index)]

    return jax.make_array_from_callback(shape, where, part)


def _around(parts: Sequence[Sequence[range]]) -> list[range] | None:
    """The bounding box of parts of a leaf, if the parts fill it; else None."""
    box = [range(min(span.start for span in spans), max(span.stop for span in spans))
           for spans in zip(*parts, strict=True)]
    filled = sum(math.prod(map(len, part)) for part in set(map(tuple, parts)))
    return box if filled == math.prod(map(len, box)) else None


def _inside(index: Index, spans: Sequence[range]) -> Index:
    """A part of a leaf, relative to the start of a box that contains it."""
    return tuple(slice((part.start or 0) - span.start, (span.stop if part.stop is None else part.stop)
                       - span.start) for part, span in zip(index, spans, strict=True))


def _told_fingerprint(model: Model) -> str:
    """The fingerprint, computed by the first process and sent to the others."""
    if jax.process_count() == 1:
        return streaming.fingerprint(model.tensors)
    digest = np.zeros(32, np.uint8)
    if jax.process_index() == 0:
        text = streaming.fingerprint(model.tensors).removeprefix("sha256:")
        digest = np.frombuffer(bytes.fromhex(text), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(digest))
    return f"sha256:{told.astype(np.uint8).tobytes().hex()}"
