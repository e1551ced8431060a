"""The verb `elm report`: reads flags, calls one workflow, prints its result."""

import argparse

from rich.console import Console

from elm_jax.cli.printing import print_lines
from elm_jax.reporting import results_report, router_loads
from elm_jax.reporting import study_report as reporting
from elm_jax.reporting.arms import arms_report
from elm_jax.reporting.page_parts import Made
from elm_jax.workflows.study import old_study


def report(arguments: argparse.Namespace) -> None:
    """Runs `elm report`: of a study's folder its report, of runs that of routers, of other results theirs."""
    if arms_report.is_arms(arguments.results):
        outcome = arms_report.write_arms_report(arguments.results, made=Made(arguments.command))
        outcome.print_table(Console())
        print_lines(f"report: {outcome.report_path}")
        return
    write = results_report.write_results_report
    if reporting.is_study(arguments.results):
        write = reporting.write_report
        old_study.add_comparison(arguments.results)
    elif router_loads.runs_in(arguments.results):
        write = router_loads.write_loads_report
    outcome = write(arguments.results, made=Made(arguments.command), experts=arguments.experts)
    outcome.print_table(Console())
    print_lines(f"report: {outcome.report_path}")
