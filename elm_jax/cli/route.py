"""What `elm route` does: read flags, call one workflow, print its result."""

import argparse
from typing import Any

from rich.table import Table

from elm_jax.cli.printing import print_json, print_table
from elm_jax.cli.registries import modules_of
from elm_jax.experts.library import ExpertLibrary
from elm_jax.routing.encoders import MiniLMEncoder
from elm_jax.workflows import route as routing
from elm_jax.workflows.tasks import show_tasks as task_tools


def route(arguments: argparse.Namespace) -> None:
    """`elm route`."""
    encoder = MiniLMEncoder.from_folder(arguments.encoder_dir) if arguments.encoder_dir else None
    library = ExpertLibrary.open(arguments.library, encoder)
    decision = _decide(library, arguments)
    if arguments.json:
        print_json(decision.to_dict())
        return
    table = Table("rank", "expert", "votes", "similarity",
                  title=f"{decision.num_queries} queries, {decision.text_format}, {decision.encoder}")
    for rank, row in enumerate(decision.ranking, start=1):
        style = "bold" if rank <= arguments.top_k else None
        table.add_row(str(rank), row.expert, str(row.votes), f"{row.mean_similarity:.3f}", style=style)
    print_table(table)


def _decide(library: ExpertLibrary, arguments: argparse.Namespace) -> Any:
    if getattr(arguments, "examples", None):
        instances = routing.read_examples(arguments.examples)
    else:
        instances = task_tools.routing_instances(
            arguments.task, getattr(arguments, "split", "validation"), arguments.queries,
            modules=modules_of(arguments), prepared_dir=arguments.prepared,
            seed=arguments.seed if arguments.verb == "route" else 0,  # a merge's own seed is of its masks
            keys={row["source"] for row in library.instances})
    return routing.route(library, instances, num_queries=arguments.queries)
