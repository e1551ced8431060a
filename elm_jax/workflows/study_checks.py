"""What a study's config must fit before anything is trained: names, data, numbers of experts, the mesh."""

import logging

import jax
from jax.sharding import Mesh

from elm_jax import sharding, storage
from elm_jax.data import registry
from elm_jax.data.sources import DATA_DIR_VARIABLE
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.workflows.study_config import StudyConfig

logger = logging.getLogger(__name__)


def check(config: StudyConfig) -> None:
    """Raises InputError for the first thing that would end the study later."""
    registry.import_tasks(config.modules)
    if len(config.datasets) < 2 or config.top_k < 2:
        raise InputError(describe(
            "Merging needs two or more experts", where="study.datasets and study.top_k",
            got=f"{len(config.datasets)} data sets, top_k {config.top_k}", expected="at least 2 of each"))
    for name in config.datasets:
        if name not in registry.mixture_names():
            raise unknown_name("mixture", name, registry.mixture_names(), where="study.datasets")
    registry.check_trainable([name for name in config.prompt_tasks if name in registry.task_names()])
    registry.check_trainable([task for name in config.datasets for task in registry.get_mixture(name).tasks])
    for field in ("prompt_tasks", "heldout_prompts", "unseen_tasks", "generative_tasks",
                  "bigbench_tasks"):
        for name in getattr(config, field):
            _check_task(config, field, name)
    if not any(registry.get_task(name).kind == "rank" for name in config.unseen_tasks):
        raise InputError(describe("A study's table needs unseen tasks that are classified by rank",
                                  where="study.unseen_tasks", got=config.unseen_tasks))


def _check_task(config: StudyConfig, field: str, name: str) -> None:
    if name not in registry.task_names():
        raise unknown_name("task", name, registry.task_names(), where=f"study.{field}")
    task = registry.get_task(name)
    task.check_split(task.evaluation_split)
    if field == "prompt_tasks":
        task.check_split("train")
    prepared = storage.as_path(config.workdir) / "prepared" / name
    reason = task.why_unavailable()
    if reason is not None and not prepared.exists():
        raise InputError(describe(
            "A task of the study cannot be prepared", where=f"study.{field}: {name}", got=reason,
            cure=f"set {DATA_DIR_VARIABLE} to the folder that holds the data sets"))


def mesh_of(config: StudyConfig) -> Mesh:
    """The study's mesh: of as many devices as divide every batch size, unless the config says how many.

    Raises:
        InputError: a batch size is no multiple of the data axis that the config gives.
    """
    stages = {name: getattr(config, name) for name in ("pretrain", "prompt", "dataset", "multitask")}
    # Each microbatch is divided over the data axis.
    sizes = {name: stage.batch_size // stage.num_microbatches for name, stage in stages.items() if stage}
    data = config.mesh_data
    if data == -1 and config.mesh_model >= 1:
        most = len(jax.devices()) // config.mesh_model
        fitting = [size for size in range(1, most + 1) if not any(batch % size for batch in sizes.values())]
        data = max(fitting, default=most)
        if data < most:
            logger.info("mesh of %d x %d: batch sizes %s do not divide over %d devices", data,
                        config.mesh_model, sizes, most * config.mesh_model)
    for name, batch in sizes.items():
        if data > 0 and batch % data:
            raise InputError(describe("Batch size does not divide", where=f"study.{name}", got=batch,
                                      expected=f"a multiple of study.mesh_data = {data}"))
    return sharding.make_mesh(data, config.mesh_model)
