"""Chooses names by patterns: a glob, or a part of the name."""

import fnmatch
from collections.abc import Iterable, Sequence

from elm_jax.errors import unknown_name

GLOB = frozenset("*?[")


def chosen(kind: str, patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that fit one of the patterns, in their order; all of them if there is no pattern.

    Args:
        kind: of what is named, for the message.
        patterns: globs such as ``ag_*``, or parts of names such as ``news``.
        names: to choose from.

    Raises:
        InputError: a pattern fits no name.
    """
    names = list(names)
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise unknown_name(kind, pattern, names)
    return [name for name in names if not patterns or any(_fits(name, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if GLOB & set(pattern) else pattern in name
