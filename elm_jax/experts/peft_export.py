"""Writes LoRA experts as PEFT adapters, which compute the same there.

An expert that came from PEFT gets its own settings again as long as they describe it. Another one gets
settings made of its leaves: trailing ranks that are zero are left out, ranks and alphas differ by module
where they must, norms and other replaced modules are in ``modules_to_save``. Updates of query, key and value
that GPT-2 keeps in one module (``c_attn``) become one: with a shared down factor as they are, else side by
side, of the summed rank.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.experts import peft_adapters
from elm_jax.experts.base import Base
from elm_jax.experts.overlay import Expert, check_base
from elm_jax.experts.peft_adapters import FACTOR_A, FACTOR_B, FACTS, scaled
from elm_jax.formats import leaf_names
from elm_jax.formats.model import Origin, Tensors
from elm_jax.formats.peft import adapter_files, lora_settings
from elm_jax.formats.peft.base_modules import BIAS, WEIGHT, Modules, modules_of, short_names
from elm_jax.formats.peft.lora_settings import LoraSettings
from elm_jax.formats.tensors import leaf_values
from elm_jax.formats.tensors.streaming import ArrayTensors
from elm_jax.models import families
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.adapters.low_rank import DOWN, UP, LowRankConfig
from elm_jax.models.network import TWO_SIDED
from elm_jax.runtime import staging, storage, trees
from elm_jax.types import FlatParams

_TASKS = {True: "SEQ_2_SEQ_LM", False: "CAUSAL_LM"}


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of a module: ``scale * B @ A``, as PEFT keeps it.

    Attributes:
        a: f32[R, in].
        b: f32[out, R].
        scale: factor.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


def save_peft(folder: storage.PathLike, expert: Expert, base: Base) -> None:
    """Writes a LoRA expert as a PEFT adapter; the folder gets its name when it is whole.

    Args:
        folder: does not exist, or is empty.
        expert: a prompt expert with low-rank updates.
        base: of the expert.

    Raises:
        InputError: the expert belongs to another base, or has no form in PEFT; the folder is taken.
    """
    check_base(base, expert.card, expert.path or expert.card.id)
    address = base.path or base.name
    write_peft(folder, expert, ArrayTensors(base.params), address)


def write_peft(folder: storage.PathLike, expert: Expert, base: Tensors, address: str) -> dict[str, Origin]:
    """Writes an adapter as `save_peft` does; returns the name that each leaf got.

    Args:
        folder: does not exist, or is empty.
        expert: on that base.
        base: its leaves, some of which complete modules that the expert replaces in part.
        address: of the base, which the adapter records.
    """
    where = expert.path or expert.card.id
    config = families.config_of(expert.card.network)
    adapter = check_form(expert)
    modules = modules_of(config, where)
    overlay = {path: leaf_values.read_float32(np.asarray(leaf), path, where)
               for path, leaf in trees.flatten(expert.overlay).items()}
    updates = _updates(modules, overlay, adapter)
    replaced = _replaced(modules, overlay, where)
    kept = _kept(expert, modules, updates, replaced)
    values, updates = kept or (_fresh(modules, updates, replaced, where, config), updates)
    if not kept:
        values["base_model_name_or_path"] = address.removeprefix(leaf_names.HUB)

    def read(path: str) -> np.ndarray:
        return overlay[path] if path in overlay else leaf_values.read_float32(base.read(path), path, address)

    settings = lora_settings.parse(values, where)
    names = peft_adapters.replaced_parameters(settings, modules, updates)
    tensors = {_stored_name(name, updates): modules.values(name, read) for name in names}
    for module, update in updates.items():
        tensors |= {module + FACTOR_A: update.a, module + FACTOR_B: update.b}
    with staging.staged(folder, late_writes=False) as target:
        adapter_files.write_into(target, values, tensors)
    origins = {path: Origin(_stored_name(name, updates), modules.parameters[name].transposed)
               for name in names for path in modules.parameters[name].paths}
    return origins | {f"{path}_adapter/{end}": Origin(module + factor, True) for module in updates
                      for path, _ in modules.parts(module) for end, factor in ((DOWN, FACTOR_A),
                                                                               (UP, FACTOR_B))}


def check_form(expert: Expert) -> LowRankConfig:
    """The config of an expert's low-rank updates.

    Raises:
        InputError: it has none: PEFT knows no such expert.
    """
    adapter = None if expert.card.form == "full" else families.config_of(expert.card.network).adapter
    if not isinstance(adapter, LowRankConfig):
        got = "all leaves" if adapter is None else f"adapters of kind {adapter.kind!r}"
        raise InputError(describe("The expert has no form in PEFT", where=expert.path or expert.card.id,
                                  got=got, expected=f"adapters of kind {LowRankConfig.kind!r}"))
    return adapter


def _stored_name(name: str, updates: Collection[str]) -> str:
    """The name of a parameter in the file: biases of updated modules are below PEFT's wrapper."""
    module = name.removesuffix(BIAS)
    return f"{module}.base_layer{BIAS}" if name.endswith(BIAS) and module in updates else name


def _updates(modules: Modules, overlay: FlatParams, adapter: LowRankConfig) -> dict[str, Update]:
    """The updates of all modules, without those that are zero."""
    found = {}
    for module in modules.projections:
        parts = [(f"{path}_adapter/", path.rpartition("/")[2], size) for path, size in modules.parts(module)]
        if not any(prefix + DOWN in overlay for prefix, _, _ in parts):
            continue
        update = _joined([_part(overlay, prefix, size, adapter.scale_of(place))
                          for prefix, place, size in parts])
        rank = _real_rank(update)
        if rank:
            found[module] = Update(update.a[:rank], update.b[:, :rank], update.scale)
    return found


def _part(overlay: FlatParams, prefix: str, size: tuple[int, int], scale: float) -> Update:
    if prefix + DOWN not in overlay:
        return Update(np.zeros((0, size[0]), np.float32), np.zeros((size[1], 0), np.float32), scale)
    return Update(overlay[prefix + DOWN].T, overlay[prefix + UP].T, scale)


def _joined(parts: Sequence[Update]) -> Update:
    """One update of parts that share their input: parts with the same A share their ranks.

    Exact where the parts have one scale; else the others' B take the difference.
    """
    if len(parts) == 1:
        return parts[0]
    scale = next(part.scale for part in parts if len(part.a))
    blocks: list[np.ndarray] = []
    starts = []
    for part in parts:
        same = [number for number, block in enumerate(blocks) if np.array_equal(block, part.a)]
        starts.append(same[0] if same else len(blocks))
        if not same:
            blocks.append(part.a)
    ends = np.cumsum([0, *map(len, blocks)])
    b = np.zeros((sum(len(part.b) for part in parts), ends[-1]), np.float32)
    row = 0
    for part, block in zip(parts, starts, strict=True):
        b[row:row + len(part.b), ends[block]:ends[block + 1]] = scaled(part.b, part.scale / scale)
        row += len(part.b)
    return Update(np.concatenate(blocks), b, scale)


def _real_rank(update: Update) -> int:
    """The rank without trailing parts whose both factors are zero."""
    used = np.any(update.a, axis=1) | np.any(update.b, axis=0)
    return int(np.max(np.nonzero(used)[0], initial=-1)) + 1


def _replaced(modules: Modules, overlay: FlatParams, where: Any) -> list[str]:
    """Names of the parameters that an expert has whole, or in part."""
    own = {path for path in overlay if not is_adapter_leaf(path)}
    found = modules.inside(lambda name: not own.isdisjoint(modules.parameters[name].paths))
    nameless = own - {path for name in found for path in modules.parameters[name].paths}
    if nameless:
        raise InputError(describe("Leaves of the expert are not in Hugging Face's network", where=where,
                                  got=", ".join(sorted(nameless))))
    return found


def _kept(expert: Expert, modules: Modules, updates: Mapping[str, Update], replaced: Sequence[str]
          ) -> tuple[dict[str, Any], dict[str, Update]] | None:
    """The settings that an expert came with, and its updates as they were; None if they describe another."""
    values = expert.card.training.get(FACTS)
    if not isinstance(values, dict):
        return None
    where = f"{expert.card.id}, training.{FACTS}"
    try:
        settings = lora_settings.parse(values, where)
        targeted = peft_adapters.targeted_modules(settings, modules, where, [f"{module}{FACTOR_A}"
                                                                             for module in updates])
        names = peft_adapters.replaced_parameters(settings, modules, targeted)
    except InputError:
        return None
    if set(names) != set(replaced) or not set(updates) <= set(targeted):
        return None
    found = {module: _as_it_was(settings, modules, module, updates.get(module)) for module in targeted}
    return None if None in found.values() else (dict(values), found)


def _as_it_was(settings: LoraSettings, modules: Modules, module: str, update: Update | None) -> Update | None:
    """An update in the rank and scale of given settings; None if it is not exactly that."""
    rank, scale = settings.rank(module), settings.scale(module)
    inner, outer = modules.parts(module)[0][1][0], sum(size[1] for _, size in modules.parts(module))
    if update is None:
        return Update(np.zeros((rank, inner), np.float32), np.zeros((outer, rank), np.float32), scale)
    ratio = scale / update.scale
    b = scaled(update.b, 1 / ratio)
    own = len(update.a)
    if own > rank or not np.array_equal(scaled(b, ratio), update.b):
        return None
    return Update(np.pad(update.a, ((0, rank - own), (0, 0))), np.pad(b, ((0, 0), (0, rank - own))), scale)


def _fresh(modules: Modules, updates: Mapping[str, Update], replaced: Sequence[str], where: Any,
           config: Any) -> dict[str, Any]:
    """An adapter_config.json made of an expert's updates and of the parameters that it replaces."""
    if not updates:
        raise InputError(describe("The expert's updates are all zero, which is no adapter",
                                  where=where))
    ranks = {module: len(update.a) for module, update in updates.items()}
    alphas = {module: peft_adapters.alpha_of(update.scale, ranks[module]) for module, update in
              updates.items()}
    rank, alpha = (collections.Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    bias, saved = _bias_and_saved(modules, updates, replaced, where)
    two_sided = families.network_of(config).batches == TWO_SIDED
    return {
        "peft_type": lora_settings.LORA, "task_type": _TASKS[two_sided], "inference_mode": True,
        "base_model_name_or_path": None, "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "rank_pattern": _pattern(ranks, rank), "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": short_names(list(updates), modules.names, _means_target),
        "modules_to_save": short_names(saved, modules.names, str.endswith) or None,
        "bias": bias, "fan_in_fan_out": any(map(modules.is_conv, updates)), "use_rslora": False,
        "use_dora": False, "init_lora_weights": True,
    }


def _means_target(module: str, word: str) -> bool:
    return module == word or module.endswith(f".{word}")


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Values by the module's name as a regular expression, where they are not the usual one."""
    return {module.replace(".", r"\."): value for module, value in values.items() if value != usual}


def _bias_and_saved(modules: Modules, updates: Collection[str], replaced: Sequence[str], where: Any
                    ) -> tuple[str, list[str]]:
    """PEFT's setting of biases, and the modules to save, for the parameters that an expert replaces."""
    weights = [name for name in replaced if name.removesuffix(WEIGHT) in updates]
    if weights:
        raise InputError(describe("PEFT has no place for a whole weight and an update of it", where=where,
                                  got=", ".join(weights)))
    every = [name for name in modules.parameters if name.endswith(BIAS)]
    updated = [name for name in every if name.removesuffix(BIAS) in updates]
    own = [name for name in updated if name in replaced]
    if not own:
        bias, rest = "none", replaced
    elif set(every) <= set(replaced):
        bias, rest = "all", [name for name in replaced if name not in every]
    elif own == updated:
        bias, rest = "lora_only", [name for name in replaced if name not in own]
    else:
        raise InputError(describe("PEFT trains all biases of updated modules, or none", where=where,
                                  got=f"{len(own)} of {len(updated)}: {', '.join(own)}"))
    return bias, list(dict.fromkeys(name.rpartition(".")[0] for name in rest))
