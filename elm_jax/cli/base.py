"""The verbs `elm base ...`: read flags, call one workflow, print its result."""

import argparse

from rich.table import Table

from elm_jax.cli.printing import print_json, print_table
from elm_jax.workflows.convert import convert_model
from elm_jax.workflows.get_base import get_base, list_bases


def base_get(arguments: argparse.Namespace) -> None:
    """Runs `elm base get`: prints what was written, or the whole report as JSON."""
    report = get_base(arguments.name, arguments.target or f"bases/{arguments.name}")
    if arguments.json:
        print_json(report)
    else:
        print("\n".join(convert_model.summary(report)))


def base_list(arguments: argparse.Namespace) -> None:
    """Runs `elm base list`: a table, or one JSON object."""
    bases = list_bases()
    if arguments.json:
        print_json({"bases": bases})
        return
    table = Table("base", "what it is", "installed file, or how to install it")
    for base in bases:
        table.add_row(base["name"], base["about"], base["file"] or base["install"])
    print_table(table)
