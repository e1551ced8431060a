"""The verbs `elm base ...`: read flags, call one workflow, print its result."""

import argparse

from elm_jax.cli.printing import Column, print_json, print_lines, print_table
from elm_jax.workflows.convert import convert_model
from elm_jax.workflows.get_base import get_base, list_bases


def base_get(arguments: argparse.Namespace) -> None:
    """Runs `elm base get`: prints what was written, or the whole report as JSON."""
    report = get_base(arguments.name, arguments.target or f"bases/{arguments.name}")
    if arguments.json:
        print_json(report)
    else:
        print_lines(*convert_model.summary(report))


def base_list(arguments: argparse.Namespace) -> None:
    """Runs `elm base list`: a table, or one JSON object."""
    bases = list_bases()
    if arguments.json:
        print_json({"bases": bases})
        return
    columns = (Column("base"), Column("what it is", 1, "text"), Column("installed"),
               Column("file, or how to install it", 2, "text"))
    print_table(columns, [(base["name"], base["about"], base["file"] is not None,
                           base["file"] or base["install"]) for base in bases], wide=arguments.wide)
