"""The verb `elm evaluate`: reads flags, calls one workflow, prints its result."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from elm_jax.cli.printing import Column, print_table
from elm_jax.cli.registries import modules_of
from elm_jax.workflows.evaluate.evaluate_folders import EvaluateConfig, evaluate_rows
from elm_jax.workflows.row_routes import BASE_ID
from elm_jax.workflows.train import run_record

FIELDS = ("base", "output", "split", "max_rows", "source_length", "max_new_tokens", "few_shot",
          "choice_score", "stack_experts", "mesh_data", "mesh_model", "mesh_experts", "mixed", "library",
          "router", "none_of_these", "none_per", "assignment", "trunk_cache", "trunk_cache_bytes")
"""Flags that are fields of the config."""
COLUMNS = (
    Column("expert"), Column("task"), Column("metric"), Column("scored by", 4),
    Column("value", kind="number", show="{:.2f}".format), Column("95% from", 1, "number", "{:.1f}".format),
    Column("to", 1, "number", "{:.1f}".format), Column("rows", 2, "number"),
    Column("of at most", 5, "number"), Column("cut inputs", 3, "number"))
NONE_FITS = "none fits"
"""Name of the column of the rows that none of a library's experts fits, in percent."""


def evaluate(arguments: argparse.Namespace) -> None:
    """Runs `elm evaluate`: appends rows to results.jsonl, does not score again what is already there, and
    prints the rows of these models on these tasks.
    """
    counter = run_record.CompileCounter()
    _, rows = evaluate_rows(EvaluateConfig(
        tasks=tuple(arguments.task), experts=tuple(arguments.expert), modules=modules_of(arguments),
        prepared_dir=arguments.prepared, expert_id=arguments.id, metrics=tuple(arguments.metric),
        **{name: getattr(arguments, name) for name in FIELDS}))
    asked = any("none_fits" in row for row in rows)
    last = Column(NONE_FITS, 1, "number", "{:.1f}".format, "both" if asked else "scripts")
    print_table([*COLUMNS, last], map(_cells, rows), wide=arguments.wide,
                notes=["Values and their 95% intervals, Wilson's, are in percent.", *_who_answered(rows)])
    counter.log()


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    how = f"{row['choice_score']} of choices" if "choice_score" in row else (
        f"tokens: {row['tokenizer']}" if "tokenizer" in row else "")
    return (row["expert"], row["task"], row["metric"], how, 100 * row["value"], 100 * row["ci95_low"],
            100 * row["ci95_high"], row["num_instances"], row["max_rows"] or "all", row.get("num_cut"),
            100 * row["none_fits"] if "none_fits" in row else None)


def _who_answered(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Says who answered the rows that none of the experts fits, if that was asked."""
    for name in dict.fromkeys(row["none_of_these"] for row in rows if "none_of_these" in row):
        who = "the base itself" if name == BASE_ID else name
        yield f"Rows that none of the experts fits ({NONE_FITS}, in percent) were answered by {who}."
