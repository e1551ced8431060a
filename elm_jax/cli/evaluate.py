"""What `elm evaluate`, `elm convert` and `elm report` do: read flags, call one workflow, print its result."""

import argparse
import logging

from rich.table import Table

from elm_jax.cli.printing import print_table
from elm_jax.cli.registries import modules_of
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.experts.base import load_base
from elm_jax.runtime import hosts, sharding, storage
from elm_jax.workflows import evaluate as evaluating
from elm_jax.workflows.train import run_record

logger = logging.getLogger(__name__)


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
