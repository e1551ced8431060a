"""A parser of flags that names the nearest verbs, choices and flags in place of an unknown one."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from elm_jax.errors import nearest_names

WHOLE_LIST = 8
"""Choices up to so many are all named in an error."""


class NearParser(argparse.ArgumentParser):
    """Like argparse's parser; an unknown verb, choice or flag is told with the nearest known ones."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = list(map(str, action.choices))
        shown = names if len(names) <= WHOLE_LIST else nearest_names(str(value), names)
        words = "one of" if len(names) <= WHOLE_LIST else f"one of {len(names)}; nearest:"
        what = (action.metavar or action.dest).lower()
        raise argparse.ArgumentError(
            None, f"unknown {what} {str(value)!r}: expected {words} {', '.join(shown)}")

    def parse_args(self, args: Sequence[str] | None = None,
                   namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Parses as argparse does; unknown flags are an error (exit status 2) that names the nearest."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self._refuse(rest, getattr(found, "parser", self))
        return found

    def _refuse(self, rest: Sequence[str], verb: "NearParser") -> NoReturn:
        flags = [flag for flag in verb._option_string_actions if flag.startswith("--")]
        wrong = rest[0].split("=")[0]
        near = f"; nearest flags: {', '.join(nearest_names(wrong, flags))}" if wrong.startswith("-") else ""
        verb.error(f"unrecognized arguments: {' '.join(rest)}{near}")
