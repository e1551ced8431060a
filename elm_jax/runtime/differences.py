"""Names the settings in which two runs differ, each with both values, for messages."""

import json
from collections.abc import Mapping
from typing import Any

from elm_jax.errors import in_short


def as_json(value: Any) -> Any:
    """Returns a value as JSON reads it back: tuples as lists, objects as their text."""
    return json.loads(json.dumps(value, default=str))


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names each setting that differs, with the value that was saved and the one that is wanted.

    Args:
        saved: JSON values by name, as a file holds them; objects are compared by their own names.
        wanted: those of the present run.

    Example:
        >>> differences({"optimizer": {"learning_rate": 0.1}}, {"optimizer": {"learning_rate": 0.2}})
        ['optimizer.learning_rate: 0.1 there, 0.2 here']
    """
    before, now = _flat(as_json(saved)), _flat(as_json(wanted))
    return [f"{name}: {_word(before, name)} there, {_word(now, name)} here"
            for name in dict.fromkeys([*before, *now]) if before.get(name, _NONE) != now.get(name, _NONE)]


_NONE = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {
            f"{prefix}{name}": value}
    return found


def _word(values: Mapping[str, Any], name: str) -> str:
    return in_short(values[name]) if name in values else "not set"
