"""The verb `elm evaluate`: reads flags, calls one workflow, prints its result."""

import argparse

from rich.table import Table

from elm_jax.cli.printing import print_table
from elm_jax.cli.registries import modules_of
from elm_jax.workflows.evaluate.evaluate_folders import EvaluateConfig, evaluate_folders
from elm_jax.workflows.train import run_record

FIELDS = ("base", "output", "split", "max_rows", "source_length", "max_new_tokens", "few_shot",
          "choice_score", "stack_experts", "mesh_data", "mesh_model", "mesh_experts", "mixed", "library",
          "assignment", "trunk_cache", "trunk_cache_bytes")
"""Flags that are fields of the config."""


def evaluate(arguments: argparse.Namespace) -> None:
    """Runs `elm evaluate`: appends rows to results.jsonl and does not score again what is already there."""
    counter = run_record.CompileCounter()
    store = evaluate_folders(EvaluateConfig(
        tasks=tuple(arguments.task), experts=tuple(arguments.expert), modules=modules_of(arguments),
        prepared_dir=arguments.prepared, expert_id=arguments.id,
        **{name: getattr(arguments, name) for name in FIELDS}))
    table = Table("expert", "task", "metric", "value", "95% interval", "rows", "of at most", "cut inputs")
    for row in store.rows():
        interval = f"{100 * row['ci95_low']:.1f} to {100 * row['ci95_high']:.1f}"
        score = row.get("choice_score", "sum")
        metric = row["metric"] if score == "sum" else f"{row['metric']} ({score} of choices)"
        table.add_row(row["expert"], row["task"], metric, f"{100 * row['value']:.2f}", interval,
                      str(row["num_instances"]), str(row["max_rows"] or "all"), str(row.get("num_cut", "–")))
    print_table(table)
    counter.log()
