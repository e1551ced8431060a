"""Checks of config values, shared by all workflows."""

import dataclasses
import functools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from elm_jax.errors import InputError, describe, in_short, unknown_name

DEFAULT_MODULES = ("elm_jax.tasks", "elm_jax.tasks.embedded")
"""Registries that verbs and Python import where none is named; kept here, where flags find it quickly."""
PathLike = str | os.PathLike
"""A folder or file in a config; `check_types` replaces path objects by their text."""


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


def check_range(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """Raises InputError if `value` is not in [least, below) (None passes)."""
    if value is not None and not least <= value < below:
        expected = f"at least {least}" if below == math.inf else f"from {least} to below {below}"
        raise InputError(describe("Config value is out of range", where=name, got=value, expected=expected))


def check_types(config: Any) -> None:
    """Raises InputError for the first field of a config dataclass whose value is not of its declared type.

    Gin checks no types: ``'False'`` would be true, ``8.5`` rows would fail after the first epoch.
    A path object in a field that takes one is replaced by its text: digests and files stay those of a string.
    A text or path where several are asked for is replaced by a tuple of it (see `items_of`).
    """
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if _takes_several_texts(hint):
            value = items_of(value)
            object.__setattr__(config, name, value)
        if _takes_paths(hint):
            value = _as_text(value)
            object.__setattr__(config, name, value)
        if not _fits(value, hint):
            raise InputError(describe(
                "Config value has the wrong type", where=f"{type(config).__name__}.{name}",
                got=repr(value), expected=in_words(hint)))


def items_of(values: Any) -> Any:
    """Returns the values where several are asked for; a text or path alone is one of them, not its letters.

    >>> items_of("a name"), items_of(["a", "b"]), items_of(None)
    (('a name',), ['a', 'b'], None)
    """
    return (values,) if isinstance(values, str | os.PathLike) else values


def check_characters(text: str, where: Any) -> None:
    """Raises InputError if a text holds half of a surrogate pair, which is no character: it has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(describe(
            "A text holds half of a surrogate pair, which is no character", where=where,
            got=repr(text[max(0, error.start - 20):error.start + 20]), expected="whole characters",
            cure="replace it, by \\ufffd say")) from error


def _takes_several_texts(hint: Any) -> bool:
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    items = [typing.get_args(member)[0] for member in members if typing.get_origin(member) is tuple]
    return str not in members and any(item is str or _takes_paths(item) for item in items)


def _takes_paths(hint: Any) -> bool:
    return hint is os.PathLike or any(map(_takes_paths, typing.get_args(hint)))


def _as_text(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_as_text, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fits(value: Any, hint: Any) -> bool:
    return misfit(value, hint) is None


ABSENT = "no such field"


@dataclasses.dataclass(frozen=True)
class Misfit:
    """Where a value departs from a type.

    Attributes:
        place: names and numbers of what holds the part that is wrong, from the outside.
        got: the part in words.
        expected: its type in words.
    """

    place: tuple[str | int, ...]
    got: str
    expected: str

    def inside(self, key: Any) -> "Misfit":
        """The same, seen from one level further out."""
        return dataclasses.replace(self, place=(key, *self.place))


def misfit(value: Any, hint: Any) -> Misfit | None:
    """Finds where a value first departs from a type; None if it fits.

    A tuple fits a list and the other way round, as gin files and JSON write either. An object of JSON fits a
    dataclass if it has its fields that have no default; others are passed over.
    """
    if hint is Any or (type(value) is hint and hint in (str, bool)):
        return None
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(value) in arguments and not isinstance(value, int | float):
            return None
        found = [misfit(value, member) for member in arguments]
        if None in found:
            return None
        # Of `list[int] | None` it is the list's entry that is wrong in [1, "x"].
        return next((each for each in found if each.place), _wrong(value, hint))
    if arguments and origin in (tuple, list) and isinstance(value, tuple | list):
        return _first(enumerate(value), arguments[0])
    if arguments and origin is dict and isinstance(value, dict):
        if all(_fits(key, arguments[0]) for key in value):
            return _first(value.items(), arguments[1])
        return _wrong(value, hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _record_misfit(value, hint)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return None if -sys.float_info.max <= value <= sys.float_info.max else _wrong(value, hint)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return None if -2**63 <= value < 2**63 else _wrong(value, hint)
    fits = not arguments and hint not in (int, float) and isinstance(value, hint)
    return None if fits else _wrong(value, hint)


def _wrong(value: Any, hint: Any) -> Misfit:
    return Misfit((), in_short(value), in_words(hint))


def _first(items: Iterable[tuple[Any, Any]], hint: Any) -> Misfit | None:
    for key, item in items:
        found = misfit(item, hint)
        if found is not None:
            return found.inside(key)
    return None


def _record_misfit(value: dict[str, Any], record: type) -> Misfit | None:
    for name, hint, required, plain in _fields_of(record):
        if name in value:
            part = value[name]
            if type(part) in plain and _in_range(part):
                continue  # as nearly always, in files of a hundred thousand lines
            found = misfit(part, hint)
            if found is not None:
                return found.inside(name)
        elif required:
            return Misfit((name,), ABSENT, in_words(hint))
    return None


def _in_range(value: Any) -> bool:
    """Whether a value of a plain type is no number, or one of 64 bits."""
    return not isinstance(value, int | float) or (
        -2**63 <= value < 2**63 if isinstance(value, int)
        else -sys.float_info.max <= value <= sys.float_info.max)


@functools.cache
def _fields_of(record: type) -> tuple[tuple[str, Any, bool, frozenset[type]], ...]:
    """Name and type of each field of a dataclass, whether it has no default, and plain types that fit."""
    hints, found = hints_of(record), []
    for field in dataclasses.fields(record):
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = {member for member in members if member in (str, int, float, bool, types.NoneType)}
        found.append((field.name, hint, field.default is field.default_factory is dataclasses.MISSING,
                      frozenset(plain | ({int} if float in plain else set()))))
    return tuple(found)


@functools.cache
def hints_of(record: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return typing.get_type_hints(record)


_WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string in quotes",
          type(None): "None", Any: "anything"}


def in_words(hint: Any) -> str:
    """Says a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(member) for member in arguments if member is not os.PathLike)
    if origin is tuple:
        return f"a tuple, each item {in_words(arguments[0])}"
    if origin is list:
        return f"a list, each item {in_words(arguments[0])}"
    if origin is dict:
        return f"a dictionary, each key {in_words(arguments[0])}, each value {in_words(arguments[1])}"
    return _WORDS.get(hint) or f"@{hint.__name__}()"


LARGEST_DIMENSION = 2**24
"""A config with larger values is damaged, and refused before a network is built."""


def check_dimension(where: str, value: object, largest: int = LARGEST_DIMENSION) -> None:
    """Raises InputError if `value` is not a whole number from 1 to `largest`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise InputError(
            describe("A dimension is wrong", where=where, got=repr(value)[:200],
                     expected=f"a whole number from 1 to {largest}")
        )


def in_their_words(error: Exception, names: Mapping[str, str]) -> str:
    """Says ``: FIELD`` as a foreign file calls the field of a config that an error names; else nothing.

    Args:
        error: whose text has ``...Config.<field>``.
        names: in the file, by the config's fields.
    """
    found = re.search(r"Config\.(\w+)", str(error))
    return f": {names[found[1]]}" if found and found[1] in names else ""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError, naming the nearest choices, if `value` is none of them."""
    if value not in set(choices):
        raise unknown_name(name, value, choices)
