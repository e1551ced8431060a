"""Models in GGUF files: llama.cpp's form of decoders, quantised or not, with their tokenizer. Read only."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.gguf import gguf_header
from elm_jax.formats.gguf.gguf_header import Header
from elm_jax.formats.gguf.gguf_tensors import GgufTensor, RowsOf
from elm_jax.formats.hf import folder_files
from elm_jax.formats.model import Model, Origin
from elm_jax.formats.tensors import streaming
from elm_jax.models import families
from elm_jax.models.decoder import gguf_names
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.gguf_names import GgufName
from elm_jax.runtime import storage, trees
from elm_jax.vocabularies import gguf_vocabulary, hf_tokenizer

SUFFIX = ".gguf"
FACTS = "gguf"
"""Key of `Model.facts`: what the file says of itself (name, licence, ...)."""
_KEPT = ("name", "basename", "finetune", "organization", "license", "size_label")
_TYPE, _PARTS = "general.type", "split.count"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "general.architecture": str, _TYPE: str, _PARTS: int, "tokenizer.chat_template": str,
    "tokenizer.ggml.(model|pre)": str, "tokenizer.ggml.(tokens|merges)": list,
    "tokenizer.ggml.(token_type|scores)": np.ndarray, r"tokenizer.ggml.\w+_token_id": int,
    r"tokenizer.ggml.add_\w+": bool, r"\w+.rope.scaling.type": str,
    r"\w+.rope.(scaling.factor|scale_linear)": (int, float),
    r"\w+.(vocab_size|expert_count|expert_used_count|attention.value_length)": int,
    r"\w+.rope.(dimension_count|scaling.original_context_length)": int}
"""Types of values that are used as they are, by a pattern of their keys; others are checked where read."""


def is_gguf(path: epath.Path) -> bool:
    """Whether a path is a GGUF file, or a folder that holds one."""
    if path.suffix == SUFFIX:
        return path.is_file()
    return path.is_dir() and any(each.suffix == SUFFIX for each in path.iterdir())


def open_gguf(path: storage.PathLike) -> Model:
    """Opens a GGUF file; checks header, tensors and tokenizer without reading the tensors.

    Tensors of the types F32, F16 and BF16 keep their dtype; quantised ones are read as float32.

    Args:
        path: the file, or a folder that holds it alone.

    Raises:
        InputError: there is no such file; it is cut short or damaged; another architecture, another
            quantisation or a part of a model; tensors that are missing, unknown or of other shapes (all are
            named); no tokenizer, or one that does not fit.
    """
    path = _file(storage.as_path(path))
    header = gguf_header.read_header(path)
    _check_types(header, path)
    _check_whole(header, path)
    found = gguf_vocabulary.read_tokenizer(header.metadata, path)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    special = gguf_names.SpecialTokens(found.pad_id, found.eos_id, found.extra_eos_ids, found.bos_id)
    config = gguf_names.config_from_gguf(header.metadata, shapes, special, _factors(header, path), path)
    stored, config, notes = _without_copy(header, config, path)
    tensors = _leaves(stored, config, header.metadata[gguf_names.ARCHITECTURE], path)
    tree_checks.check_vocabulary(found.contents, config, path)
    facts = {folder_files.FACTS: {"tokenizer": {hf_tokenizer.CONFIG_FILE: dict(found.config)}},
             FACTS: {name: header.metadata[f"general.{name}"] for name in _KEPT
                     if isinstance(header.metadata.get(f"general.{name}"), str)}}
    return Model("gguf", str(path), config, tensors, found.contents, facts, (*notes, _types(header)))


def _file(path: epath.Path) -> epath.Path:
    """The file that a path names; of a folder its only one."""
    if not path.is_dir():
        return storage.require_file(path)
    files = sorted(each for each in path.iterdir() if each.suffix == SUFFIX)
    if len(files) != 1:
        raise InputError(describe("The folder does not hold one GGUF file", where=path,
                                  got=", ".join(each.name for each in files) or "none",
                                  cure="name the file" if files else None))
    return files[0]


def _check_types(header: Header, path: epath.Path) -> None:
    """Raises InputError for values of other types than those that their keys have; all are named."""
    wanted = {key: kinds for key in header.metadata for pattern, kinds in _TYPES.items()
              if re.fullmatch(pattern, key)}
    wrong = [f"{key}: {type(header.metadata[key]).__name__}" for key, kinds in wanted.items()
             if not isinstance(header.metadata[key], kinds)
             or (isinstance(header.metadata[key], bool) and kinds is not bool)]
    if wrong:
        raise InputError(describe("Values in the GGUF file have other types than their keys", where=path,
                                  got=", ".join(wrong)[:300], cure="fetch the file again"))


def _check_whole(header: Header, path: epath.Path) -> None:
    """Raises InputError for a part of a model, or for what is no language model."""
    kind, parts = header.metadata.get(_TYPE, "model"), header.metadata.get(_PARTS, 1)
    if kind != "model":
        raise InputError(describe("The GGUF file holds no whole model", where=path, got=f"{_TYPE} {kind!r}",
                                  expected="model"))
    if parts > 1:
        raise InputError(describe("The GGUF file is a part of a model", where=path, expected="one file",
                                  got=f"one of {parts} files", cure="join them: llama-gguf-split --merge"))


def _types(header: Header) -> str:
    """A note on the types of the tensors, for the report."""
    counts: dict[str, int] = {}
    for entry in header.tensors.values():
        counts[entry.quantisation] = counts.get(entry.quantisation, 0) + 1
    return "Types of the tensors: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _factors(header: Header, path: epath.Path) -> np.ndarray | None:
    """Contents of the factors of rotary frequencies."""
    entry = header.tensors.get(gguf_names.ROPE_FACTORS)
    return None if entry is None else streaming.read_part(GgufTensor(path, entry)).astype(np.float64)


def _without_copy(header: Header, config: DecoderConfig, path: epath.Path
                  ) -> tuple[dict[str, GgufTensor], DecoderConfig, tuple[str, ...]]:
    """The tensors as stored, less the rotary factors and a head that is a copy of the embedding."""
    stored = {name: GgufTensor(path, entry) for name, entry in header.tensors.items()
              if name != gguf_names.ROPE_FACTORS}
    head, embedding = stored.get(gguf_names.HEAD), stored[gguf_names.EMBEDDING]
    if head is None or not _are_one(head, embedding):
        return stored, config, ()
    del stored[gguf_names.HEAD]
    note = f"Left out, as a copy of {gguf_names.EMBEDDING}: {gguf_names.HEAD}"
    return stored, gguf_names.with_tied_head(config), (note,)


def _are_one(left: GgufTensor, right: GgufTensor) -> bool:
    """Whether two tensors have the same type and the same bytes in the file."""
    if (left.entry.quantisation, left.shape) != (right.entry.quantisation, right.shape):
        return False
    return all(left.raw(start) == right.raw(start)
               for start in range(0, left.entry.nbytes, streaming.PIECE_BYTES))


def _leaves(stored: Mapping[str, GgufTensor], config: DecoderConfig, architecture: str, path: Any
            ) -> streaming.StoredTensors:
    """The network's leaves as stored tensors, in the alphabet's order, checked against the config."""
    abstract = trees.flatten(families.network_of(config).abstract_params())
    shapes = {leaf: tuple(abstract[leaf].shape) for leaf in sorted(abstract)}
    names = {leaf: gguf_names.gguf_name(leaf, architecture) for leaf in shapes}
    wanted = {}
    for leaf, name in names.items():
        rows, *rest = shapes[leaf][::-1] if name.transposed else shapes[leaf]
        joined = gguf_names.NUM_PARTS if name.part is not None else 1
        wanted[name.name] = (rows * joined, *rest)
    tree_checks.check_leaves("The file's tensors do not fit its metadata", path,
                             {name: tensor.shape for name, tensor in stored.items()}, wanted,
                             "fetch the file again, or convert the model again")
    return streaming.StoredTensors(
        {leaf: _ordered(stored[name.name], name, config, shapes[leaf][-1]) for leaf, name in names.items()},
        {leaf: Origin(name.name, name.transposed) for leaf, name in names.items()})


def _ordered(tensor: GgufTensor, name: GgufName, config: DecoderConfig, size: int) -> streaming.Stored:
    """A leaf's rows of its tensor, in the order of this program."""
    order = gguf_names.row_order(name, config, size)
    return tensor if order is None else RowsOf(tensor, order)
