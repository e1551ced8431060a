"""Models of a merge in mergekit's schema: one list, slices of layers, or modules."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elm_jax.merging.recipes.leaf_settings import Setting
from elm_jax.merging.recipes.regions import Region
from elm_jax.merging.recipes.strict_yaml import YamlFile

_MODEL_KEYS, _SOURCE_KEYS = ("model", "parameters"), ("model", "layer_range", "parameters")
_SLICE_KEYS = ("sources", "base_model", "residual_weight", "parameters")
_MODULE_KEYS = ("models", "slices", "parameters")
_REFERENCE_KEYS = ("model", "path", "revision", "lora", "override_architecture")
WHOLE_MODULE = "default"
"""mergekit's name for the module of a model that has only one."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The parameters that a file gives in one place."""

    values: Mapping[str, Setting]
    place: str


@dataclasses.dataclass(frozen=True)
class ListedModel:
    """A model as a list or a slice of the file names it."""

    model: str
    parameters: Settings
    layers: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Models that are merged with each other: a list of models, or one slice.

    Attributes:
        region: the part of the model that they are merged to; None for the whole model.
        sources: the models.
        parameters: settings of the slice and of the module, those that count first in front.
        base: the slice's own base.
    """

    region: Region | None
    sources: tuple[ListedModel, ...]
    parameters: tuple[Settings, ...]
    base: str | None = None

    @property
    def is_slice(self) -> bool:
        """Whether the models are merged in some layers only."""
        return self.region is not None and self.region.layers is not None

    @property
    def models(self) -> list[str]:
        """The models' folders, in the file's order."""
        return [source.model for source in self.sources]


def read_settings(file: YamlFile, owner: Mapping[str, Any], place: str = "") -> Settings:
    """Reads the parameters of the whole file, or of a model, slice or module in it."""
    place = f"{place}.parameters" if place else "parameters"
    return Settings(file.mapping(owner.get("parameters"), place, empty=True), place)


def read_parts(file: YamlFile, value: Mapping[str, Any]) -> list[Part]:
    """Reads the parts of a merge.

    Raises:
        InputError: another form; models that are not plain folders; slices that move, repeat or leave out
            layers, or take other layers of another model.
    """
    given = [key for key in ("models", "slices", "modules") if value.get(key) is not None]
    if len(given) != 1:
        raise file.error("A merge names its inputs in one way", "", " and ".join(given) or None,
                         "models:, slices: or modules:")
    if given != ["modules"]:
        return _read_module(file, value, "", None, ())
    modules = file.mapping(value["modules"], "modules")
    if not modules or (WHOLE_MODULE in modules and len(modules) > 1):
        raise file.error("Modules have another form", "modules", ", ".join(map(str, modules)) or None,
                         f"modules by name, or only {WHOLE_MODULE}")
    parts = []
    for name, entry in modules.items():
        place = f"modules.{name}"
        file.keys(entry, _MODULE_KEYS, place, "key of a module")
        if (entry.get("models") is None) == (entry.get("slices") is None):
            raise file.error("A module names its inputs in one way", place, list(entry),
                             "models: or slices:")
        parts += _read_module(file, entry, f"{place}.", None if name == WHOLE_MODULE else str(name),
                              (read_settings(file, entry, place),))
    return parts


def read_model(file: YamlFile, value: Any, place: str) -> str:
    """Folder of a model reference; one with an adapter or a revision is an InputError."""
    if isinstance(value, Mapping):
        return _read_model_mapping(file, value, place)
    if not isinstance(value, str) or not value.strip():
        raise file.error("A model is named by its folder", place, value, "a path")
    for sign, what in (("+", "An adapter beside a model"), ("@", "A revision of a model")):
        if sign in value:
            raise file.error(
                f"{what} is not supported", place, value, "a folder",
                "give a folder of the model as it is to be merged; if this is the folder's name, write "
                f"model: {{model: {{path: {value!r}}}}}")
    return value


def read_base(file: YamlFile, value: Mapping[str, Any], parts: Sequence[Part]) -> str | None:
    """Folder of the base: the file's own, or the one that all slices name."""
    own = value.get("base_model")
    own = None if own is None else read_model(file, own, "base_model")
    bases = list(dict.fromkeys(own if part.base is None else part.base for part in parts))
    if len(bases) > 1 or (own is not None and bases != [own]):
        names = dict.fromkeys(str(base or "none") for base in [own, *bases])
        raise file.error("Slices of unlike bases are not supported", "slices", " and ".join(names),
                         "one base", "write base_model once, beside merge_method")
    return bases[0]


def merged_models(file: YamlFile, parts: Sequence[Part], base: str | None, apart: bool,
                  joins: bool) -> tuple[str, ...]:
    """The merged models, in the order in which the file first names them.

    Args:
        file: for messages.
        parts: of the merge.
        base: the base.
        apart: whether the base is never one of the models that are merged.
        joins: whether a base that a slice does not list is one of its models; a list's base always is.

    Raises:
        InputError: none, one twice, or other ones in other parts.
    """
    _refuse_spellings(file, {model for part in parts for model in part.models} | ({base} - {None}))

    def merged(part: Part) -> list[str]:
        models = part.models
        if apart:
            return [model for model in models if model != base]
        joined = base is not None and base not in models and (joins or not part.is_slice)
        return [*models, base] if joined else models

    first = merged(parts[0])
    for part in parts:
        for number, model in enumerate(part.models):
            if model in part.models[:number]:
                raise file.error("A model is named twice", part.sources[number].parameters.place, model,
                                 "each model once")
        if set(merged(part)) != set(first):
            raise file.error("All slices and modules must merge the same models",
                             part.sources[0].parameters.place, ", ".join(merged(part)), ", ".join(first))
    if not first:
        raise file.error("There is no model to merge beside the base", parts[0].sources[0].parameters.place,
                         base)
    return tuple(first)


def _read_module(file: YamlFile, entry: Mapping[str, Any], prefix: str, module: str | None,
                 parameters: tuple[Settings, ...]) -> list[Part]:
    """Reads the parts of one module, or of the whole model if `module` is None."""
    if entry.get("slices") is None:
        place = f"{prefix}models"
        sources = tuple(_read_source(file, item, f"{place}[{number}]", _MODEL_KEYS)
                        for number, item in enumerate(file.entries(entry["models"], place)))
        return [Part(Region(module) if module else None, sources, parameters)]
    parts: list[Part] = []
    covered = 0
    for number, item in enumerate(file.entries(entry["slices"], f"{prefix}slices")):
        place = f"{prefix}slices[{number}]"
        part = _read_slice(file, item, place, module, parameters)
        first, stop = part.sources[0].layers
        if first != covered:
            raise file.error(
                "Slices that move, repeat or leave out layers are not supported",
                f"{place}.sources[0].layer_range", [first, stop], f"a slice from layer {covered}",
                "give slices of all layers in their order, or use models:")
        covered = stop
        parts.append(part)
    return parts


def _read_slice(file: YamlFile, item: Any, place: str, module: str | None,
                parameters: tuple[Settings, ...]) -> Part:
    file.keys(item, _SLICE_KEYS, place, "key of a slice")
    if item.get("residual_weight") is not None:
        raise file.error("residual_weight is not supported", f"{place}.residual_weight",
                         item["residual_weight"], cure="leave it out")
    sources = tuple(_read_source(file, source, f"{place}.sources[{number}]", _SOURCE_KEYS)
                    for number, source in enumerate(file.entries(item.get("sources"), f"{place}.sources")))
    for number, source in enumerate(sources):
        if source.layers != sources[0].layers:
            raise file.error("Other layers of another model are not supported",
                             f"{place}.sources[{number}].layer_range", list(source.layers),
                             f"{list(sources[0].layers)}, as of the first source")
    base = item.get("base_model")
    return Part(Region(module, sources[0].layers), sources, (read_settings(file, item, place), *parameters),
                None if base is None else read_model(file, base, f"{place}.base_model"))


def _read_source(file: YamlFile, item: Any, place: str, keys: Sequence[str]
                 ) -> ListedModel:
    file.keys(item, keys, place, "key of a model")
    model = read_model(file, item.get("model"), f"{place}.model")
    settings = read_settings(file, item, place)
    if "layer_range" not in keys:
        return ListedModel(model, settings)
    return ListedModel(model, settings, _read_layers(file, item.get("layer_range"), f"{place}.layer_range"))


def _read_layers(file: YamlFile, value: Any, place: str) -> tuple[int, int]:
    pair = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
    if not pair or not 0 <= value[0] < value[1]:
        raise file.error("A range of layers has another form", place, value,
                         "[first layer, layer after the last]")
    return value[0], value[1]


def _read_model_mapping(file: YamlFile, value: Mapping[str, Any], place: str) -> str:
    """Reads a model given as ``{model: folder}``, ``{path: folder}`` or nested; returns the folder."""
    file.keys(value, _REFERENCE_KEYS, place, "key of a model reference")
    for key in ("revision", "lora", "override_architecture"):
        if value.get(key) is not None:
            raise file.error(f"{key} of a model is not supported", f"{place}.{key}", value[key],
                             cure="give a folder of the model as it is to be merged")
    if "path" not in value:
        return read_model(file, value.get("model"), f"{place}.model")
    path = value["path"]
    if "model" in value or not isinstance(path, str) or not path.strip():
        raise file.error("A model is named by its folder", f"{place}.path", path, "one path")
    return path


def _refuse_spellings(file: YamlFile, models: Iterable[str]) -> None:
    """Refuses two spellings of one folder, which mergekit takes for two models."""
    seen: dict[str, str] = {}
    for model in sorted(models):
        other = seen.setdefault(os.path.normpath(model), model)
        if other != model:
            raise file.error("One folder is written in two ways", "", f"{other} and {model}",
                             cure="write it in one way")
