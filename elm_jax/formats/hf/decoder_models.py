"""Hugging Face folders of decoders: config.json, weights in one file or in shards, ``tokenizer.json``."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.hf import folder_files, hf_tensors
from elm_jax.formats.hf.config_json import CONFIG_FILE, DEFAULT_SHARD_BYTES, main_dtype
from elm_jax.formats.model import Model, Origin
from elm_jax.formats.tensors import safetensors_files, streaming
from elm_jax.models.decoder import hf_names
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.network import DecoderNetwork
from elm_jax.runtime import staging, storage, trees
from elm_jax.vocabularies import hf_tokenizer, tokenizer_json

MODEL_TYPES = hf_names.MODEL_TYPES
_CHAT_FILE = "chat_template.jinja"
"""transformers 5 keeps a chat template in a file of its own; here it stands in the tokenizer's config."""
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of the names of tensors in older files that are computed, not learned."""
_BARE = ("wte.", "wpe.", "h.", "ln_f.")
"""Beginnings of GPT-2's names in files that lack ``transformer.``, as the first ones do."""


def open_decoder(folder: epath.Path) -> Model:
    """Opens a Hugging Face folder of a decoder; checks the tensors against the config without reading them.

    Raises:
        InputError: the config is not that of a decoder that this program has; a file is truncated, damaged,
            missing or holds code; names or shapes do not fit the config (all are listed); a head that should
            be the embedding differs from it; the vocabulary does not fit the network.
    """
    values = folder_files.read_config(folder)
    kept: dict[str, Any] = {"config": values}
    if (folder / folder_files.GENERATION_FILE).exists():
        kept["generation_config"] = folder_files.read_json(folder / folder_files.GENERATION_FILE)
    configs = hf_tokenizer.read_configs(folder)
    if (folder / _CHAT_FILE).exists():
        configs.setdefault(hf_tokenizer.CONFIG_FILE, {}).setdefault(
            "chat_template", storage.read_text(folder / _CHAT_FILE))
    kept["tokenizer"] = configs
    path = folder / hf_tokenizer.TOKENIZER_FILE
    contents = storage.read_bytes(path) if path.exists() else None
    bos_id = _bos_id(contents, values, configs.get(hf_tokenizer.CONFIG_FILE, {}), path)
    config = hf_names.config_from_hf(values, folder / CONFIG_FILE, kept.get("generation_config"), bos_id)
    stored, notes = folder_files.open_weights(folder)
    tree_checks.check_dtypes(folder, {name: tensor.dtype for name, tensor in stored.items()
                                      if not name.endswith(_BUFFERS)})
    tensors, more = _leaves(stored, config, folder)
    notes += (*more, *folder_files.generation_notes(kept.get("generation_config", {})))
    if contents is None:
        notes += (f"The folder carries no {hf_tokenizer.TOKENIZER_FILE}, so the base has no vocabulary",)
    else:
        contents = tokenizer_json.with_ids(contents, config.pad_id, config.eos_id)
        tree_checks.check_vocabulary(contents, config, path)
    return Model("hf", str(folder), config, tensors, contents, {folder_files.FACTS: kept}, notes)


def _bos_id(contents: bytes | None, values: Mapping[str, Any], config: Mapping[str, Any], where: Any
            ) -> int | None:
    """The id that the folder's tokenizer puts in front of texts; a name alone does not mean that it does."""
    if contents is None:
        return None
    tokenizer = tokenizer_json.open_tokenizer(contents, where)
    if isinstance(config.get("add_bos_token"), bool):
        return values.get("bos_token_id") if config["add_bos_token"] else None
    framed, bare = (tokenizer.encode("a", add_special_tokens=frame).ids for frame in (True, False))
    if not bare:  # a vocabulary without this letter
        return framed[0] if framed and framed[0] == values.get("bos_token_id") else None
    return framed[0] if framed[1:len(bare) + 1] == bare else None


def _leaves(stored: Mapping[str, streaming.Stored], config: DecoderConfig, where: epath.Path
            ) -> tuple[streaming.StoredTensors, tuple[str, ...]]:
    """The network's leaves as stored tensors, checked against the config, and notes."""
    stored = {f"transformer.{name}" if name.startswith(_BARE) else name: tensor
              for name, tensor in stored.items()}
    left_out = [name for name in stored if name.endswith(_BUFFERS)]
    parameters = hf_names.hf_parameters(config)
    if config.tied_head and hf_names.HF_HEAD in stored:
        embedding = stored.get(parameters[0].name)
        if embedding is not None and not streaming.equal(embedding, stored[hf_names.HF_HEAD]):
            raise InputError(describe(
                f"{hf_names.HF_HEAD} differs from {parameters[0].name}, of which it should be a copy",
                where=where,
                cure="set tie_word_embeddings to false in config.json if the model has a head of its own"))
        left_out.append(hf_names.HF_HEAD)
    shapes = leaf_shapes(config)
    hf_tensors.check_tensors(
        parameters, {name: tensor for name, tensor in stored.items() if name not in left_out}, shapes, where)
    notes = (f"Left out, as a copy of the embedding or computed: {', '.join(left_out)}",) if left_out else ()
    return hf_tensors.leaves_of(parameters, stored, shapes), notes


def leaf_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of a network."""
    return {path: tuple(leaf.shape)
            for path, leaf in trees.flatten(DecoderNetwork(config).abstract_params()).items()}


def check_config(values: Mapping[str, Any], where: Any) -> None:
    """Raises InputError if the values of a config.json are not those of a decoder."""
    hf_names.config_from_hf(values, where)


def write_decoder(folder: storage.PathLike, model: Model, *,
                  max_shard_bytes: float = DEFAULT_SHARD_BYTES) -> dict[str, Origin]:
    """Writes a Hugging Face folder tensor by tensor; it gets its final name when it is whole.

    Args:
        folder: does not exist, or is empty.
        model: without adapters.
        max_shard_bytes: most bytes of a file of weights.

    Returns:
        The name that each leaf got.

    Raises:
        InputError: the folder is taken; Hugging Face has no such network; the model is not the one that its
            folder records.
        RunError: the disk is full.
    """
    with staging.staged(folder, late_writes=False) as target:
        return _write_into(target, model, max_shard_bytes)


def _write_into(target: epath.Path, model: Model, max_shard_bytes: float) -> dict[str, Origin]:
    """Writes a model's files into a folder; config.json, which readers look for, comes last."""
    if model.config.adapter is not None:
        raise InputError(describe("Hugging Face's decoders have no adapters", where=model.where,
                                  cure="write the model without them, and the adapters beside it"))
    kept = model.facts.get(folder_files.FACTS, {})
    values = hf_names.config_to_hf(model.config, kept.get("config"))
    tokenizer = folder_files.tokenizer_files(model)
    parameters = hf_names.hf_parameters(model.config)
    if model.kind != "hf":  # in the order in which leaves are read cheapest, and checked as they are read
        parameters = hf_tensors.in_order_of(parameters, model.tensors.specs)
    specs = hf_tensors.specs_of(parameters, model.tensors)
    if "config" not in kept:
        values["torch_dtype"] = main_dtype(specs)
    safetensors_files.write_tensors(target, specs, hf_tensors.contents_of(parameters, model.tensors),
                                    max_shard_bytes)
    model.check()
    generation = dict(kept.get("generation_config", {}))
    if generation or model.config.extra_eos_ids:
        generation.setdefault("eos_token_id", [model.config.eos_id, *model.config.extra_eos_ids])
    folder_files.write_rest(target, model, values, generation or None, tokenizer)
    return {path: hf_tensors.origin_of(each, path) for each in parameters for path in each.paths}
