"""The verbs `elm farm ...`: read flags, call one workflow, print its result."""

import argparse
import logging
from typing import Any

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import run_config
from elm_jax.cli.printing import Column, print_json, print_lines, print_table, say
from elm_jax.runtime import storage
from elm_jax.workflows.farm import (
    farm_status as farm_status_lib,
)
from elm_jax.workflows.farm import (
    farm_table,
)
from elm_jax.workflows.farm import (
    jobs as jobs_lib,
)
from elm_jax.workflows.farm import (
    worker as farming,
)
from elm_jax.workflows.study import study_runs

logger = logging.getLogger(__name__)
COLUMNS = (
    Column("expert"), Column("kind", 6), Column("state"),
    Column("silent for", 2, "number", "{:.0f} s".format),
    Column("attempts", 3, "number"), Column("step", 1, "number"), Column("seconds", 5, "number"),
    Column("worker", 7), Column("error", 4, "text"))


def farm_init(arguments: argparse.Namespace) -> None:
    """Runs `elm farm init`: builds, and so checks, the config of every row before it writes anything."""
    if arguments.table is None:
        run_config.read_study(arguments)
        config = config_lib.build("study")
        jobs = study_runs.farm_jobs(config, config_lib.operative())
    else:
        rows = farm_table.read_table(arguments.table)
        read = run_config.read_farm(arguments, rows)
        jobs = [_farm_job(one, row) for one, row in zip(read, rows, strict=True)]
    new = jobs_lib.create(arguments.dir, jobs)
    print_lines(f"{len(jobs)} experts, {new} of them new: elm farm work --dir {arguments.dir}")


def _farm_job(arguments: argparse.Namespace, row: dict[str, Any]) -> jobs_lib.Job:
    folder = storage.as_path(arguments.runs or "runs") / row["expert_id"]
    bindings = [*arguments.gin_bindings, *farm_table.bindings_of(row), f"MODEL_DIR = {str(folder)!r}"]
    config_lib.parse(arguments.gin_file, bindings, config_lib.paths_of(arguments))
    return jobs_lib.Job(row["expert_id"], config_lib.build("train"), config_lib.operative())


def farm_work(arguments: argparse.Namespace) -> int:
    """Runs `elm farm work`; returns status 1 if an expert was given up."""
    settings = farming.WorkSettings(
        lease_seconds=arguments.lease_seconds, attempts=arguments.attempts, wait=arguments.wait,
        max_experts=arguments.max_experts, poll_seconds=arguments.poll_seconds,
        mesh_data=arguments.mesh_data, mesh_model=arguments.mesh_model)
    farming.Worker(arguments.dir, settings).run()
    rows = farm_status_lib.status(arguments.dir, arguments.lease_seconds, arguments.attempts)
    given_up = [row for row in rows if row["state"] == "failed"]
    for row in given_up:
        logger.error("given up: %s: %s", row["expert"], row["error"])
    logger.info("%d of %d experts are done", sum(row["state"] == "done" for row in rows), len(rows))
    return 1 if given_up else 0


def farm_status(arguments: argparse.Namespace) -> int:
    """Runs `elm farm status`; returns status 1 if an expert was given up."""
    rows = farm_status_lib.status(arguments.dir, arguments.lease_seconds, arguments.attempts)
    counts = {state: sum(row["state"] == state for row in rows) for state in farm_status_lib.STATES}
    if arguments.json:
        print_json({"counts": counts, "experts": rows})
    else:
        print_table(COLUMNS, [
            (row["expert"], row["kind"], row["state"], row["silent_seconds"], row["attempts"], row["step"],
             row["seconds"], row["worker"], _in_short(row["error"])) for row in rows], wide=arguments.wide)
        say(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return 1 if counts["failed"] else 0


def _in_short(error: str | None) -> str:
    """Shortens an error: the first line of a message, or the last line of a traceback."""
    lines = (error or "").strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def farm_retry(arguments: argparse.Namespace) -> None:
    """Runs `elm farm retry`: lets experts that were given up be tried again."""
    forgiven = farm_status_lib.forgive(arguments.dir, arguments.experts, arguments.attempts)
    print_lines(*forgiven)
