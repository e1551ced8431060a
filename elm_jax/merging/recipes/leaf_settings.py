"""Settings of a merge that may differ from leaf to leaf.

A `Setting` is written in mergekit's manner:

* a number, boolean or string: the same for all leaves;
* a list of them: a gradient over the depth of a leaf in its own stack of layers, 0 for the first layer and
  1 for the last. Numbers are interpolated linearly between the points of the list, booleans and strings
  are picked (the entry ``floor(depth * (length - 1))``);
* ``{"value": ..., "filter": "self_attn"}`` or a list of such rules: the value for leaves whose name holds
  the filter's text; without a filter, or with ``"*"``, for all. The first rule that matches counts. If none
  does, the setting says nothing.

Source: https://github.com/arcee-ai/mergekit, "Merge Configuration".
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.merging.methods.parameter import Parameter

Setting = Any
"""A scalar, a gradient (list of scalars), a rule (mapping with value and filter), or a list of rules."""
_RULE_KEYS = ("value", "filter")
_KINDS = {"float": "a finite number", "int": "a whole number", "bool": "true or false", "choice": "a string"}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def resolve(setting: Setting, leaf: str, depth: float, kind: str, where: Any) -> Any:
    """Returns the value of a setting for one leaf.

    Args:
        setting: see the module's docstring.
        leaf: the leaf's name.
        depth: relative depth in its stack, from 0 to 1.
        kind: 'float', 'int', 'bool' or 'choice'.
        where: what messages call the setting.

    Returns:
        A value of that kind; None if no rule matches.

    Raises:
        InputError: a value of another type, or a number that is not finite.

    Example:
        >>> resolve([0.0, 1.0, 0.5], "encoder/layers_1/mlp/wo/kernel", 0.25, "float", "t")
        0.5
        >>> resolve({"value": 1, "filter": "norm"}, "lm_head", 0.0, "float", "t") is None
        True
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if is_scalar(setting):
        return convert(setting, kind, where)
    _check_list(setting, where)
    if all(is_scalar(entry) for entry in setting):
        return _gradient([convert(entry, kind, where) for entry in setting], depth, kind, where)
    for number, rule in enumerate(setting):
        place = f"{where}[{number}]" if len(setting) > 1 else where
        value, pattern = _rule(rule, place)
        if pattern in (None, "*") or pattern in leaf:
            return resolve(value, leaf, depth, kind, place)
    return None


def check_setting(setting: Setting, spec: Parameter, where: Any) -> None:
    """Raises InputError for a wrong type or range anywhere in a setting, whether a leaf matches or not."""
    for value, place in _every_value(setting, where):
        check_value(convert(value, spec.kind, place), spec, place)


def map_setting(setting: Setting, kind: str, where: Any, change: Callable[[Any], Any]) -> Setting:
    """Applies a function to each value of a setting; filters and form stay."""
    if is_scalar(setting):
        return change(convert(setting, kind, where))
    if isinstance(setting, Mapping):
        return {**setting, "value": map_setting(setting["value"], kind, where, change)}
    return [map_setting(entry, kind, where, change) for entry in setting]


def is_scalar(value: Any) -> bool:
    """Whether a setting is one plain value: the same for all leaves."""
    return isinstance(value, bool | np.bool_ | numbers.Real | str)


def _check_list(setting: Any, where: Any) -> None:
    if not isinstance(setting, list | tuple) or not setting:
        raise InputError(describe(
            "A setting has another form", where=where, got=in_short(setting),
            expected="a value, a list of values (a gradient over the layers), or value and filter"))


def _rule(rule: Any, where: Any) -> tuple[Setting, str | None]:
    """A rule's value and filter."""
    if not isinstance(rule, Mapping):
        raise InputError(describe("A list holds both plain values and rules", where=where,
                                  got=in_short(rule), expected="value and filter"))
    for key in rule:
        if key not in _RULE_KEYS:
            raise unknown_name("key of a rule", str(key), _RULE_KEYS, where=where)
    value, pattern = rule.get("value"), rule.get("filter")
    if not is_scalar(value):
        _check_list(value, f"{where}.value")
        if not all(is_scalar(entry) for entry in value):
            raise InputError(describe("Rules cannot be nested", where=f"{where}.value",
                                      got=in_short(value), expected="a value, or a list of values"))
    if pattern is not None and not (isinstance(pattern, str) and pattern):
        raise InputError(describe("A filter is a part of leaf names", where=f"{where}.filter",
                                  got=in_short(pattern), expected="a string, not empty; or '*' for all"))
    return value, pattern


def rules_of(setting: Setting) -> list[Mapping[str, Any]]:
    """The rules of a checked setting."""
    rules = [setting] if isinstance(setting, Mapping) else setting
    return [rule for rule in rules if isinstance(rule, Mapping)] if isinstance(rules, list | tuple) else []


def _every_value(setting: Setting, where: Any) -> list[tuple[Any, Any]]:
    """All scalars of a setting, each with its place."""
    if is_scalar(setting):
        return [(setting, where)]
    if isinstance(setting, Mapping):
        value, _ = _rule(setting, where)
        return _every_value(value, f"{where}.value")
    _check_list(setting, where)
    plain = all(is_scalar(entry) for entry in setting)
    found = []
    for number, entry in enumerate(setting):
        if not plain:
            _rule(entry, f"{where}[{number}]")
        found += _every_value(entry, f"{where}[{number}]")
    return found


def _gradient(values: list[Any], depth: float, kind: str, where: Any) -> Any:
    scaled = depth * (len(values) - 1)
    low = int(scaled)
    if kind in ("bool", "choice"):
        return values[low]
    part = scaled - low
    between = (1 - part) * values[low] + part * values[min(low + 1, len(values) - 1)]
    return convert(between, kind, where)


def convert(value: Any, kind: str, where: Any) -> Any:
    """Converts a value to a kind; strings that hold a number, such as YAML's ``1e-3``, become numbers."""
    try:
        converted = _CONVERTERS[kind](value)
    except (TypeError, ValueError, OverflowError):
        converted = None
    if converted is None:
        raise InputError(describe("A setting has the wrong type", where=where, got=in_short(value),
                                  expected=_KINDS[kind]))
    return converted


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool | np.bool_):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _to_int(value: Any) -> int | None:
    number = _to_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return _TRUTH.get(value.lower())
    return bool(value) if value in (0, 1) else None


def _to_choice(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_CONVERTERS = {"float": _to_float, "int": _to_int, "bool": _to_bool, "choice": _to_choice}


def check_value(value: Any, spec: Parameter, where: Any) -> None:
    """Raises InputError for a value of the right kind that is out of range."""
    if spec.kind == "choice" and spec.choices and value not in spec.choices:
        raise unknown_name(f"value of {spec.name}", value, spec.choices, where=where)
    if spec.kind in ("float", "int") and not spec.low <= value <= spec.high:
        words = [f"{word} {bound:g}" for word, bound in (("at least", spec.low), ("at most", spec.high))
                 if math.isfinite(bound)]
        raise InputError(describe(f"{spec.name} is out of range", where=where, got=value,
                                  expected=" and ".join(words)))
