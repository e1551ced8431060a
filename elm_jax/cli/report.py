"""The verb `elm report`: reads flags, calls one workflow, prints its result."""

import argparse

from rich.console import Console

from elm_jax.reporting import study_report as reporting


def report(arguments: argparse.Namespace) -> None:
    """Runs `elm report`."""
    outcome = reporting.write_report(arguments.results)
    outcome.print_table(Console())
    print(f"report: {outcome.report_path}")
