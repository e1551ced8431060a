"""The verb `elm route`: reads flags, calls one workflow, prints its result."""

import argparse

from elm_jax.cli.printing import Column, print_json, print_table
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
    columns = (Column("rank", kind="number"), Column("expert"), Column("votes", 1, "number"),
               Column("similarity", 2, "number", "{:.3f}".format), Column("chosen", 3))
    print_table(
        columns, [(rank, row.expert, row.votes, row.mean_similarity, rank <= arguments.top_k)
                  for rank, row in enumerate(decision.ranking, start=1)], wide=arguments.wide,
        title=f"{decision.num_queries} queries, {decision.text_format}, {decision.encoder}")
