"""Reads hand-written YAML files strictly; every message names the place of the value."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.runtime import storage


@dataclasses.dataclass(frozen=True)
class YamlFile:
    """A YAML file's name, and checks of its values that name their place.

    A place is written as in ``models[0].parameters.weight``; the empty one is the whole file.
    """

    path: str

    def at(self, place: str) -> str:
        """Formats a place for messages."""
        return f"{self.path}: {place}" if place else self.path

    def error(self, what: str, place: str, got: Any, expected: Any = None,
              cure: str | None = None) -> InputError:
        """Makes the error for a value; long and nested values are shortened."""
        got = got if isinstance(got, str) else "nothing" if got is None else in_short(got)
        return InputError(describe(what, where=self.at(place), got=got, expected=expected, cure=cure))

    def mapping(self, value: Any, place: str, empty: bool = False) -> Mapping[str, Any]:
        """Returns the value if it is a mapping; with `empty`, None counts as an empty one."""
        if value is None and empty:
            return {}
        if not isinstance(value, Mapping):
            raise self.error("A mapping is missing", place, value, "keys and values")
        return value

    def keys(self, value: Any, known: Sequence[str], place: str, what: str) -> None:
        """Raises InputError unless the value is a mapping with these keys only."""
        for key in self.mapping(value, place):
            if key not in known:
                raise unknown_name(what, str(key), known, where=self.at(place))

    def entries(self, value: Any, place: str) -> list[Any]:
        """Returns the value if it is a non-empty list."""
        if not isinstance(value, list) or not value:
            raise self.error("A list is missing", place, value, "one entry or more, each after a dash")
        return value


def read_yaml(path: storage.PathLike, what: str, largest: int, known: Sequence[str] = ()
              ) -> tuple[dict[str, Any], str]:
    """Reads a mapping from a YAML file.

    Args:
        path: the file.
        what: how messages name it, such as "merge config".
        largest: most bytes.
        known: keys of the mapping. Another one is left out if merge keys (``<<``) take what it holds: it is
            there for them alone.

    Returns:
        The mapping, and the file's text.

    Raises:
        InputError: no such file, too large, not UTF-8, not YAML, a key written twice, or no mapping.
    """
    content = storage.read_bytes(storage.require_file(path))
    if len(content) > largest:
        raise InputError(describe(f"The {what} is too large", where=path, got=f"{len(content)} bytes",
                                  expected=f"at most {largest}"))
    try:
        text = content.decode("utf-8-sig")
        loader = _StrictLoader(text)
        value = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise InputError(describe(f"The {what} is not valid YAML", where=path, got=_problem(error),
                                  expected="one document, in UTF-8")) from error
    if not isinstance(value, dict):
        raise InputError(describe(f"The {what} has another form", where=path, got=in_short(value),
                                  expected="a mapping"))
    return {key: entry for key, entry in value.items() if key in known or key not in loader.holders()}, text


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses repeated keys, and keys that are no plain words.

    Keys that a merge key (``<<``) brings are no repetition: those that are written beside it count.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._root: yaml.MappingNode | None = None
        self._merged: list[yaml.Node] = []

    def holders(self) -> set[str]:
        """Keys of the whole document whose values were taken by merge keys."""
        merged = {id(node) for node in self._merged}
        return {key.value for key, value in self._root.value if id(value) in merged} if self._root else set()

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Checks the keys as they are written, before those of merge keys are among them."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        self._root = node  # in the end the outermost
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts keys of merge keys in front of a mapping's own, each key once.

        Otherwise a short file of aliases would become a list of a billion keys.
        """
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                self._merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        super().flatten_mapping(node)
        node.value = list({key.value: (key, value) for key, value in node.value}.values())


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
