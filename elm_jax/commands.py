"""What each verb of the command line does: reads flags, calls one workflow, prints its result."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from elm_jax import config as config_lib
from elm_jax import hosts, merge_commands, plan_commands, preemption, sharding, storage
from elm_jax.data import registry
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.experts.base import load_base
from elm_jax.experts.encoders import MiniLMEncoder
from elm_jax.experts.library import ExpertLibrary
from elm_jax.printing import print_json, print_table
from elm_jax.task_commands import modules_of, task_data
from elm_jax.workflows import build_library, run_record
from elm_jax.workflows import convert as converting
from elm_jax.workflows import evaluate as evaluating
from elm_jax.workflows import farm as farming
from elm_jax.workflows import report as reporting
from elm_jax.workflows import route as routing
from elm_jax.workflows import study as studying
from elm_jax.workflows import tasks as task_tools
from elm_jax.workflows.pretrain import pretrain
from elm_jax.workflows.task_data import TaskData
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


def library_build(arguments: argparse.Namespace) -> None:
    """`elm library build`."""
    library = build_library.build_library(
        arguments.library, arguments.experts, task_data(arguments), encoder=arguments.encoder,
        text_format=arguments.text_format, instances_per_expert=arguments.instances, seed=arguments.seed)
    print(f"{len(library)} experts, {len(library.instances)} keys, encoder {library.encoder.name}")


def library_add(arguments: argparse.Namespace) -> None:
    """`elm library add`."""
    library = ExpertLibrary.open(arguments.library)
    build_library.add_experts(library, arguments.experts, task_data(arguments), arguments.seed)
    print(f"{len(library)} experts, {len(library.instances)} keys")


def library_remove(arguments: argparse.Namespace) -> None:
    """`elm library remove`."""
    library = ExpertLibrary.open(arguments.library)
    library.remove(arguments.experts)
    print(f"{len(library)} experts, {len(library.instances)} keys")


def library_list(arguments: argparse.Namespace) -> None:
    """`elm library list`."""
    library = ExpertLibrary.open(arguments.library)
    if arguments.json:
        print_json({"encoder": library.facts["encoder"], "text_format": library.text_format,
                     "experts": library.facts["experts"]})
        return
    table = Table("expert", "kind", "dataset", "tasks", "keys", "steps",
                  title=f"{library.encoder.name}, {library.text_format}")
    for entry in library.entries.values():
        card = entry.card
        table.add_row(card.id, card.kind, card.dataset or "several", str(len(card.tasks)),
                      str(entry.num_keys), str(card.training.get("steps", "")))
    print_table(table)


def library_verify(arguments: argparse.Namespace) -> int:
    """`elm library verify`: status 1 if a fault was found."""
    library = ExpertLibrary.open(arguments.library)
    faults = library.verify()
    if arguments.json:
        print_json({"experts": len(library), "faults": faults})
    else:
        print("\n".join(faults) or f"{len(library)} experts are whole")
    return 1 if faults else 0


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


def merge(arguments: argparse.Namespace) -> None:
    """`elm merge`."""
    merge_commands.merge(arguments, _decide)


def evaluate(arguments: argparse.Namespace) -> None:
    """`elm evaluate`: appends rows to results.jsonl; rows that are there already are kept."""
    counter = run_record.CompileCounter()
    mesh = sharding.make_mesh(arguments.mesh_data, arguments.mesh_model, arguments.mesh_experts)
    base = load_base(arguments.base, mesh=mesh, rules=sharding.split_rules())
    output = storage.as_path(arguments.output)
    prepared = arguments.prepared or (str(output.parent / "prepared") if hosts.count() > 1 else None)
    data = TaskData(base.vocabulary, modules_of(arguments), prepared,
                    few_shot=arguments.few_shot, few_shot_length=arguments.source_length)
    tasks = list(dict.fromkeys(task for name in arguments.task for task in data.tasks_of(name)))
    registry.import_tasks(modules_of(arguments))  # of registered tasks a changed template is noticed
    models = [evaluating.model_in(base, folder, mesh=mesh) for folder in arguments.expert]
    store = ResultsStore(output.parent, output.name)
    settings = EvaluationSettings(source_length=arguments.source_length,
                                  max_new_tokens=arguments.max_new_tokens, few_shot=arguments.few_shot)
    most = data.evaluation_rows(arguments.task) if arguments.max_rows is None else arguments.max_rows
    evaluating.evaluate_models(
        models or [evaluating.model_of(base, None)], lambda _: tasks, data, base, store, settings, mesh=mesh,
        split=arguments.split, max_rows=most,
        stack_experts=arguments.stack_experts)
    table = Table("expert", "task", "metric", "value", "95% interval", "rows", "of at most", "cut inputs")
    for row in store.rows():
        interval = f"{100 * row['ci95_low']:.1f} to {100 * row['ci95_high']:.1f}"
        table.add_row(row["expert"], row["task"], row["metric"], f"{100 * row['value']:.2f}", interval,
                      str(row["num_instances"]), str(row["max_rows"] or "all"), str(row.get("num_cut", "–")))
    print_table(table)
    logger.info("compiled %d programs in %.1f s", counter.programs, counter.seconds)


def convert(arguments: argparse.Namespace) -> int:
    """`elm convert`: prints what was written and the largest difference, or the whole report as JSON."""
    config = converting.ConvertConfig(
        source=arguments.source, source_kind=arguments.source_kind, target=arguments.target,
        target_kind=arguments.target_kind, base=arguments.base, dtype=arguments.dtype,
        max_shard_bytes=converting.parse_size(arguments.max_shard_size), layout=arguments.layout,
        scanned=arguments.scanned, step=arguments.step, vocabulary=arguments.vocabulary,
        verify=arguments.verify, expert_id=arguments.id, kind=arguments.kind, modules=modules_of(arguments))
    report = converting.convert(config)
    if arguments.json:
        print_json(report)
        return 0
    print("\n".join(converting.summary(report)))
    return 0


def report(arguments: argparse.Namespace) -> None:
    """`elm report`."""
    outcome = reporting.write_report(arguments.results)
    outcome.print_table(Console())
    print(f"report: {outcome.report_path}")


def _paths(arguments: argparse.Namespace) -> list[str]:
    return [path for path in arguments.gin_search_paths.split(",") if path]
