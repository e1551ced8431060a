"""Prints results: tables for people, one JSON object for scripts."""

import json
import sys

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Prints a table without shortening names: folded in a terminal, on one line if a script reads it."""
    console = Console()
    for column in table.columns:
        column.overflow = "fold"
    if not console.is_terminal:
        unbounded = console.options.update(max_width=100_000)
        console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def print_json(value: object) -> None:
    """Prints one JSON object on one line of standard output."""
    json.dump(value, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
