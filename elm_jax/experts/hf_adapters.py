"""Prompt experts in Hugging Face folders: the model with the expert's norms, and a file of its adapters.

Hugging Face's T5 has no adapters, so they are in a separate file, ``adapters.safetensors``, under names of
the same style (`t5_models.leaf_names`), and ``adapters.json`` describes them. (A file ``adapter_config.json``
would make transformers load them with the package peft, which does not know this kind, and fail.) A program
without adapters reads the folder as a T5 with other norms; this program reads the expert back unchanged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe, in_short
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, leaves_to_train
from elm_jax.formats import tree_checks
from elm_jax.formats.hf import t5_models
from elm_jax.formats.model import Index, Model, Origin, Tensors, TensorSpec
from elm_jax.formats.tensors import leaf_values, safetensors_files, streaming
from elm_jax.models import families
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.network import NORM, NetworkConfig
from elm_jax.runtime import staging, storage, trees
from elm_jax.types import FlatParams

CONFIG_FILE = "adapters.json"
WEIGHTS_FILE = "adapters.safetensors"
_SCHEMA_VERSION = 1
_FORMAT = "elm_jax.adapters"


class OverlaidTensors:
    """`Tensors` of a base with an expert's overlay: its leaves replace the base's or are added."""

    def __init__(self, base: Tensors, overlay: FlatParams) -> None:
        self._base, self._own = base, streaming.ArrayTensors(trees.unflatten(overlay))
        self.specs = dict(sorted({**base.specs, **self._own.specs}.items()))
        self.origins = {**base.origins, **self._own.origins}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf or a part of it, from the expert if it has the leaf, else from the base."""
        return (self._own if path in self._own.specs else self._base).read(path, index)


def is_with_adapters(folder: epath.Path) -> bool:
    """Whether a Hugging Face folder contains an expert's adapters."""
    return (folder / CONFIG_FILE).exists()


def with_overlay(model: Model, expert: Expert, *, adapters: bool) -> Model:
    """Returns a model with an expert's norms, and with or without its adapters."""
    overlay = trees.flatten(expert.overlay)
    config = families.config_of(expert.card.network)
    if not adapters:
        config = config.with_adapter(None)
        overlay = {path: leaf for path, leaf in overlay.items() if not is_adapter_leaf(path)}
    return dataclasses.replace(model, config=config, tensors=OverlaidTensors(model.tensors, overlay))


def write_hf_expert(folder: storage.PathLike, model: Model, expert: Expert, *,
                    max_shard_bytes: float = t5_models.DEFAULT_SHARD_BYTES) -> dict[str, Origin]:
    """Writes a prompt expert as a Hugging Face folder of a model, with the adapters in a separate file.

    Args:
        folder: does not exist, or is empty.
        model: the expert's base.
        expert: a prompt expert on that base.
        max_shard_bytes: most bytes of a file of the model's weights.

    Returns:
        The name that each leaf got, adapters too.
    """
    overlay = trees.flatten(expert.overlay)
    names = t5_models.leaf_names(families.config_of(expert.card.network))
    paths = {names[path].name: path for path in overlay if is_adapter_leaf(path)}
    turned = {name: names[path].transposed for name, path in paths.items()}
    specs = {name: TensorSpec(_turned(overlay[path].shape, turned[name]), np.dtype(overlay[path].dtype).name)
             for name, path in sorted(paths.items())}
    with staging.staged(folder, late_writes=False) as target:
        safetensors_files.write_file(
            target / WEIGHTS_FILE, specs,
            lambda name: streaming.pieces(np.asarray(overlay[paths[name]]), turned[name]), {"format": "pt"})
        storage.write_json(target / CONFIG_FILE, _description(expert, overlay))
        written = t5_models.write_into(target, with_overlay(model, expert, adapters=False), max_shard_bytes)
    return written | {path: Origin(*names[path]) for path in paths.values()}


def _description(expert: Expert, overlay: FlatParams) -> dict[str, Any]:
    config = families.config_of(expert.card.network)
    role_of = families.network_of(config).role_of
    norms = any(role_of(path) == NORM for path in overlay)
    return {
        "schema_version": _SCHEMA_VERSION,
        "format": _FORMAT,
        "weights": WEIGHTS_FILE,
        "bottleneck": config.bottleneck,
        "function": "y = x + up(gelu_tanh(down(x))), down and up linear with bias",
        "place": "on the output of self-attention and of the feed-forward, in every layer of encoder and "
                 "decoder" + _but_some(config) + ", before that sub-layer's dropout and residual add",
        "names": "<encoder|decoder>.block.<layer>.layer.<sub-layer>.adapter.<down|up>.<weight|bias>, "
                 "weights as [out, in]",
        "norms": "the expert's own, in the model's weights" if norms else "the base's",
        "trained_norms": norms,
        "card": expert.card.to_dict(),
    }


def _but_some(config: NetworkConfig) -> str:
    layers = config.adapter.layers
    return "" if layers is None else f" that is one of {list(layers)} (the encoder's are counted first)"


def read_hf_expert(folder: storage.PathLike) -> Expert:
    """Reads the prompt expert of a folder that `write_hf_expert` wrote; equals the one that was written.

    Raises:
        InputError: a file is damaged; names or shapes do not fit the network (all are named).
    """
    folder = storage.as_path(folder)
    values = storage.read_json(folder / CONFIG_FILE, kind="adapters' description", schema_version=None)
    if (values.get("format"), values.get("schema_version")) != (_FORMAT, _SCHEMA_VERSION):
        raise InputError(describe(
            "These adapters are of a form that this program does not read",
            where=f"{folder / CONFIG_FILE}: format, schema_version",
            got=f"{in_short(values.get('format'))} {in_short(values.get('schema_version'))}",
            expected=f"{_FORMAT} {_SCHEMA_VERSION}",
            cure="remove the adapters' files to read the model alone"))
    card_values = values.get("card")
    card = ExpertCard.from_dict(card_values if isinstance(card_values, dict) else {}, folder / CONFIG_FILE)
    config = families.config_of(card.network, folder / CONFIG_FILE)
    if config.adapter is None:
        raise InputError(describe("The adapters' card names a network without adapters",
                                  where=folder / CONFIG_FILE))
    if not (folder / WEIGHTS_FILE).exists():
        raise InputError(describe("The adapters' weights are missing", where=folder / WEIGHTS_FILE))
    stored = safetensors_files.read_header(folder / WEIGHTS_FILE)
    names = {path: tuple(name) for path, name in t5_models.leaf_names(config).items()
             if is_adapter_leaf(path)}
    overlay = read_named(stored, names, config, folder / WEIGHTS_FILE)
    if values.get("trained_norms"):
        tensors, network = t5_models.open_hf(folder).tensors, families.network_of(config)
        trains = leaves_to_train(network, card.form)
        overlay |= {path: leaf_values.read_float32(tensors.read(path), path, folder)
                    for path in tensors.specs if network.role_of(path) == NORM and trains(path)}
    return Expert(card, trees.unflatten(overlay), path=str(folder))


def read_named(stored: Mapping[str, streaming.Stored], names: Mapping[str, tuple[str, bool]],
               config: NetworkConfig, where: Any) -> FlatParams:
    """Reads a network's leaves in float32 from stored tensors, by the names that they have there.

    Args:
        stored: the tensors.
        names: by leaf path, its name there and whether it is transposed.
        config: whose shapes the leaves must have.
        where: for errors.
    """
    shapes = t5_models.leaf_shapes(config)
    tree_checks.check_leaves("The tensors do not fit the network", where,
                             {name: tensor.shape for name, tensor in stored.items()},
                             {name: _turned(shapes[path], turned) for path, (name, turned) in names.items()})
    tree_checks.check_dtypes(where, {name: tensor.dtype for name, tensor in stored.items()})
    return {path: leaf_values.read_float32(streaming.read_part(stored[name], None, turned), path, where)
            for path, (name, turned) in sorted(names.items())}


def _turned(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return tuple(shape)[::-1] if transposed else tuple(shape)
