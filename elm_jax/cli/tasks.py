"""The verbs `elm tasks ...`: read flags, call one workflow, print its result."""

import argparse
import collections
import dataclasses
import logging
from typing import Any

from elm_jax.cli.printing import Column, print_json, print_lines, print_table, say, visible
from elm_jax.cli.registries import modules_of, task_data
from elm_jax.data.registry.task_rows import describe_dropped
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import load_reading
from elm_jax.runtime.config_checks import check_positive
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.task_vectors import TaskVectorConfig, embed_tasks
from elm_jax.workflows.tasks import show_tasks as task_tools
from elm_jax.workflows.tasks import task_cache, task_check, task_stats

logger = logging.getLogger(__name__)
LISTED = (Column("task or mixture"), Column("dataset", 3), Column("template", 6), Column("role", 4),
          Column("category", 5), Column("kind", 2), Column("data"), Column("lacks", 1, "text"))
CHECKED = (Column("dataset"), Column("config"), Column("role", 3), Column("tasks", 2, "number"),
           Column("rows", kind="text"), Column("lacking, or where to get it", 1, "text"))
COUNTED = (Column("task"), Column("split"), Column("instances", 4, "number"), Column("dropped", 3, "number"),
           Column("rows", kind="number"), Column("choices", 5, "number"))
VECTORS = ("base", "output", "made_of", "library", "encoder", "temperature", "task_dim", "seed", "per")
"""Flags that are fields of `TaskVectorConfig`."""
SHOWN_WEIGHTS = 4
CACHED = (Column("task"), Column("split"), Column("rows", kind="number"), Column("dropped", 1, "number"),
          Column("why", 2, "text"))


def list_tasks(arguments: argparse.Namespace) -> None:
    """Runs `elm tasks list`."""
    listing = task_tools.list_tasks(modules_of(arguments), role=arguments.role, dataset=arguments.dataset,
                                    category=arguments.category, kind=arguments.kind,
                                    patterns=arguments.names, has_data=arguments.has_data)
    if arguments.json:
        print_json(listing)
        return
    lacks = {row["name"]: row["unavailable"] for row in listing["tasks"]}
    rows = [(row["name"], row["dataset"], repr(row["template"]), row["role"], row["category"], row["kind"],
             row["unavailable"] is None, row["unavailable"]) for row in listing["tasks"]]
    for name, members in listing["mixtures"].items():
        missing = sum(lacks[member] is not None for member in members)
        rows.append((name, f"mixture of {len(members)}", *[None] * 4,
                     "no" if missing == len(members) else "some" if missing else "yes",
                     f"{missing} of its {len(members)} tasks" if missing else None))
    print_table(LISTED, rows, wide=arguments.wide)
    unserved = sum(reason is not None for reason in lacks.values())
    logger.info("%d tasks, %d of them cannot be prepared; %s is %s", len(lacks), unserved,
                row_files.DATA_DIR_VARIABLE, row_files.data_dir() or "not set")


def show(arguments: argparse.Namespace) -> None:
    """Runs `elm tasks show NAME`."""
    check_positive(rows=arguments.rows, source_length=arguments.source_length,
                   target_length=arguments.target_length)
    shown = task_tools.show_task(
        arguments.name, arguments.split, arguments.rows, modules=modules_of(arguments), base=arguments.base,
        source_length=arguments.source_length, target_length=arguments.target_length)
    if arguments.json:
        print_json(shown)
        return
    print(f"cut_prompt: {shown['cut_prompt']}\n")
    for row in shown["rows"]:
        lines = (f"{name}: {value}" for name, value in task_tools.printable(row).items())
        print(visible("\n".join(lines) + "\n", keep="\n\t"))
    if shown["dropped"]:
        print(f"of the rows before these, {describe_dropped(shown['dropped'])}")


def stats(arguments: argparse.Namespace) -> int:
    """Runs `elm tasks stats`: one row for each split; returns status 2 if a split cannot be read."""
    check_positive(source_length=arguments.source_length, target_length=arguments.target_length)
    data, (_, form) = task_data(arguments), load_reading(arguments.base)
    rows, faults = [], []
    jobs = task_cache.jobs_of(data, arguments.names, arguments.split)
    with StageLine("reading", len(jobs), "split") as line:
        for job in jobs:
            try:
                prepared = dataclasses.replace(data).split(*job, arguments.max_rows)  # keeps one in memory
            except InputError as error:
                faults.append(error)
                continue
            lengths = task_stats.lengths_of(job[0], arguments.source_length, arguments.target_length)
            rows.append(task_stats.stats_of(prepared, lengths, form))
            line.step(len(prepared))
    if arguments.json:
        print_json({"splits": rows, "faults": [str(fault) for fault in faults]})
    else:
        _print_stats(rows, arguments.wide)
    for fault in faults:
        logger.error("error: %s", fault)
    return InputError.exit_status if faults else 0


def _print_stats(rows: list[dict[str, Any]], wide: bool) -> None:
    columns, shares = list(COUNTED), "/".join(map(str, task_stats.PERCENTILES))
    for number, name in enumerate(("input", "target")):
        parts = [*(f"tokens {share}%" for share in task_stats.PERCENTILES), "max", "length", "cut"]
        columns += [Column(f"{name} tokens {shares}% max", 1 + 5 * number, "number", where="people"),
                    Column(f"{name}s cut at", 2 + 5 * number, "number", where="people"),
                    *(Column(f"{name} {part}", where="scripts") for part in parts)]
    values = []
    for row in rows:
        choices = "–".join(map(str, dict.fromkeys(row["choices"] or ())))
        values.append((row["task"], row["split"], row["instances"], sum(row["dropped"].values()), row["rows"],
                       choices, *_lengths(row["inputs"]), *_lengths(row["targets"])))
    print_table(columns, values, wide=wide)
    say(*(f"dropped, {reason}: {count}" for reason, count in task_stats.dropped_in_all(rows).items()))


def _lengths(found: dict[str, Any]) -> tuple[Any, ...]:
    """Cells on the lengths of inputs or targets: two for people, the others for scripts."""
    shares = list(found["percentiles"].values())
    return (f"{'/'.join(map(str, shares))} {found['max']}",
            f"{found['length']}: {100 * found['cut_share']:.1f}%",
            *shares, found["max"], found["length"], found["cut"])


def check(arguments: argparse.Namespace) -> int:
    """Runs `elm tasks check`; returns status 1 if data exist but are incomplete."""
    rows = list(task_check.check_data(modules_of(arguments), arguments.names, arguments.has_data))
    faults = [fault for row in rows for fault in row["faults"]]
    if arguments.json:
        print_json({"datasets": rows, "data_dir": str(row_files.data_dir() or "")})
        return 1 if faults else 0
    print_table(CHECKED, [
        (row["dataset"], row["config"], row["roles"], row["tasks"], _counts(row), _remark(row))
        for row in sorted(rows, key=lambda row: not row["splits"])], wide=arguments.wide)
    present = [row for row in rows if row["splits"]]
    say(f"{len(present)} data sets are there, {len(rows) - len(present)} are not; "
        f"{row_files.DATA_DIR_VARIABLE} is {row_files.data_dir() or 'not set'}")
    if len(present) < len(rows):
        say(task_check.HOW_TO_GET)
    for fault in faults:
        logger.error("%s", fault)
    return 1 if faults else 0


def _counts(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{split} {count:,}" for split, count in row["splits"].items())
    return counts or ("damaged" if row["faults"] else "–")


def _remark(row: dict[str, Any]) -> str:
    if row["origin"]:
        return row["origin"]
    reasons = collections.Counter(row["lacking"].values())
    remarks = [f"{count} tasks: {reason}" for reason, count in reasons.items()]
    remarks += [f"no {split}" for split in row["without"]]
    return "; ".join([*remarks, *([f"{len(row['faults'])} faults, see below"] if row["faults"] else [])])


def embed(arguments: argparse.Namespace) -> None:
    """Runs `elm tasks embed`: prints what the vectors are made of and the new base's folder."""
    report = embed_tasks(TaskVectorConfig(
        tasks=tuple(arguments.names), modules=modules_of(arguments),
        **{name: getattr(arguments, name) for name in VECTORS}))
    if arguments.json:
        print_json(report)
        return
    for name, weights in report["tasks"].items():
        largest = sorted(weights.items(), key=lambda item: -item[1])[:SHOWN_WEIGHTS]
        made = ", ".join(f"{weight:.2f} {task}" for task, weight in largest) or report["made_of"]
        print_lines(f"{name}: {made}" + f", and {len(weights) - len(largest)} more" * (
            len(weights) > len(largest)))
    print_lines(f"{report['num_tasks']} tasks; gate: {report['gate']}", report["output"])


def cache(arguments: argparse.Namespace) -> None:
    """Runs `elm tasks cache`: prepares the arrays of tasks or mixtures, or of all tasks that have data."""
    if not arguments.prepared:
        raise InputError(describe("--prepared names no folder", cure="give --prepared DIR"))
    if arguments.num_workers < 1:
        raise InputError(describe("--num_workers is no number of processes", got=arguments.num_workers,
                                  expected="1 or more"))
    data = task_data(arguments)
    jobs = task_cache.jobs_of(data, arguments.names, arguments.split)
    made = task_cache.cache(data, jobs, arguments.max_rows, arguments.num_workers)
    rows = []
    with StageLine("preparing", len(jobs), "split") as line:
        for prepared in made:
            dropped = prepared.info.get("dropped", {"in rendering": prepared.info["num_dropped"]})
            rows.append((prepared.name, prepared.split, len(prepared), sum(dropped.values()),
                         [f"{reason}: {count}" for reason, count in dropped.items()]))
            line.step(len(prepared))
    print_table(CACHED, rows, wide=arguments.wide)
