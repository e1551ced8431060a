"""Hugging Face model folders of every family: the config's ``model_type`` says which reader fits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from elm_jax.errors import InputError, describe, in_short
from elm_jax.formats.hf import decoder_models, folder_files, t5_models
from elm_jax.formats.hf.config_json import CONFIG_FILE, DEFAULT_SHARD_BYTES
from elm_jax.formats.model import Model, Origin
from elm_jax.runtime import storage


class HfFormat(NamedTuple):
    """How folders of a family of networks are read and written.

    Attributes:
        opened: opens a folder.
        written: writes a model.
        check_config: raises InputError for values of a ``config.json`` that are not the family's.
        model_types: of ``config.json``.
    """

    opened: Callable[[epath.Path], Model]
    written: Callable[..., dict[str, Origin]]
    check_config: Callable[[Mapping[str, Any], Any], None]
    model_types: tuple[str, ...]


FORMATS: dict[str, HfFormat] = {
    "t5": HfFormat(t5_models.open_hf, t5_models.write_hf, t5_models.check_config, t5_models.MODEL_TYPES),
    "decoder": HfFormat(decoder_models.open_decoder, decoder_models.write_decoder,
                        decoder_models.check_config, decoder_models.MODEL_TYPES),
}
"""Families of networks that Hugging Face has, by name."""
_OTHERS = {
    "qwen2_moe": "an expert that all tokens share", "deepseek_v2": "experts that all tokens share",
    "deepseek_v3": "experts that all tokens share",
    "nllb-moe": "gates that are divided by the sum of what is left after dropping, and biases",
    "gpt_oss": "biases of experts, and attention sinks", "granitemoe": "multipliers of states and logits"}
"""What known sparse networks have and this program's have not, by model type."""


def family_of(values: Mapping[str, Any], where: Any = None) -> str:
    """The family of a ``config.json``, by its model type.

    Raises:
        InputError: this program has no such networks.
    """
    kind = values.get("model_type")
    for family, found in FORMATS.items():
        if kind in found.model_types:
            return family
    reason = _OTHERS.get(kind) if isinstance(kind, str) else None
    raise InputError(describe(
        "This is no network that this program reads", where=where,
        got=f"model_type {in_short(kind)}" + (f", which has {reason}" if reason else ""),
        expected="; ".join(f"{family}: {', '.join(found.model_types)}" for family, found in FORMATS.items())))


def open_model_folder(folder: storage.PathLike) -> Model:
    """Opens a Hugging Face folder; checks the tensors against the config without reading them.

    Raises:
        InputError: there is no such folder; its config is of no model type that this program has; otherwise
            as the family's reader.
    """
    folder = folder_files.require_hf(folder)
    values = folder_files.read_json(folder / CONFIG_FILE)
    return FORMATS[family_of(values, folder / CONFIG_FILE)].opened(folder)


def write_model_folder(folder: storage.PathLike, model: Model, *,
                       max_shard_bytes: float = DEFAULT_SHARD_BYTES) -> dict[str, Origin]:
    """Writes a Hugging Face folder of a model; returns the name that each leaf got.

    Raises:
        InputError: Hugging Face has no such family; otherwise as the family's writer.
    """
    if model.config.family not in FORMATS:
        raise InputError(describe(f"Hugging Face has no networks of family {model.config.family!r}",
                                  where=model.where, expected=" or ".join(FORMATS)))
    return FORMATS[model.config.family].written(folder, model, max_shard_bytes=max_shard_bytes)


def check_config(values: Mapping[str, Any], where: Any) -> None:
    """Raises InputError if the values of a ``config.json`` are of no model that this program has."""
    FORMATS[family_of(values, where)].check_config(values, where)
