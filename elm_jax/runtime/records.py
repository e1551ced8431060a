"""Reads records, JSON objects in files and lines, and checks them by a dataclass before anyone uses them.

The dataclass is the schema: its types, and as optional what has a default. A field that it does not name is
passed over: newer versions of the program may have written it. What is read stays a dictionary, which is
written again as it was.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import ABSENT, misfit

_JSON_WORDS = {"a string in quotes": "a text", "None": "null", "True or False": "true or false",
               "a tuple": "a list", "a dictionary": "an object", "each key a text, each value": "each value"}


def read_record(path: storage.PathLike, schema: type, *, kind: str, schema_version: int | None = 1
                ) -> dict[str, Any]:
    """Reads a JSON object and checks its fields.

    Args:
        path: of the file.
        schema: a dataclass.
        kind: what it is, for errors.
        schema_version: that it must have; None for an object without one.

    Raises:
        InputError: the file is missing or is not a JSON object, has another schema version, or a field is
            missing or of another type.
    """
    value = storage.read_json(path, kind=kind, schema_version=schema_version)
    return check_record(value, schema, kind=kind, where=path)


def read_records(path: storage.PathLike, schema: type, *, kind: str, size: int | None = None
                 ) -> list[dict[str, Any]]:
    """Reads JSON lines, or `size` bytes of them, as `storage.read_jsonl` does; checks each by a dataclass.

    Raises:
        InputError: a line is not a JSON object, or a field is missing or of another type.
    """
    rows, name = storage.read_jsonl(path, size), str(path)
    for number, row in enumerate(rows, start=1):
        check_record(row, schema, kind=kind, where=f"{name}, line {number}")
    return rows


def check_record(value: dict[str, Any], schema: type, *, kind: str, where: Any) -> dict[str, Any]:
    """Returns a JSON object if it fits a dataclass.

    Raises:
        InputError: names the field that is missing or wrong.
    """
    found = misfit(value, schema)
    if found is None:
        return value
    raise wrong_field(f"A field of the {kind} is {'missing' if found.got == ABSENT else 'wrong'}", where,
                      found.place, found.got, in_json_words(found.expected))


def build(config: Callable[..., Any], facts: Any, where: Any) -> Any:
    """Makes a config of the facts in a file.

    Args:
        config: its dataclass, which checks the values itself.
        facts: by the names of its fields.
        where: file and field, for errors.

    Raises:
        InputError: no object, unknown or missing names, or values that the config refuses; all with `where`.
    """
    if not isinstance(facts, dict):
        raise wrong_field("A config in a file is not an object", where, (), in_short(facts), "an object")
    fields = {field.name: field for field in dataclasses.fields(config)}
    unknown = sorted(facts.keys() - fields.keys())
    missing = [name for name, field in fields.items() if name not in facts
               and field.default is field.default_factory is dataclasses.MISSING]
    if unknown or missing:
        raise InputError(describe("A config in a file is not valid", where=where,
                                  got=f"unknown {unknown}, missing {missing}"[:500],
                                  expected=", ".join(fields)))
    try:
        return config(**facts)
    except InputError as error:
        raise InputError(describe("A config in a file is not valid", where=where, got=error)) from error


def wrong_field(what: str, where: Any, place: tuple[str | int, ...], got: str, expected: str) -> InputError:
    """The error for a field of a JSON file, whose place is names and numbers from the outside."""
    inside = f": {'/'.join(map(str, place))}" if place else ""
    return InputError(describe(what, where=f"{where}{inside}", got=got,
                               expected=expected, cure="the file is damaged: fetch or write it again"))


def in_json_words(words: str) -> str:
    """The words for a type as JSON calls it."""
    words = re.sub(r"@\w+\(\)", "an object", words)
    for ours, theirs in _JSON_WORDS.items():
        words = words.replace(ours, theirs)
    return words
