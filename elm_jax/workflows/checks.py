"""Checks of config values that every workflow shares."""

from collections.abc import Iterable

from elm_jax.errors import InputError, describe, unknown_name


def check_positive(**values: int | float | None) -> None:
    """Raises InputError for the first value that is not a number above zero (None passes)."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(describe("Config value has the wrong type", where=name, got=repr(value),
                                      expected="a number"))
        if value <= 0:
            raise InputError(describe("Config value is out of range", where=name, got=value,
                                      expected="a number above 0"))


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError, naming the nearest choices, if `value` is none of them."""
    if value not in set(choices):
        raise unknown_name(name, value, choices)
