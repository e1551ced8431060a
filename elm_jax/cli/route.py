"""The verb `elm route`: reads flags, calls one workflow, prints its result."""

import argparse

from rich.table import Table

from elm_jax.cli.printing import print_json, print_table
from elm_jax.cli.registries import modules_of
from elm_jax.workflows.route import RouteConfig, route_task


def route(arguments: argparse.Namespace) -> None:
    """Runs `elm route`."""
    decision = route_task(RouteConfig(
        library=arguments.library, task=arguments.task, examples=arguments.examples, split=arguments.split,
        num_queries=arguments.queries, encoder_dir=arguments.encoder_dir, seed=arguments.seed,
        modules=modules_of(arguments), prepared_dir=arguments.prepared))
    if arguments.json:
        print_json(decision.to_dict())
        return
    table = Table("rank", "expert", "votes", "similarity",
                  title=f"{decision.num_queries} queries, {decision.text_format}, {decision.encoder}")
    for rank, row in enumerate(decision.ranking, start=1):
        style = "bold" if rank <= arguments.top_k else None
        table.add_row(str(rank), row.expert, str(row.votes), f"{row.mean_similarity:.3f}", style=style)
    print_table(table)
