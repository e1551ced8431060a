"""What `elm report` does: read flags, call one workflow, print its result."""

import argparse

from rich.console import Console

from elm_jax.reporting import study_report as reporting


def report(arguments: argparse.Namespace) -> None:
    """`elm report`."""
    outcome = reporting.write_report(arguments.results)
    outcome.print_table(Console())
    print(f"report: {outcome.report_path}")
