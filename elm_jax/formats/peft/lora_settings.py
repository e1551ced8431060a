"""Settings of a PEFT LoRA adapter: which modules it targets, with which rank and scale.

Source of the rules: PEFT 0.21, `LoraConfig`, `check_target_module_exists`, `get_pattern_key`,
`_set_trainable`. Everything else that PEFT's LoRA can be is refused by its name.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.formats.peft import expressions

LORA = "LORA"
ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "peft_type", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "fan_in_fan_out", "ensure_weight_tying",
}
"""Settings of training, of initialisation, or told by the base itself."""
_REFUSED = {
    "use_dora": "DoRA", "use_qalora": "QA-LoRA", "lora_bias": "a bias of the update (lora_bias)",
    "layer_replication": "layer replication", "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens", "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow", "megatron_config": "Megatron's parallel layers", "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA", "velora_config": "VeLoRA", "monteclora_config": "Monte Carlo LoRA",
}
"""Settings that change what an adapter computes or where it is, and their names for users."""
_STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")
"""Ways to initialise the factors that leave the base as it is."""
_WHOLE_EXPRESSIONS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Settings that are regular expressions themselves where they are strings."""
_EXPRESSIONS = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern")
"""Settings whose keys or items PEFT puts into regular expressions."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """What an adapter_config.json says about a LoRA adapter.

    Attributes:
        r: rank of an update.
        lora_alpha: scale times rank; with `use_rslora` times the rank's root.
        use_rslora: whether scales are rank-stabilised.
        rank_pattern: ranks by regular expression on a module's name.
        alpha_pattern: likewise alphas.
        target_modules: ends of names, a regular expression, or ``all-linear``; None for those in the file.
        exclude_modules: ends of names, or a regular expression.
        layers_to_transform: numbers of the layers that are targeted; None for all.
        layers_pattern: names in front of a layer's number.
        modules_to_save: ends of names of modules that the adapter replaces.
        bias: one of `BIASES`.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"

    def rank(self, module: str) -> int:
        """Rank of the update of a module."""
        return self._by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Factor of the update of a module."""
        alpha, rank = self._by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that fits; a name that is a key itself counts last, as in PEFT."""
        for pattern, value in patterns.items():
            if expressions.match(rf"(.*\.)?({pattern})$", module):
                return value
        return patterns.get(module, default)

    def targets(self, module: str, is_linear: bool) -> bool:
        """Whether a module gets an update.

        Args:
            module: its whole name.
            is_linear: whether it is a projection, as ``all-linear`` means them: not the head.
        """
        if self._excludes(module):
            return False
        wanted = self.target_modules
        if wanted is None:
            return False
        if isinstance(wanted, str):
            if wanted.lower() == ALL_LINEAR:
                return is_linear
            return expressions.fits(wanted, module)
        if module in wanted:
            return True
        return any(module.endswith(f".{name}") for name in wanted) and self._in_layers(module)

    def _excludes(self, module: str) -> bool:
        without = self.exclude_modules
        if isinstance(without, str):
            if expressions.fits(without, module):
                return True
        elif any(module == name or module.endswith(f".{name}") for name in without or ()):
            return True
        return any(expressions.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        forms = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for form in forms if (match := expressions.match(form, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform

    def saves(self, parameter: str) -> bool:
        """Whether a parameter is in a module of `modules_to_save`; PEFT compares ends of names, not words."""
        module = parameter
        while "." in module:
            module = module.rpartition(".")[0]
            if any(module.endswith(name) for name in self.modules_to_save):
                return True
        return False


def parse(values: Mapping[str, Any], where: Any) -> LoraSettings:
    """Parses an adapter_config.json of LoRA.

    Raises:
        InputError: another kind of adapter; settings that are not supported (all are named); values of a
            wrong type (all are named).
    """
    kind = values.get("peft_type")
    if kind != LORA:
        raise InputError(describe("Adapters of this kind are not supported", where=where, got=f"peft_type "
                                  f"{kind!r}", expected="'LORA' or 'IA3'"))
    refuse_unsupported(values, where)
    return LoraSettings(**checked(values, where, _CHECKS))


def checked(values: Mapping[str, Any], where: Any, checks: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are given, as values of this program.

    Args:
        values: of an adapter_config.json.
        where: for the error.
        checks: for each setting a function that gives its value here, or None for a wrong one.

    Raises:
        InputError: values of a wrong type; all are named.
    """
    found = {name: check(values[name]) for name, check in checks.items() if values.get(name) is not None}
    wrong = [f"{name} = {values[name]!r}"[:200] for name, value in found.items() if value is None]
    wrong += [f"{field} = {values[field]!r}"[:200] for field in _EXPRESSIONS
              if not all(map(_is_expression, found.get(field) or ()))]
    wrong += [f"{field} = {values[field]!r}"[:200] for field in _WHOLE_EXPRESSIONS
              if isinstance(found.get(field), str) and not _is_expression(found[field])]
    if wrong:
        raise InputError(describe("Settings of the adapter are wrong", where=where, got="; ".join(wrong)))
    return found


def refuse_unsupported(values: Mapping[str, Any], where: Any) -> None:
    """Raises InputError for settings that would change what an adapter computes; all are named."""
    faults = [f"{word}: {name} = {values[name]!r}"[:200] for name, word in _REFUSED.items()
              if values.get(name)]
    start = values.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        faults.append(f"a start that changes the base's weights when PEFT loads it: init_lora_weights = "
                      f"{start!r}"[:200])
    known = {*_IGNORED, *_REFUSED, *_CHECKS, "init_lora_weights"}
    raise_unsupported(faults + unknown_settings(values, known), where, "plain LoRA")


def unknown_settings(values: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Settings that are not known and are not empty, each as a sentence."""
    return [f"a setting that is not known here: {name} = {value!r}"[:200]
            for name, value in values.items() if name not in known and value]


def raise_unsupported(faults: Sequence[str], where: Any, expected: str) -> None:
    """Raises one InputError for all faults, if there are any."""
    if faults:
        raise InputError(describe("The adapter does what is not supported", where=where,
                                  got="; ".join(faults), expected=expected))


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _names(value: Any) -> tuple[str, ...] | None:
    names = [value] if isinstance(value, str) else value
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fine else None


def _numbers(value: Any) -> tuple[int, ...] | None:
    numbers = [value] if _is_count(value, 0) else value
    return tuple(numbers) if isinstance(numbers, list) and all(_is_count(n, 0) for n in numbers) else None


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _table(fits: Any) -> Any:
    return lambda value: value if isinstance(value, dict) and all(map(fits, value.values())) else None


MODULE_CHECKS: dict[str, Any] = {
    "target_modules": lambda value: value if isinstance(value, str) else _names(value),
    "exclude_modules": lambda value: value if isinstance(value, str) else _names(value),
    "modules_to_save": _names,
}
_CHECKS: dict[str, Any] = {
    **MODULE_CHECKS,
    "r": lambda value: value if _is_count(value) else None,
    "lora_alpha": lambda value: value if _is_number(value) else None,
    "use_rslora": lambda value: value if isinstance(value, bool) else None,
    "rank_pattern": _table(_is_count), "alpha_pattern": _table(_is_number),
    "layers_to_transform": _numbers, "layers_pattern": _names,
    "bias": lambda value: value if value in BIASES else None,
}
"""For each setting a function that gives its value here, or None for a wrong one."""
