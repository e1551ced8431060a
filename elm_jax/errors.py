"""Errors for users: what is wrong, where, the value found, the value expected, and the cure.

`InputError` (exit status 2) is for a wrong command line, config or input; `RunError` (exit status 1)
for a run that failed although its input was right. The command line prints both without a traceback.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
LOST_PROCESS = 75
"""Exit status of a run that lost one of its processes: sysexits.h's EX_TEMPFAIL, worth a restart."""


class ElmError(Exception):
    """Base of all errors that elm_jax raises on purpose."""

    exit_status = 1


class InputError(ElmError):
    """The command line, the config or an input file is wrong."""

    exit_status = 2


class RunError(ElmError):
    """The run failed: a loss that is not finite, a full disk, a lost process."""

    exit_status = 1


def describe(
    what: str, *, where: Any = None, got: Any = None, expected: Any = None, cure: str | None = None
) -> str:
    """Formats one error message.

    Args:
        what: the rule that was broken, a full sentence without its full stop.
        where: file, line, leaf or argument.
        got: the value that was found.
        expected: the value, or the rule, that was expected.
        cure: what the reader can do about it.

    Returns:
        One line per part that is given: ``what``, then ``where``, ``got``, ``expected`` and ``cure``.
    """
    lines = [what]
    for label, value in (("where", where), ("got", got), ("expected", expected), ("cure", cure)):
        if value is not None:
            lines.append(f"  {label}: {value}")
    return spelled_out("\n".join(lines))


def spelled_out(text: str) -> str:
    """Returns a text with the signs that a terminal obeys, or that turn a line's direction, spelled out.

    >>> spelled_out("a \x1b[31mred name")
    'a \\\\x1b[31mred name'
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_short(value: Any) -> str:
    """Returns the value's repr, cut to a line or two."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    return short.repr(value)


def nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Returns the `count` names most like `name`, nearest first (difflib's ratio, then the alphabet)."""

    def distance(other: str) -> tuple[float, str]:
        return -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio(), other

    return sorted(names, key=distance)[:count]


def unknown_name(kind: str, name: str, names: Iterable[str], where: Any = None,
                 cure: str | None = None) -> InputError:
    """Makes the error for a name that does not exist, with the three nearest names that do."""
    names, name = list(names), name[:200]
    near = nearest_names(name, names)
    return InputError(
        describe(
            f"Unknown {kind} {name!r}",
            where=where,
            expected=f"one of {len(names)} known names; nearest: {', '.join(near)}" if near
            else f"a known name, but no {kind} is known at all",
            cure=cure,
        )
    )
