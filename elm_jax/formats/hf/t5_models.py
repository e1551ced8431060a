"""Hugging Face folders of T5 models: config.json, weights in one file or in shards, the vocabulary."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.hf import hf_tensors
from elm_jax.formats.hf.config_json import CONFIG_FILE, DEFAULT_SHARD_BYTES, main_dtype
from elm_jax.formats.hf.folder_files import (
    FACTS,
    GENERATION_FILE,
    generation_notes,
    open_weights,
    read_config,
    read_json,
    require_hf,
    tokenizer_files,
    write_rest,
)
from elm_jax.formats.model import Model, Origin
from elm_jax.formats.tensors import safetensors_files, streaming
from elm_jax.models.network import HfParameter
from elm_jax.models.t5 import hf_names
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import staging, storage, trees
from elm_jax.vocabularies import hf_tokenizer

MODEL_TYPES = hf_names.MODEL_TYPES


def open_hf(folder: storage.PathLike) -> Model:
    """Opens a Hugging Face T5 folder; checks the tensors against the config without reading them.

    Raises:
        InputError: there is no such folder; its config is not a T5's; a file is truncated, damaged,
            missing or holds code; names or shapes do not fit the config (all are listed); a copy of the
            embedding differs from it; the vocabulary does not fit the network.
    """
    folder = require_hf(folder)
    values = read_config(folder)
    config = hf_names.config_from_hf(values, folder / CONFIG_FILE)
    stored, notes = open_weights(folder)
    tree_checks.check_dtypes(folder, {name: tensor.dtype for name, tensor in stored.items()})
    stored, more = _without_copies(stored, values, config, folder)
    tensors = _leaves(stored, values, config, folder)
    found = hf_tokenizer.read_vocabulary(folder, values.get("tokenizer_class"))
    vocabulary = found.contents if found else None
    tree_checks.check_vocabulary(vocabulary, config, hf_tokenizer.file_of(folder))
    notes += more + (found.notes if found else ("The folder carries no vocabulary",))
    kept = {"config": values}
    if found is None or not found.is_sentencepiece:
        kept["tokenizer"] = hf_tokenizer.read_configs(folder)
    if (folder / GENERATION_FILE).exists():
        kept["generation_config"] = read_json(folder / GENERATION_FILE)
        notes += generation_notes(kept["generation_config"], hf_names.FIXED_IDS)
    return Model("hf", str(folder), config, tensors, vocabulary, {FACTS: kept}, notes)


def _without_copies(
    stored: dict[str, streaming.Stored], values: Mapping[str, Any], config: T5Config, where: epath.Path,
) -> tuple[dict[str, streaming.Stored], tuple[str, ...]]:
    """Drops copies of the embedding, which must equal it, and unused tensors."""
    tied = (hf_names.HF_HEAD,) if config.logits_via_embedding else ()
    copies = [name for name in (hf_names.HF_EMBEDDING, *hf_names.EMBEDDING_COPIES, *tied)
              if name in stored]
    if not copies:
        return stored, ()
    embedding = stored[copies[0]]
    for name in copies[1:]:
        if not streaming.equal(embedding, stored[name]):
            cure = ("set tie_word_embeddings to false in config.json if the model has a head of its own"
                    if name == hf_names.HF_HEAD else None)
            raise InputError(describe(f"{name} differs from {copies[0]}, of which it should be a copy",
                                      where=where, got=f"{list(stored[name].shape)} {stored[name].dtype}, "
                                      f"against {list(embedding.shape)} {embedding.dtype}", cure=cure))
    left_out = [*copies[1:], *(name for name in hf_names.LEFTOVERS if name in stored)]
    kept = {name: tensor for name, tensor in stored.items() if name not in (*copies, *left_out)}
    notes = (f"Left out, as a copy of the embedding or used by nothing: {', '.join(left_out)}",)
    return {hf_names.HF_EMBEDDING: embedding, **kept}, notes if left_out else ()


def _leaves(stored: Mapping[str, streaming.Stored], values: Mapping[str, Any], config: T5Config,
            where: epath.Path) -> streaming.StoredTensors:
    """The network's leaves as stored tensors, checked against the config."""
    shapes, parameters = leaf_shapes(config), hf_names.hf_parameters(config)
    if hf_names.HF_HEAD not in stored and hf_names.may_share_head(values):
        shared = HfParameter(hf_names.HF_EMBEDDING, (hf_names.HEAD,), True)
        parameters = [shared if each.name == hf_names.HF_HEAD else each for each in parameters]
    hf_tensors.check_tensors(parameters, stored, shapes, where)
    return hf_tensors.leaves_of(parameters, stored, shapes)


def leaf_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of a network."""
    return {path: tuple(leaf.shape)
            for path, leaf in trees.flatten(T5Network(config).abstract_params()).items()}


def leaf_names(config: T5Config) -> dict[str, hf_names.HfName]:
    """Hugging Face's name of every leaf of a network, and whether it is transposed there; adapters too."""
    return {path: hf_names.hf_name(path) for path in leaf_shapes(config)}


def check_config(values: Mapping[str, Any], where: Any) -> None:
    """Raises InputError if the values of a config.json are not those of a T5."""
    hf_names.config_from_hf(values, where)


def write_hf(folder: storage.PathLike, model: Model, *,
             max_shard_bytes: float = DEFAULT_SHARD_BYTES) -> dict[str, Origin]:
    """Writes a Hugging Face folder tensor by tensor; it gets its final name when it is whole.

    Args:
        folder: does not exist, or is empty.
        model: without adapters.
        max_shard_bytes: most bytes of a file of weights.

    Returns:
        The name that each leaf got. A head that is a copy of the embedding is not written.

    Raises:
        InputError: the folder is taken; the network has parts that Hugging Face's T5 has not; the model is
            not the one that its folder records.
        RunError: the disk is full.
    """
    with staging.staged(folder, late_writes=False) as target:
        return write_into(target, model, max_shard_bytes)


def write_into(target: epath.Path, model: Model, max_shard_bytes: float) -> dict[str, Origin]:
    """Writes a model's files into a folder; config.json, which readers look for, comes last."""
    if model.config.adapter is not None:
        raise InputError(describe("Hugging Face's T5 has no adapters", where=model.where,
                                  cure="write the model without them, and the adapters beside it"))
    kept = model.facts.get(FACTS, {})
    values, tokenizer = hf_names.config_to_hf(model.config, kept.get("config")), tokenizer_files(model)
    parameters = hf_names.hf_parameters(model.config)
    if model.kind != "hf":  # in the order in which leaves are read cheapest, and checked as they are read
        parameters = hf_tensors.in_order_of(parameters, model.tensors.specs)
    if hf_names.HEAD in model.tensors.specs and hf_names.says_tied(values):
        if hf_names.may_share_head(values) and _head_is_embedding(model):
            parameters = [each for each in parameters if each.name != hf_names.HF_HEAD]
        else:  # transformers 5 writes that it is tied whatever it is, and older versions believe it
            values["tie_word_embeddings"] = False
    held = [*parameters, *hf_names.embedding_copies(model.config)]
    specs = hf_tensors.specs_of(held, model.tensors)
    if "config" not in kept:
        values["torch_dtype"] = main_dtype(specs)
    safetensors_files.write_tensors(target, specs, hf_tensors.contents_of(held, model.tensors),
                                    max_shard_bytes)
    model.check()
    write_rest(target, model, values, kept.get("generation_config"), tokenizer)
    return {path: hf_tensors.origin_of(each, path) for each in parameters for path in each.paths}


def _head_is_embedding(model: Model) -> bool:
    """Whether an untied head still equals the embedding."""
    specs = model.tensors.specs
    if specs[hf_names.HEAD].dtype != specs[hf_names.EMBEDDING].dtype:
        return False
    rows, step = model.config.vocab_size, 4096
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        head = model.tensors.read(hf_names.HEAD, (slice(None), part))
        embedding = model.tensors.read(hf_names.EMBEDDING, (part, slice(None)))
        if not np.array_equal(head.T, embedding):
            return False
    return True
