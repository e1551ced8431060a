"""Reads PEFT's LoRA and (IA)^3 adapters as experts.

A LoRA of PEFT becomes low-rank updates of this program's projections. Layers of one kind of projection share
a rank and a scale here: lower ranks are filled with zeros, which changes nothing, and of layers without an
update all is zero. Where layers of one kind differ in scale, the up factors take the difference, rounded to
float32. Modules and biases that an adapter replaces are leaves of the overlay.
"""

import collections
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert
from elm_jax.experts.peft_fit import FACTOR_A, FACTOR_B, VECTOR, Shapes, check_tensors, none_of_config
from elm_jax.formats import leaf_names, places, tree_checks
from elm_jax.formats.model import Model, Origin
from elm_jax.formats.peft import adapter_files, ia3_settings, lora_settings
from elm_jax.formats.peft.base_modules import BIAS, Modules, modules_of
from elm_jax.formats.peft.ia3_settings import Ia3Settings
from elm_jax.formats.peft.lora_settings import LoraSettings
from elm_jax.formats.tensors import leaf_values, streaming
from elm_jax.models import families
from elm_jax.models.adapters.kind import HIDDEN, PROJECTIONS, is_adapter_leaf
from elm_jax.models.adapters.low_rank import DOWN, UP, LowRankConfig
from elm_jax.models.adapters.scaling import FACTORS, ScalingConfig
from elm_jax.models.network import NetworkConfig, has_trunk
from elm_jax.runtime import storage, trees
from elm_jax.types import FlatParams

logger = logging.getLogger(__name__)
FACTS = "peft"
"""Key of a card's training facts for the adapter_config.json that an expert came with."""
_BASE_LAYER = ".base_layer"
_COPIES = (".original_module.", ".modules_to_save.")
"""Parts of names of copies that PEFT may write beside a module that it replaces."""


def load_peft(folder: storage.PathLike, base: Base, *, expert_id: str | None = None) -> Expert:
    """Reads a PEFT adapter, LoRA or (IA)^3, as an expert on a base.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: that the adapter was trained on.
        expert_id: name of the expert; None for the folder's.

    Raises:
        InputError: another kind of adapter; settings that are not supported; pickled weights; tensors that do
            not fit the base; another base's name. All faults of one sort are named.
    """
    names = (base.path or base.name,)
    return read_peft(folder, base.config, base.reference(), names, expert_id)[0]


def names_of(model: Model) -> tuple[str, ...]:
    """Names under which a model's files know it: its address, and what its config.json records."""
    kept = model.facts.get("hf", {}).get("config", {}).get("_name_or_path")
    return (model.address, *([kept] if isinstance(kept, str) and kept else ()))


def read_peft(folder: storage.PathLike, config: NetworkConfig, reference: Mapping[str, str],
              names: Sequence[str] = (), expert_id: str | None = None) -> tuple[Expert, dict[str, Origin]]:
    """Reads an adapter; also returns the origin of each leaf. See `load_peft`.

    Args:
        folder: of the adapter.
        config: of the base.
        reference: the base's, for the card.
        names: of the base, to compare with the one that the adapter records.
        expert_id: name of the expert; None for the folder's.
    """
    folder = storage.as_path(folder)
    where = folder / adapter_files.CONFIG_FILE
    values = adapter_files.read_config(folder)
    settings = (ia3_settings.parse(values, where) if values.get("peft_type") == ia3_settings.IA3
                else lora_settings.parse(values, where))
    check_base_name(values.get("base_model_name_or_path"), names, where)
    stored = _named(adapter_files.open_tensors(folder), folder)
    tree_checks.check_dtypes(folder, {name: tensor.dtype for name, tensor in stored.items()})
    modules = modules_of(config.with_adapter(None), where)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    targeted = targeted_modules(settings, modules, where, stored, shapes)
    replaced = replaced_parameters(settings, modules, targeted, stored)
    wanted = {name: modules.shape(name) for name in replaced}
    for module in targeted:
        wanted |= _own_shapes(settings, modules, module)
    check_tensors(shapes, wanted, modules, folder)
    if isinstance(settings, Ia3Settings):
        adapter, overlay, origins = _factors(settings, modules, targeted, stored, where)
    else:
        adapter = adapter_of_settings(settings, modules, targeted)
        overlay, origins = _updates(settings, modules, adapter, targeted, stored)
    for name in replaced:
        leaves = modules.leaves(name, _read(stored, name))
        overlay |= leaves
        origins |= {path: Origin(name, modules.parameters[name].transposed) for path in leaves}
    whole = config.with_adapter(dataclasses.replace(adapter, layers=_layers_of(config, overlay)))
    overlay, origins = _filled(whole, overlay, origins)
    card = ExpertCard(
        id=expert_id or leaf_names.as_id(leaf_names.name_of(folder)), kind="prompt", form="adapter",
        base=dict(reference), network=whole.to_dict(),
        training={"converted_from": "PEFT", FACTS: values})
    return Expert(card, trees.unflatten(dict(sorted(overlay.items()))), path=str(folder)), origins


def _layers_of(config: NetworkConfig, overlay: FlatParams) -> tuple[int, ...]:
    """Numbers of the layers that carry updates or factors, which may be some of the network's only."""
    depth_of = has_trunk(families.network_of(config)).depth_of
    return tuple(sorted({depth_of(path) for path in overlay if is_adapter_leaf(path)}))


def check_base_name(recorded: Any, names: Sequence[str], where: Any) -> None:
    """Compares the base that an adapter records with names of the one that is given.

    Of names of the hub the last word counts: copies of one model have other owners. A folder is taken for the
    recorded base if it is the recorded folder, or has the last word of the recorded name. Where neither side
    has such a name, a warning says that they were not compared.

    Raises:
        InputError: both have names on the hub, of unlike models.
    """
    if not isinstance(recorded, str) or not recorded:
        return
    ours = {_hub_word(name) for name in names} - {None}
    theirs = _hub_word(recorded)
    if theirs is not None and ours and theirs not in ours:
        raise InputError(describe(
            "The adapter was trained on another base", where=where, got=f"base_model_name_or_path {recorded}",
            expected=" or ".join(names), cure="give that base; or, if it is the same model under another "
                                              "name, correct base_model_name_or_path"))
    if theirs not in ours and _last_word(recorded) not in map(_last_word, names):
        logger.warning("%s records the base %s; the given one, %s, has no name to compare with it: only the "
                       "shapes of its tensors were compared", where, recorded,
                       " or ".join(names) or "in memory")


def _last_word(name: str) -> str:
    """The last part of a name or folder; two of ``runs/a/base``: every pretraining calls its base so."""
    parts = name.removeprefix(leaf_names.HUB).lower().rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1] == "base" else parts[-1:])


def _hub_word(name: str) -> str | None:
    """``llama-3.2-1b`` of ``hf://meta-llama/Llama-3.2-1B``; None for what may be a folder."""
    on_hub = places.is_on_hub(name)
    owner, _, word = name.removeprefix(leaf_names.HUB).partition("/")
    if not owner or not word or "/" in word or owner in (".", ".."):
        return None
    return word.lower() if on_hub or not storage.as_path(name).exists() else None


def _named(stored: Mapping[str, streaming.Stored], where: Any) -> dict[str, streaming.Stored]:
    """Tensors by the names that parameters have without PEFT's wrappers; copies are left out."""
    found: dict[str, streaming.Stored] = {}
    for name, tensor in stored.items():
        if any(part in name for part in _COPIES):
            continue
        plain = name.replace(f"{_BASE_LAYER}.", ".")
        if plain in found:
            raise InputError(describe("A tensor is there twice", where=where,
                                      got=f"{plain}, also as {name}"))
        found[plain] = tensor
    return found


def targeted_modules(settings: LoraSettings, modules: Modules, where: Any,
                     stored: Collection[str] | None = None, shapes: Shapes | None = None) -> list[str]:
    """Modules that get an update, in the network's order.

    Args:
        settings: of the adapter.
        modules: of the base.
        where: for the error.
        stored: names of tensors, which say it if the settings do not.
        shapes: of the tensors of a file, for the error.

    Raises:
        InputError: there are none; or some are no projections.
    """
    if settings.target_modules is None and stored is not None:
        found = [module for module in modules.projections
                 if module + FACTOR_A in stored or module + VECTOR in stored]
    else:
        linear = set(modules.projections)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in modules.parameters)
        found = [module for module in owners if settings.targets(module, module in linear)]
        other = [module for module in found if module not in linear]
        if other:
            raise InputError(describe("Updates of these modules are not supported", where=where,
                                      got=", ".join(other), expected=_kinds(modules)))
    if not found:
        shown = _shown(settings.target_modules)
        raise none_of_config(shapes or {}, modules, where, shown) or InputError(describe(
            "The adapter is for other modules than the base has", where=where,
            got=f"target_modules {shown}", expected=_kinds(modules),
            cure="give the base that it was trained on"))
    return found


def _kinds(modules: Modules) -> str:
    """The projections of a network, each word once."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in modules.projections}))


def _shown(names: Any) -> str:
    return repr(names) if isinstance(names, str | None) else ", ".join(sorted(names))


def replaced_parameters(settings: LoraSettings, modules: Modules, targeted: Collection[str],
                        stored: Collection[str] | None = None) -> list[str]:
    """Names of the parameters that an adapter has whole: `modules_to_save`, and biases.

    With ``lora_only``, PEFT before 0.21 wrote no biases: then those that are there.
    """
    found = modules.inside(settings.saves)
    biases = [name for name in modules.parameters if name.endswith(BIAS) and name not in found]
    if settings.bias == "all":
        return found + biases
    if settings.bias == "none":
        return found
    own = [name for name in biases if name.removesuffix(BIAS) in targeted]
    kept = own if stored is None else [name for name in own if name in stored]
    if len(kept) < len(own):
        logger.warning("the adapter says bias='lora_only', and its file has %d of %d biases: the base's "
                       "take the others' place", len(kept), len(own))
    return found + kept


def adapter_of_settings(settings: LoraSettings, modules: Modules, targeted: Sequence[str]) -> LowRankConfig:
    """Config of updates that hold those of an adapter: by projection the highest rank and the usual scale."""
    ranks: dict[str, int] = {}
    scales: dict[str, collections.Counter[float]] = collections.defaultdict(collections.Counter)
    for module in targeted:
        for path, _ in modules.parts(module):
            place = path.rpartition("/")[2]
            ranks[place] = max(ranks.get(place, 0), settings.rank(module))
            scales[place][settings.scale(module)] += 1
    alphas = {place: alpha_of(counts.most_common(1)[0][0], ranks[place]) for place, counts in scales.items()}
    places = [place for place in PROJECTIONS if place in ranks]
    rank, alpha = (collections.Counter(table[place] for place in places).most_common(1)[0][0]
                   for table in (ranks, alphas))
    return LowRankConfig(rank=rank, alpha=alpha, targets=tuple(places),
                         ranks={place: ranks[place] for place in places if ranks[place] != rank},
                         alphas={place: alphas[place] for place in places if alphas[place] != alpha})


def alpha_of(scale: float, rank: int) -> float:
    """The alpha that gives a scale, a whole number where one does."""
    whole = round(scale * rank)
    return float(whole) if whole and whole / rank == scale else scale * rank


def _updates(settings: LoraSettings, modules: Modules, adapter: LowRankConfig, targeted: Sequence[str],
             stored: Mapping[str, streaming.Stored]) -> tuple[FlatParams, dict[str, Origin]]:
    """Down and up factors of all updates; a fused module's parts share the down factor."""
    overlay: FlatParams = {}
    origins: dict[str, Origin] = {}
    for module in targeted:
        down, up = _read(stored, module + FACTOR_A).T, _read(stored, module + FACTOR_B).T
        start = 0
        for path, (inner, outer) in modules.parts(module):
            place = path.rpartition("/")[2]
            ratio = settings.scale(module) / adapter.scale_of(place)
            wide = np.zeros((inner, adapter.rank_of(place)), np.float32)
            wide[:, :down.shape[1]] = down
            tall = np.zeros((adapter.rank_of(place), outer), np.float32)
            tall[:len(up)] = scaled(up[:, start:start + outer], ratio)
            start += outer
            for end, factor, name in ((DOWN, wide, FACTOR_A), (UP, tall, FACTOR_B)):
                overlay[f"{path}_adapter/{end}"] = factor
                origins[f"{path}_adapter/{end}"] = Origin(module + name, True)
    return overlay, origins


def scaled(array: np.ndarray, ratio: float) -> np.ndarray:
    """Values times a ratio, rounded to float32 once; unchanged for 1."""
    return array if ratio == 1.0 else (array.astype(np.float64) * ratio).astype(np.float32)


def _own_shapes(settings: LoraSettings, modules: Modules, module: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a targeted module must have in the file."""
    parts = modules.parts(module)
    inner, outer = parts[0][1][0], sum(size[1] for _, size in parts)
    if isinstance(settings, Ia3Settings):
        return {module + VECTOR: (1, inner) if settings.is_feedforward(module) else (outer, 1)}
    rank = settings.rank(module)
    return {module + FACTOR_A: (rank, inner), module + FACTOR_B: (outer, rank)}


def _factors(settings: Ia3Settings, modules: Modules, targeted: Sequence[str],
             stored: Mapping[str, streaming.Stored], where: Any
             ) -> tuple[ScalingConfig, FlatParams, dict[str, Origin]]:
    """Factors of (IA)^3: of the outputs of projections, or of the input of a feed-forward's last.

    Raises:
        InputError: the input of another projection is scaled.
    """
    overlay: FlatParams = {}
    origins: dict[str, Origin] = {}
    places = set()
    for module in targeted:
        vector, start = _read(stored, module + VECTOR).reshape(-1), 0
        for path, (_, outer) in modules.parts(module):
            place, part = path.rpartition("/")[2], vector[start:start + outer]
            start += outer
            if settings.is_feedforward(module):
                if place != "wo":
                    raise InputError(describe("Inputs of these modules cannot be scaled here", where=where,
                                              got=f"feedforward_modules: {module}",
                                              expected="the feed-forward's last projection"))
                place, part = HIDDEN, vector
            places.add(place)
            leaf = f"{path.rpartition('/')[0]}/{place}_adapter/{FACTORS}"
            overlay[leaf], origins[leaf] = np.array(part), Origin(module + VECTOR)
    return ScalingConfig(targets=tuple(sorted(places))), overlay, origins


def _filled(config: NetworkConfig, overlay: FlatParams, origins: dict[str, Origin]
            ) -> tuple[FlatParams, dict[str, Origin]]:
    """Adds what changes nothing in layers that the adapter leaves alone: updates of zero, factors of one."""
    whole = trees.flatten(families.network_of(config).abstract_params())
    value = float(isinstance(config.adapter, ScalingConfig))
    empty = {path: np.full(leaf.shape, value, np.float32) for path, leaf in whole.items()
             if is_adapter_leaf(path) and path not in overlay}
    return overlay | empty, origins | {path: Origin("nothing: all the same") for path in empty}


def _read(stored: Mapping[str, streaming.Stored], name: str) -> np.ndarray:
    return leaf_values.read_float32(streaming.read_part(stored[name]), name, "the adapter")
