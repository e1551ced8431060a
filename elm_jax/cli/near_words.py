"""A parser of flags that names the nearest verbs, choices and flags in place of an unknown one."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from elm_jax.errors import nearest_names, spelled_out

WHOLE_LIST = 8
"""Choices up to so many are all named in an error."""


class NearParser(argparse.ArgumentParser):
    """Like argparse's parser; an unknown verb, choice or flag is told with the nearest known ones.

    Attributes:
        more_help: given the words of the command line, what stands between the flags and the example in its
            help; None for nothing.
    """

    more_help: Callable[[Sequence[str]], str] | None = None
    _words: Sequence[str] = ()

    def parse_known_args(self, args: Sequence[str] | None = None,
                         namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        """Parses as argparse does, and keeps the words for the help."""
        self._words = list(args or ())
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Formats the help, with what `more_help` adds."""
        text = super().format_help()
        if self.more_help is None:
            return text
        flags, example = text.split("\nexample:\n", 1)
        return f"{flags}\n{spelled_out(self.more_help(self._words))}\nexample:\n{example}"

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
