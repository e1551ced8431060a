"""Checks a study's config before anything is trained: names, data, numbers of experts, the mesh."""

import dataclasses
import logging

import jax
from jax.sharding import Mesh

from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.data.sources.row_files import DATA_DIR_VARIABLE
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.reporting.groups import BENCHMARKS
from elm_jax.runtime import sharding, storage
from elm_jax.workflows.study.study_config import StudyConfig

logger = logging.getLogger(__name__)
BENCHMARK_FIELDS = tuple(BENCHMARKS.values())
"""Fields of tasks that are only scored."""


def expanded(config: StudyConfig) -> StudyConfig:
    """Returns the study with its benchmarks' mixtures replaced by their tasks.

    Raises:
        InputError: a task is then named twice.
    """
    registry.import_tasks(config.modules)
    mixtures = set(registry.mixture_names())
    return dataclasses.replace(config, **{
        field: tuple(task for name in getattr(config, field)
                     for task in (registry.get_mixture(name).tasks if name in mixtures else (name,)))
        for field in BENCHMARK_FIELDS})


def absent_tasks(config: StudyConfig) -> list[dict[str, str]]:
    """Lists benchmark tasks that cannot be scored: ``{benchmark, task, dataset, reason}``."""
    found = []
    for benchmark, field in BENCHMARKS.items():
        for name in getattr(config, field):
            reason = _why_not(config, name)
            if reason is not None:
                task = registry.get_task(name)
                found.append({"benchmark": benchmark, "task": name, "reason": reason,
                              "dataset": dataset_path(task.dataset, task.config)})
                logger.warning("%s is not scored: %s", name, reason)
    return found


def without(config: StudyConfig, absent: list[dict[str, str]]) -> StudyConfig:
    """Returns the study without the tasks that `absent_tasks` found."""
    names = {row["task"] for row in absent}
    return dataclasses.replace(config, **{
        field: tuple(name for name in getattr(config, field) if name not in names)
        for field in BENCHMARK_FIELDS})


def check(config: StudyConfig) -> None:
    """Raises InputError for the first fault in the config that would end the study later."""
    registry.import_tasks(config.modules)
    if len(config.datasets) < 2 or config.top_k < 2:
        raise InputError(describe(
            "Merging needs two or more experts", where="study.datasets and study.top_k",
            got=f"{len(config.datasets)} data sets, top_k {config.top_k}", expected="at least 2 of each"))
    for name in config.datasets:
        if name not in registry.mixture_names():
            raise unknown_name("mixture", name, registry.mixture_names(), where="study.datasets",
                               cure=registry.OWN_MODULE)
    registry.check_trainable([name for name in config.prompt_tasks if name in registry.task_names()])
    registry.check_trainable([task for name in config.datasets for task in registry.get_mixture(name).tasks])
    for name in config.multitask_tasks:
        _check_multitask(config, name)
    for field in ("prompt_tasks", "heldout_prompts", "unseen_tasks", "generative_tasks"):
        for name in getattr(config, field):
            _check_task(config, field, name)
    for field in BENCHMARK_FIELDS:
        for name in getattr(config, field):
            _check_scored_only(field, name)
    if not any(registry.get_task(name).kind == "rank" for name in config.unseen_tasks):
        raise InputError(describe("A study's table needs unseen tasks that are classified by rank",
                                  where="study.unseen_tasks", got=config.unseen_tasks))


def _known(field: str, name: str) -> registry.PromptedTask:
    """Checks a task of one of the study's fields: it exists and has the split that it is scored on."""
    tasks, mixtures = registry.task_names(), registry.mixture_names()
    if name not in tasks and field in (*BENCHMARK_FIELDS, "multitask_tasks"):
        raise unknown_name("task or mixture", name, [*tasks, *mixtures], where=f"study.{field}",
                           cure=registry.OWN_MODULE)
    if name not in tasks:
        raise unknown_name("task", name, tasks, where=f"study.{field}", cure=registry.OWN_MODULE)
    task = registry.get_task(name)
    task.check_split(task.evaluation_split)
    return task


def _why_not(config: StudyConfig, name: str) -> str | None:
    """Reason why a task cannot be prepared; None if it can, or is prepared already."""
    prepared = storage.as_path(config.workdir) / "prepared" / name
    return None if prepared.exists() else registry.get_task(name).why_unavailable()


def _check_scored_only(field: str, name: str) -> None:
    role = _known(field, name).role
    if role not in registry.EVALUATION_ONLY:
        raise InputError(describe(
            "A benchmark's task is one that nothing is ever trained on", where=f"study.{field}: {name}",
            got=f"role {role}", expected=f"one of {', '.join(registry.EVALUATION_ONLY)}",
            cure="give it in study.unseen_tasks or study.generative_tasks"))


def _check_multitask(config: StudyConfig, name: str) -> None:
    field = "multitask_tasks"
    if name in registry.mixture_names():
        registry.check_trainable(registry.get_mixture(name).tasks)
        return
    registry.check_trainable([_known(field, name).name])
    _check_task(config, field, name)


def _check_task(config: StudyConfig, field: str, name: str) -> None:
    task = _known(field, name)
    if field in ("prompt_tasks", "multitask_tasks"):
        task.check_split("train")
    reason = _why_not(config, name)
    if reason is not None:
        raise InputError(describe(
            "A task of the study cannot be prepared", where=f"study.{field}: {name}", got=reason,
            cure=f"set {DATA_DIR_VARIABLE} to the folder that holds the data sets"))


def mesh_of(config: StudyConfig) -> Mesh:
    """Makes the study's mesh: as many devices as divide every batch size, unless the config gives it.

    Raises:
        InputError: a batch size is no multiple of the data axis that the config gives.
    """
    stages = {name: getattr(config, name) for name in ("pretrain", "prompt", "dataset", "multitask")}
    # Each microbatch is divided over the data axis.
    sizes = {name: stage.batch_size // stage.num_microbatches for name, stage in stages.items() if stage}
    data = config.mesh_data
    if data == -1 and config.mesh_model >= 1:
        most = len(jax.devices()) // config.mesh_model
        data = sharding.largest_data_axis(sizes.values(), most)
        if data < most:
            logger.info("mesh of %d x %d: batch sizes %s do not divide over %d devices", data,
                        config.mesh_model, sizes, most * config.mesh_model)
    for name, batch in sizes.items():
        if data > 0 and batch % data:
            raise InputError(describe("Batch size does not divide", where=f"study.{name}", got=batch,
                                      expected=f"a multiple of study.mesh_data = {data}"))
    return sharding.make_mesh(data, config.mesh_model)
