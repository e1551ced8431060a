"""Prints results: tables for people, tab-separated lines or one JSON object for scripts."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from elm_jax.runtime import hosts
from elm_jax.runtime.terminal.text_tables import Column, document, separated, shortened, visible, wrapped

__all__ = ["Column", "print_document", "print_json", "print_lines", "print_sentences", "print_table", "say",
           "shortened", "terminal_width", "visible"]


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[Any]], *, wide: bool = False,
                title: str = "", notes: Iterable[str] = ()) -> None:
    r"""Prints a table: fitted to a terminal, as tab-separated lines where a script reads it.

    On a terminal every name is whole and on one line; columns of higher rank go where the width does not do
    for all, and a note names them. Elsewhere there is one line of headings and one line a row, with all
    columns, and the title and the notes go to standard error. Nothing in a cell acts on a terminal: control
    codes are written out (`visible`).

    Args:
        columns: of the table.
        rows: values of each column.
        wide: whether a terminal gets all columns too, each row on one line.
        title: stands above the table.
        notes: sentences below it.
    """
    rows = list(rows)
    if sys.stdout.isatty():
        print_document(columns, rows, wide=wide, title=title, notes=notes)
        return
    say(*([title] if title else []))
    print("\n".join(separated(columns, rows)))
    say(*notes)


def print_document(columns: Sequence[Column], rows: Sequence[Sequence[Any]], *, wide: bool = False,
                   title: str = "", notes: Iterable[str] = ()) -> None:
    """Prints a table of a report for people: fitted to a terminal, with all columns elsewhere."""
    print("\n".join(document(columns, rows, None if wide else terminal_width(), title=title)))
    print_sentences(*notes)


def print_sentences(*sentences: str) -> None:
    """Prints sentences of a report on standard output, broken between words at a terminal's width."""
    for sentence in sentences:
        for line in visible(sentence, keep="\n").split("\n"):
            print("\n".join(wrapped(line, terminal_width())))


def print_lines(*lines: str) -> None:
    """Prints what a verb did on standard output, a line each, never broken: paths stay whole."""
    for line in lines:
        print(visible(line))


def say(*sentences: str) -> None:
    """Prints sentences beside a table, once a run: on standard error where a script reads standard output."""
    if not hosts.is_first():
        return
    with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else sys.stderr):
        print_sentences(*sentences)


def terminal_width() -> int | None:
    """Characters of a line of the terminal (`COLUMNS`, if it is set); None if standard output is none."""
    return max(shutil.get_terminal_size().columns, 1) if sys.stdout.isatty() else None


def print_json(value: object) -> None:
    """Prints one JSON object on one line of standard output."""
    json.dump(value, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
