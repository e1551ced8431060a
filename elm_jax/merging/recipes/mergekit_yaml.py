"""Reads `elm merge --config merge.yaml`: merges described in mergekit's schema.

A file has the same meaning as in mergekit 0.1.5, defaults included. Keys that this program does not support,
or that have no effect in mergekit, are refused with their place in the file; mergekit ignores unknown keys.

Source: https://github.com/arcee-ai/mergekit, "Merge Configuration".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, unknown_name
from elm_jax.merging.methods.parameter import Parameter
from elm_jax.merging.recipes.leaf_settings import Setting, check_setting, map_setting
from elm_jax.merging.recipes.mergekit_parts import (
    ListedModel,
    Part,
    Settings,
    merged_models,
    read_base,
    read_model,
    read_parts,
    read_settings,
)
from elm_jax.merging.recipes.recipe import WEIGHT, MergeRecipe, Scope
from elm_jax.merging.recipes.regions import Region
from elm_jax.merging.recipes.strict_yaml import YamlFile, read_yaml
from elm_jax.runtime import storage

LARGEST_FILE = 1 << 20
"""Most bytes of a file. A merge of hundreds of models with rules for every layer has some 10^4."""
DTYPES = ("float32", "bfloat16", "float16", "float64")

_FILE_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "slices", "modules",
              "tokenizer_source", "tokenizer", "chat_template")
_TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
_MEMORY_ONLY = ("int8_mask",)
_SPECS = {spec.name: spec for spec in (
    Parameter(WEIGHT, per_expert=True),
    Parameter("density", default=1.0, low=0, high=1, per_expert=True),
    Parameter("normalize", "bool"),
    Parameter("rescale", "bool"),
    Parameter("lambda", default=1.0),
    Parameter("t", low=0, high=1),
    Parameter("int8_mask", "bool"))}
"""mergekit's parameters, with their ranges here: it takes any t and any density."""
_OURS = {spec.name: spec for spec in (
    _SPECS["density"], _SPECS["normalize"], _SPECS["t"],
    Parameter("scale", default=1.0),
    Parameter("rescale", "choice", choices=("none", "density", "l1")))}


@dataclasses.dataclass(frozen=True)
class _Method:
    """The settings that one of mergekit's methods reads, with its defaults.

    Attributes:
        required: without a default.
        defaults: the others that change its result.
        idle: read by mergekit without any effect.
        base_apart: whether the base is apart from the models; otherwise it is one of them.
    """

    required: str
    defaults: Mapping[str, Any]
    idle: tuple[str, ...] = ()
    base_apart: bool = True


_SPARSE = {"density": 1.0, "lambda": 1.0}
_METHODS = {
    "linear": _Method(WEIGHT, {"normalize": True}, base_apart=False),
    "slerp": _Method("t", {}, base_apart=False),
    "task_arithmetic": _Method(WEIGHT, {"normalize": False, "lambda": 1.0}, idle=("density", "rescale")),
    "ties": _Method(WEIGHT, {"normalize": True, "rescale": False, **_SPARSE}),
    "dare_linear": _Method(WEIGHT, {"normalize": False, "rescale": True, **_SPARSE}),
    "dare_ties": _Method(WEIGHT, {"normalize": False, "rescale": True, **_SPARSE}),
}


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """A merge as a file describes it.

    Attributes:
        method: name in `method_table.METHODS`.
        models: folders of the experts in order; for slerp the base first, then the other.
        base: folder of the base whose distance to the experts is merged; None for linear and slerp.
        recipe: weights and parameters, of every leaf.
        dtype: what inputs are cast to before they are merged; None leaves them. Sums are of float32 anyway.
        out_dtype: of the output; None is `dtype`, or that of the inputs.
        donor: folder whose configuration is that of the output.
        tokenizer: folder whose tokenizer is copied.
        notes: what was read without effect, one sentence each.
        source: the file.
        source_text: what it holds.
    """

    method: str
    models: tuple[str, ...]
    base: str | None
    recipe: MergeRecipe
    dtype: str | None
    out_dtype: str | None
    donor: str
    tokenizer: str
    notes: tuple[str, ...]
    source: str
    source_text: str


def read_config(path: storage.PathLike) -> MergeConfig:
    """Reads a merge in mergekit's schema from a file.

    Relative folders are relative to the current directory, as in mergekit.

    Raises:
        InputError: not YAML, not the schema, or something that is not supported here; with its place.
    """
    value, text = read_yaml(path, "merge config", LARGEST_FILE, _FILE_KEYS)
    return _Reader(YamlFile(str(path)), value).read(text)


class _Reader:
    """Reads one merge file."""

    def __init__(self, file: YamlFile, value: Mapping[str, Any]) -> None:
        self.file = file
        self.value = value
        self.notes: list[str] = []

    def read(self, text: str) -> MergeConfig:
        self.file.keys(self.value, _FILE_KEYS, "", "key of a merge")
        self._refuse_vocabularies()
        name = self._method_name()
        parts = read_parts(self.file, self.value)
        base = read_base(self.file, self.value, parts)
        models = self._models(name, parts, base)
        donor = models[0] if base is None else base
        recipe = self._recipe(name, parts, models)
        return MergeConfig(
            method=name, models=models, base=base if _METHODS[name].base_apart else None, recipe=recipe,
            dtype=self._dtype("dtype"), out_dtype=self._dtype("out_dtype"), donor=donor,
            tokenizer=self._tokenizer(donor, {donor, *models}), notes=tuple(dict.fromkeys(self.notes)),
            source=self.file.path, source_text=text)

    def _method_name(self) -> str:
        name = self.value.get("merge_method")
        if not isinstance(name, str):
            raise self.file.error("A merge needs a method", "merge_method", name, " | ".join(_METHODS))
        if name not in _METHODS:
            raise unknown_name("merge_method", name, _METHODS, where=self.file.at("merge_method"))
        return name

    def _refuse_vocabularies(self) -> None:
        if self.value.get("chat_template") is not None:
            raise self._no_vocabulary_change("chat_template", self.value["chat_template"])
        if self.value.get("tokenizer") is None:
            return
        if self.value.get("tokenizer_source") is not None:
            raise self.file.error("The tokenizer is named twice", "tokenizer", self.value["tokenizer"],
                                  cure="give tokenizer or tokenizer_source")
        self.file.keys(self.value["tokenizer"], _TOKENIZER_KEYS, "tokenizer", "key of a tokenizer")
        for key in _TOKENIZER_KEYS[1:]:
            if self.value["tokenizer"].get(key) not in (None, {}):
                raise self._no_vocabulary_change(f"tokenizer.{key}", self.value["tokenizer"][key])

    def _no_vocabulary_change(self, place: str, got: Any) -> InputError:
        return self.file.error(f"{place} is not supported", place, got,
                               cure="leave it out: vocabularies are never resized here, and the tokenizer is "
                               "copied from the base or the first model")

    def _tokenizer(self, donor: str, known: set[str]) -> str:
        """The folder whose tokenizer is copied, in mergekit's older spelling or in its newer one."""
        source, place = self.value.get("tokenizer_source"), "tokenizer_source"
        if self.value.get("tokenizer") is not None:
            source, place = self.value["tokenizer"].get("source", "union"), "tokenizer.source"
        if source is None or source == "base":
            return donor
        if source == "union":
            raise self.file.error(
                "A union of vocabularies is not supported", place, source, "base, or one of the models",
                "vocabularies are never resized here: merge models of one vocabulary")
        model = read_model(self.file, source, place)
        if model not in known:
            raise unknown_name("model", model, known, where=self.file.at(place))
        return model

    def _dtype(self, key: str) -> str | None:
        dtype = self.value.get(key)
        if dtype is None:
            return None
        if not isinstance(dtype, str):
            raise self.file.error("A dtype is a name", key, dtype, " | ".join(DTYPES))
        dtype = dtype.removeprefix("torch.")
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES, where=self.file.at(key))
        return dtype

    def _models(self, name: str, parts: Sequence[Part], base: str | None) -> tuple[str, ...]:
        """Folders of the experts; for slerp the base first."""
        if _METHODS[name].base_apart and base is None:
            raise self.file.error(f"{name} needs a base", "base_model", None,
                                  "the model that the others come from")
        models = merged_models(self.file, parts, base, apart=_METHODS[name].base_apart, joins=name == "slerp")
        if name != "slerp":
            return models
        if base is None or len(models) != 2:
            raise self.file.error("slerp merges two models", "",
                                  f"models {', '.join(models)}; base_model {base}",
                                  "two models, one of which is base_model")
        return base, *(model for model in models if model != base)

    def _recipe(self, name: str, parts: Sequence[Part], models: tuple[str, ...]) -> MergeRecipe:
        method = _METHODS[name]
        scopes: list[Scope] = []  # settings that are asked first come first
        for part in parts:
            for source in part.sources:
                scopes += self._source_scopes(name, source, part.region, models)
            scopes += [self._scope(name, settings, part.region) for settings in part.parameters]
        scopes.append(self._scope(name, read_settings(self.file, self.value)))
        scopes = [scope for scope in scopes if scope.settings]
        self._require(name, scopes, parts, models)
        scopes.append(Scope(dict(_translated(key, value, "") for key, value in method.defaults.items()),
                            f"mergekit's defaults of {name}"))
        ours = [_TRANSLATIONS.get(key, key) for key in (*method.defaults, method.required) if key != WEIGHT]
        return MergeRecipe(name, models, tuple(scopes), tuple(_OURS[key] for key in ours),
                      required=(method.required,),
                      regions=tuple(dict.fromkeys(part.region for part in parts if part.region)))

    def _source_scopes(self, name: str, source: ListedModel, region: Region | None,
                       models: tuple[str, ...]) -> list[Scope]:
        scope = self._scope(name, source.parameters, region, of_one=True)
        if source.model in models:
            return [dataclasses.replace(scope, expert=models.index(source.model))]
        if scope.settings:
            self.notes.append(f"{source.parameters.place}: parameters of the base have no effect with {name}")
        return []

    def _scope(self, name: str, given: Settings, region: Region | None = None, of_one: bool = False) -> Scope:
        """Settings under this program's names and values; those without effect are dropped and noted."""
        method = _METHODS[name]
        known = [method.required, *method.defaults, *method.idle, *_MEMORY_ONLY]
        settings = {}
        for key, setting in given.values.items():
            if key not in known:
                raise unknown_name(f"parameter of {name}", str(key), known, where=self.file.at(given.place))
            place = f"{given.place}.{key}"
            if of_one and not _SPECS[key].per_expert:
                raise self.file.error("This parameter is one for all models", place, setting,
                                      cure="write it in the parameters beside merge_method")
            check_setting(setting, _SPECS[key], self.file.at(place))
            if key in _MEMORY_ONLY:
                self.notes.append(f"{place}: changes mergekit's memory only, not its result; ignored")
            elif key in method.idle:
                self.notes.append(f"{place}: has no effect with {name}; ignored")
            else:
                ours, translated = _translated(key, setting, self.file.at(place))
                settings[ours] = translated
        return Scope(settings, self.file.at(given.place), region=region)

    def _require(self, name: str, scopes: Sequence[Scope], parts: Sequence[Part],
                 models: tuple[str, ...]) -> None:
        """Raises InputError if a setting without a default is missing."""
        key = _METHODS[name].required
        per_expert = _SPECS[key].per_expert
        for part in parts:
            places = {source.model: source.parameters.place for source in part.sources}
            for number, model in enumerate(models):
                if any(key in scope.settings and scope.expert in (None, number)
                       and scope.region in (None, part.region) for scope in scopes):
                    continue
                place = places.get(model, "parameters") if per_expert else "parameters"
                raise self.file.error(
                    f"{name} needs a {key}" + (f" of {model}" if per_expert else ""), f"{place}.{key}", None,
                    "a value: mergekit has no default",
                    f"write {key} there, or beside merge_method for all" if per_expert else "write it there")


_TRANSLATIONS = {"lambda": "scale"}


def _translated(key: str, setting: Setting, where: str) -> tuple[str, Setting]:
    """Translates mergekit's setting of L1 rescaling into this program's name and values."""
    if key == "rescale":
        setting = map_setting(setting, "bool", where, lambda rescale: "l1" if rescale else "none")
    return _TRANSLATIONS.get(key, key), setting
