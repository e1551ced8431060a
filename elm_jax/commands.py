"""What `elm demo`, `train`, `study` and `farm` do: read flags, call one workflow, print its result."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from elm_jax import config as config_lib
from elm_jax import plan_commands
from elm_jax.printing import print_json, print_table
from elm_jax.runtime import preemption, storage
from elm_jax.workflows import farm as farming
from elm_jax.workflows import run_record
from elm_jax.workflows import study as studying
from elm_jax.workflows.pretrain import pretrain
from elm_jax.workflows.train import train as train_expert
from elm_jax.workflows.train_stack import train_stack

logger = logging.getLogger(__name__)
STOPPED = preemption.STOPPED


def demo(arguments: argparse.Namespace) -> int:
    """`elm demo`: the study of ``gin/studies/demo.gin`` in a folder of its own."""
    return _study(["studies/demo.gin"], [f"WORKDIR={arguments.workdir!r}"], [])


def study(arguments: argparse.Namespace) -> int:
    """`elm study`: a whole study from gin, or its plan."""
    if arguments.plan or arguments.topology:
        return plan_commands.plan(arguments)
    return _study(arguments.gin_file, arguments.gin_bindings, _paths(arguments))


def _study(files: list[str], bindings: list[str], paths: list[str]) -> int:
    config_lib.parse(files, bindings, paths)
    config = config_lib.build("study")
    outcome = studying.run_study(config, on_start=_config_writer(config.workdir))
    if outcome is None:
        logger.info("stopped by SIGTERM; the same command goes on from here")
        return STOPPED
    outcome.print_table(Console())
    print(f"report: {outcome.report_path}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """`elm train`: an expert, a stack of them (``train_stack``), or a base (``pretrain``); or a plan."""
    if arguments.plan or arguments.topology:
        return plan_commands.plan(arguments)
    counter = run_record.CompileCounter()
    config_lib.parse(arguments.gin_file, arguments.gin_bindings, _paths(arguments))
    name = "pretrain" if config_lib.is_bound("pretrain.model_dir") else "train"
    name = "train_stack" if config_lib.is_bound("train_stack.train") else name
    config = config_lib.build(name)
    folder, on_start = storage.as_path(config.model_dir), _config_writer(config.model_dir)
    if name == "pretrain":
        stopped, result = pretrain(config, on_start=on_start) is None, folder / "base"
    elif name == "train_stack":
        outcome = train_stack(config, on_start=on_start)
        stopped, result = outcome.stopped, "\n".join(outcome.done.values())
    else:
        stopped, result = train_expert(config, on_start=on_start).stopped, folder / "expert"
    logger.info("compiled %d programs in %.1f s", counter.programs, counter.seconds)
    if stopped:
        logger.info("stopped by SIGTERM; the same command goes on from here")
        return STOPPED
    print(result)
    if name == "train_stack":
        outcome.check()
    return 0


def farm_init(arguments: argparse.Namespace) -> None:
    """`elm farm init`: every row's config is built, and so checked, before anything is written."""
    if arguments.table is None:
        config_lib.parse(arguments.gin_file, arguments.gin_bindings, _paths(arguments))
        config = config_lib.build("study")
        jobs = studying.farm_jobs(config, config_lib.operative())
    else:
        jobs = [_farm_job(arguments, row) for row in farming.read_table(arguments.table)]
    new = farming.create(arguments.dir, jobs)
    print(f"{len(jobs)} experts, {new} of them new: elm farm work --dir {arguments.dir}")


def _farm_job(arguments: argparse.Namespace, row: dict[str, Any]) -> farming.Job:
    folder = storage.as_path(arguments.runs or "runs") / row["expert_id"]
    files = [row["gin_file"]] if "gin_file" in row else arguments.gin_file
    bindings = [*arguments.gin_bindings, *farming.bindings_of(row), f"MODEL_DIR = {str(folder)!r}"]
    config_lib.parse(files, bindings, _paths(arguments))
    return farming.Job(row["expert_id"], config_lib.build("train"), config_lib.operative())


def farm_work(arguments: argparse.Namespace) -> int:
    """`elm farm work`: status 1 if an expert was given up."""
    settings = farming.WorkSettings(
        lease_seconds=arguments.lease_seconds, attempts=arguments.attempts, wait=arguments.wait,
        max_experts=arguments.max_experts, poll_seconds=arguments.poll_seconds,
        mesh_data=arguments.mesh_data, mesh_model=arguments.mesh_model)
    farming.Worker(arguments.dir, settings).run()
    rows = farming.status(arguments.dir, arguments.lease_seconds, arguments.attempts)
    given_up = [row for row in rows if row["state"] == "failed"]
    for row in given_up:
        logger.error("given up: %s: %s", row["expert"], row["error"])
    logger.info("%d of %d experts are done", sum(row["state"] == "done" for row in rows), len(rows))
    return 1 if given_up else 0


def farm_status(arguments: argparse.Namespace) -> int:
    """`elm farm status`: status 1 if an expert was given up."""
    rows = farming.status(arguments.dir, arguments.lease_seconds, arguments.attempts)
    counts = {state: sum(row["state"] == state for row in rows) for state in farming.STATES}
    if arguments.json:
        print_json({"counts": counts, "experts": rows})
    else:
        table = Table("expert", "kind", "state", "attempts", "step", "seconds", "worker", "error")
        for row in rows:
            state = row["state"]
            if row["silent_seconds"] is not None:
                state += f", {row['silent_seconds']:.0f} s ago"
            table.add_row(row["expert"], row["kind"], state, str(row["attempts"]), str(row["step"]),
                          str(row["seconds"] or ""), row["worker"] or "", _in_short(row["error"]))
        print_table(table)
        print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return 1 if counts["failed"] else 0


def _in_short(error: str | None) -> str:
    """An error's first line, or a traceback's last."""
    lines = (error or "").strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def farm_retry(arguments: argparse.Namespace) -> None:
    """`elm farm retry`."""
    print("\n".join(farming.forgive(arguments.dir, arguments.experts, arguments.attempts)))


def _config_writer(folder: str) -> Callable[[], None]:
    """Writes the operative config; called when a run starts, so that a refused one leaves no trace."""
    text = config_lib.operative()
    return lambda: storage.write_text(storage.as_path(folder) / "config.gin", text)


def _paths(arguments: argparse.Namespace) -> list[str]:
    return [path for path in arguments.gin_search_paths.split(",") if path]
