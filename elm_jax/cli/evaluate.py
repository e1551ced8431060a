"""The verb `elm evaluate`: reads flags, calls one workflow, prints its result."""

import argparse

from rich.table import Table

from elm_jax.cli.printing import print_table
from elm_jax.cli.registries import modules_of
from elm_jax.workflows.evaluate.evaluate_folders import EvaluateConfig, evaluate_rows
from elm_jax.workflows.train import run_record

FIELDS = ("base", "output", "split", "max_rows", "source_length", "max_new_tokens", "few_shot",
          "choice_score", "stack_experts", "mesh_data", "mesh_model", "mesh_experts", "mixed", "library",
          "assignment", "trunk_cache", "trunk_cache_bytes")
"""Flags that are fields of the config."""


def evaluate(arguments: argparse.Namespace) -> None:
    """Runs `elm evaluate`: appends rows to results.jsonl, does not score again what is already there, and
    prints the rows of these models on these tasks.
    """
    counter = run_record.CompileCounter()
    _, rows = evaluate_rows(EvaluateConfig(
        tasks=tuple(arguments.task), experts=tuple(arguments.expert), modules=modules_of(arguments),
        prepared_dir=arguments.prepared, expert_id=arguments.id, metrics=tuple(arguments.metric),
        **{name: getattr(arguments, name) for name in FIELDS}))
    table = Table("expert", "task", "metric", "value", "95% interval", "rows", "of at most", "cut inputs",
                  caption="Intervals are Wilson's.")
    for row in rows:
        interval = f"{100 * row['ci95_low']:.1f} to {100 * row['ci95_high']:.1f}"
        how = f"{row['choice_score']} of choices" if "choice_score" in row else (
            f"tokens: {row['tokenizer']}" if "tokenizer" in row else "")
        metric = f"{row['metric']} ({how})" if how else row["metric"]
        table.add_row(row["expert"], row["task"], metric, f"{100 * row['value']:.2f}", interval,
                      str(row["num_instances"]), str(row["max_rows"] or "all"), str(row.get("num_cut", "–")))
    print_table(table)
    counter.log()
