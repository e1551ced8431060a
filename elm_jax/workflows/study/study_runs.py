"""Training runs of a study: configs of its base, experts and baseline, and their tasks' arrays."""

from collections.abc import Sequence

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.farm.jobs import Job
from elm_jax.workflows.study import study_checks
from elm_jax.workflows.study.study_config import StageSettings, StudyConfig
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_config import TrainConfig

MULTITASK_ID = "multitask"


def prepare(config: StudyConfig, data: TaskData, mixed: Sequence[str]) -> None:
    """Prepares the arrays of every task that a study trains on or scores.

    Args:
        config: the study.
        data: that makes and keeps them.
        mixed: tasks of the dataset experts and of the baseline.
    """
    trained, most = dict.fromkeys((*config.prompt_tasks, *mixed)), config.max_eval_rows
    splits = [(task, "train", None) for task in trained]
    splits += [(task, "validation", most) for task in dict.fromkeys((*trained, *config.heldout_prompts))]
    splits += [(task, data.evaluation_split(task), most) for task in config.target_tasks]
    with StageLine("preparing", len(splits), "split") as line:
        for task, split, rows in splits:
            line.step(len(data.split(task, split, rows)))


def multitask_tasks(config: StudyConfig, data: TaskData) -> list[str]:
    """Names of the multitask baseline's tasks, each once."""
    return list(dict.fromkeys(task for name in config.multitask_names for task in data.tasks_of(name)))


def pretrain_config(config: StudyConfig) -> PretrainConfig:
    """Config of the pretraining of a study's base."""
    settings = config.pretrain
    return PretrainConfig(
        model_dir=str(storage.as_path(config.workdir) / "base"),
        network=config.network, passages=config.passages,
        vocab_pieces=config.vocab_pieces, character_coverage=config.character_coverage,
        train_steps=settings.train_steps,
        batch_size=settings.batch_size, task_feature_lengths=settings.task_feature_lengths,
        chunk_length=config.chunk_length, prefix_lm_share=config.prefix_lm_share,
        optimizer=settings.optimizer, dropout_rate=settings.dropout_rate,
        random_seed=config.random_seed, checkpoint_period=settings.checkpoint_period,
        loss=settings.loss, freeze=settings.freeze,
    )


def expert_config(config: StudyConfig, kind: str, expert_id: str, task: str,
                  settings: StageSettings) -> TrainConfig:
    """Training config of one expert of a study."""
    root = storage.as_path(config.workdir)
    return TrainConfig(
        model_dir=str(root / "experts" / expert_id), task=task, initial_checkpoint_path=base_of(config),
        kind=kind, **settings.for_training(), random_seed=config.random_seed,
        adapter_bottleneck=config.adapter_bottleneck, keep_checkpoints=1, network=config.network,
        modules=config.modules, prepared_dir=str(root / "prepared"), expert_id=expert_id, tensorboard=False,
        mesh_data=config.mesh_data, mesh_model=config.mesh_model)


def base_of(config: StudyConfig) -> str:
    """Folder of a study's base, before or after it is made."""
    return config.initial_checkpoint_path or str(storage.as_path(config.workdir) / "base" / "base")


def farm_jobs(config: StudyConfig, gin: str) -> list[Job]:
    """Jobs of a study's experts and baseline, for a farm; the study later finds them finished.

    Raises:
        InputError: the study has no base yet.
    """
    study_checks.check(study_checks.expanded(config))
    base = base_of(config)
    if config.initial_checkpoint_path is None and not storage.is_committed(base):
        raise InputError(describe(
            "A study's experts can be farmed once it has a base", where=base, got="no base",
            cure="run `elm study` until its base is there and stop it, then make the farm again"))
    jobs = [("prompt", task, task, config.prompt) for task in config.prompt_tasks]
    jobs += [("dataset", f"{name}-de", name, config.dataset) for name in config.datasets]
    jobs += [("multitask", MULTITASK_ID, ",".join(config.multitask_names), config.multitask)]
    return [Job(job[1], expert_config(config, *job), gin) for job in jobs]
