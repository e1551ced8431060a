"""Trains one expert (`elm train`): a prompt expert, a dataset expert, or the multitask baseline."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import BatchForm, form_of
from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import examples_of, task_number
from elm_jax.data.preparing.prepared_folder import source_now
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, RunError, describe
from elm_jax.experts import template_versions
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, frozen_by, initial_overlay, load_expert, save_expert
from elm_jax.experts.rendering import frame_of
from elm_jax.models import families
from elm_jax.models.layers.gate_tasks import counting
from elm_jax.models.network import Network, NetworkConfig
from elm_jax.runtime import hosts, locks, sharding, storage, trees
from elm_jax.runtime.differences import differences
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.training.loop import FitResult, fit
from elm_jax.training.run_settings import RunConfig, StackConfig, check_losses
from elm_jax.training.stack.slots import Opened, StackedRun
from elm_jax.training.stack.stacked_loop import Ended, StackCallbacks, fit_stack
from elm_jax.types import Batch, Params
from elm_jax.workflows.train import frozen_trunk, run_record
from elm_jax.workflows.train.train_config import FORM_OF_KIND, TrainConfig, check_expert_axis


@dataclasses.dataclass(frozen=True)
class TrainOutcome:
    """Result of a training run: the expert, or None if SIGTERM stopped the run before its end."""

    expert: Expert | None
    step: int
    stopped: bool
    metrics: dict[str, float]


def train(config: TrainConfig, *, base: Base | None = None, data: TaskData | None = None,
          mesh: Mesh | None = None, on_start: Callable[[], None] | None = None) -> TrainOutcome:
    """Trains one expert and writes ``<model_dir>/expert``; resumes from a checkpoint if there is one.

    Args:
        config: the run.
        base: the base, if it is loaded already.
        data: the task data, if it is there already.
        mesh: the mesh, if there is one already.
        on_start: called once everything is checked, before the run writes anything.

    Raises:
        InputError: the task is unknown, the base does not fit, the run folder is of another config, or
            another process is writing it.
        RunError: the loss is not finite, or the disk is full.
    """
    with locks.alone(config.model_dir):
        return train_in_kept_folder(config, base=base, data=data, mesh=mesh, on_start=on_start)


def train_in_kept_folder(
    config: TrainConfig, *, base: Base | None = None, data: TaskData | None = None, mesh: Mesh | None = None,
    on_start: Callable[[], None] | None = None,
) -> TrainOutcome:
    """Trains one expert as `train` does, where the caller keeps other processes from the run's folder."""
    finished = storage.as_path(config.model_dir) / "expert"
    mesh = mesh or sharding.make_mesh(config.mesh_data, config.mesh_model, config.mesh_experts)
    own_base = base is None
    base = base or load_base(config.initial_checkpoint_path, mesh=mesh, rules=config.base_rules())
    check_network(config, base)
    check_expert_axis(config, base.config)
    if config.task_recipe:
        config = with_recipe(config, tasks_of(config, data or task_data(config, base)))
    if hosts.by_first(lambda: storage.is_committed(finished)):
        expert = load_expert(finished)
        check_same_run(expert.card, config, base)
        return TrainOutcome(expert, expert.card.training.get("steps", 0), False, expert.card.metrics)
    data = framed(config, base, data or task_data(config, base))
    if data.few_shot != config.few_shot:
        raise InputError(describe("The task data have another number of exemplars than the run",
                                  where="train.few_shot", got=data.few_shot, expected=config.few_shot))
    tasks = tasks_of(config, data)
    form = form_of(families.network_of(counting(base.config, tasks)))
    stream, rows = make_stream(config, data, tasks, form)
    network_config, overlay, frozen = initial_overlay(
        base, FORM_OF_KIND[config.kind], adapter=config.adapter(),
        train_norms=config.train_norms, seed=config.random_seed, freeze=config.freeze)
    network = frozen_trunk.network_of(config, counting(network_config, tasks), overlay)
    steps = num_steps(config, stream)
    if config.early_end is not None:
        with frozen_trunk.opened(config, network, base, mesh) as trunk:
            opened = trunk.with_states(Opened(overlay, stream, steps, validation_batches(config, data, form)))
            ended, step = _train_to_early_end(config, base, network, frozen, opened, mesh, on_start)
        if ended is None:
            return TrainOutcome(None, step, True, {})
        card = make_card(config, base, network_config, data, tasks, ended, rows)
        expert = Expert(card, whole_overlay(config, base, ended.overlay), path=str(finished))
        save_expert(finished, expert)
        return TrainOutcome(expert, ended.step, False, card.metrics)
    run = RunConfig.of(
        config, train_steps=steps, rules=config.rules(), name=id_of(config),
        config_digest=run_digest(config, base), settings=settings_of_run(config, base),
        donate_overlay=own_base and not frozen)
    with frozen_trunk.opened(config, network, base, mesh) as trunk:
        result = fit(network, frozen, overlay, trunk.stream(stream), run, mesh, on_start)
    if result.stopped:
        return TrainOutcome(None, result.step, True, dict(result.metrics))
    card = make_card(config, base, network_config, data, tasks, result, rows)
    overlay = whole_overlay(config, base, result.overlay)
    save_expert(finished, Expert(card, overlay))
    expert = Expert(card, hosts.to_host(overlay), path=str(finished))
    return TrainOutcome(expert, result.step, False, card.metrics)


def _train_to_early_end(
    config: TrainConfig, base: Base, network: Network, frozen: Params, opened: Opened, mesh: Mesh,
    on_start: Callable[[], None] | None,
) -> tuple[Ended | None, int]:
    """Trains a run with an early end, as a stack of one; returns its result (None if stopped) and steps."""
    name, found = id_of(config), []
    settings = StackConfig.of(config, size=mesh.shape["experts"], rules=config.rules(), name=name,
                              config_digest=base.fingerprint, settings={"base": named_base(base)})
    run = StackedRun(name, config.random_seed, config.optimizer.learning_rate, run_digest(config, base),
                     lambda: opened, config.model_dir, settings_of_run(config, base))
    callbacks = StackCallbacks(on_end=found.append, on_start=on_start)
    result = fit_stack(network, frozen, [run], settings, mesh, callbacks)
    if result.failed:
        raise RunError(result.failed[name])
    return (found[0] if found else None), result.ticks


def whole_overlay(config: TrainConfig, base: Base, trained: Params) -> Params:
    """The overlay of a finished expert: the trained leaves, and of a full one the base's frozen ones too."""
    return trained if config.freeze is None else trees.merge(base.params, trained)


def id_of(config: TrainConfig) -> str:
    """Name of the expert: as the config gives it, or that of its task."""
    return config.expert_id or config.task


def run_digest(config: TrainConfig, base: Base) -> str:
    """Hash of a run's config and of its base; only a run with the same hash resumes a checkpoint."""
    return f"{config.digest()}/{base.fingerprint}"


def settings_of_run(config: TrainConfig, base: Base) -> dict[str, Any]:
    """What `run_digest` is a hash of, JSON-ready, to name what differs between two runs."""
    return {**config.deciding(), "base": named_base(base)}


def named_base(base: Base) -> str:
    """A base's name and fingerprint, in one text."""
    return f"{base.name} {base.fingerprint}"


def tasks_of(config: TrainConfig, data: TaskData) -> list[str]:
    """Names of the tasks behind the names in the config.

    Raises:
        InputError: an unknown name, or a task that is for evaluation only.
    """
    tasks = list(dict.fromkeys(
        task for name in config.task.split(",") for task in data.tasks_of(name.strip())))
    registry.check_trainable(tasks)
    return tasks


def with_recipe(config: TrainConfig, tasks: list[str]) -> TrainConfig:
    """The config with length, batch size, epochs and cap replaced by its tasks' recipe.

    Raises:
        InputError: a task has no recipe, or another than the first.
    """
    if not config.task_recipe:
        return config
    known = {task: registry.get_task(task).recipe for task in tasks if task in registry.task_names()}
    recipes = {known.get(task) for task in tasks}
    if len(recipes) != 1 or None in recipes:
        lacking = [task for task in tasks if known.get(task) is None]
        raise InputError(describe(
            "The tasks have no recipe in common", where="train.task_recipe",
            got=f"no recipe of {', '.join(lacking[:3])}" if lacking else f"{len(recipes)} recipes",
            expected="tasks of one data set of elm_jax.tasks", cure="leave task_recipe out"))
    recipe = recipes.pop()
    return dataclasses.replace(
        config, task_recipe=False, max_examples=recipe.max_examples, epochs=recipe.epochs, train_steps=None,
        task_feature_lengths={"inputs": recipe.source_length, "targets": recipe.target_length},
        batch_size=recipe.batch_size)


def validation_batches(config: TrainConfig, data: TaskData, form: BatchForm) -> list[Batch]:
    """Makes batches of the expert's own validation rows, in the shapes of its training batches."""
    lengths, size = dict(config.task_feature_lengths), config.batch_size
    splits = [data.split(task, "validation", config.early_end.rows) for task in tasks_of(config, data)]
    sources = [examples_of(split, form, lengths) for split in splits]
    examples = [source.example(number) for source in sources for number in range(len(source))]
    tasks = numbers_of(splits, form)
    tasks = None if tasks is None else np.repeat(tasks, list(map(len, sources))).tolist()
    if not examples:
        raise InputError(describe("An early end needs validation rows", where=config.task, got="none",
                                  cure="leave train.early_end out"))
    if not config.pack:
        return [form.make(examples[start:start + size], lengths, size,
                          None if tasks is None else tasks[start:start + size])
                for start in range(0, len(examples), size)]
    sizes = ((len(inputs), len(targets)) for inputs, targets in examples)
    rows = form.pack(sizes, lengths)
    packed = [[examples[number] for number in row] for row in rows]
    own = None if tasks is None else [[tasks[number] for number in row] for row in rows]
    return [form.make_packed(packed[start:start + size], lengths, size,
                             None if own is None else own[start:start + size])
            for start in range(0, len(packed), size)]


def check_network(config: TrainConfig, base: Base) -> None:
    """Raises InputError if the base is not as the config expects: its dimensions, and that it is sparse."""
    network = families.network_of(base.config)
    check_losses(config.loss, network)
    frozen_by(network, config.freeze)
    if config.network is None:
        return
    kind = type(config.network)
    for field in dataclasses.fields(kind):
        wanted, found = getattr(config.network, field.name), getattr(base.config, field.name, None)
        if wanted != found and field.name not in ("dropout_rate", "dtype", "adapter"):
            raise InputError(describe(
                "The base is not of the network that the config gives", where=f"{kind.__name__}.{field.name}",
                got=f"{found} in {base.path or base.name}", expected=wanted,
                cure="give the base's own file of gin/models/, or leave train.network out"))


def task_data(config: TrainConfig, base: Base) -> TaskData:
    """Makes task data in the vocabulary of the base."""
    if base.vocabulary is None:
        raise InputError(describe("The base carries no vocabulary", where=base.path,
                                  cure="give a base folder with a vocabulary, as a vocabulary.model"))
    folder = config.prepared_dir
    if folder is None and hosts.count() > 1:  # what one process prepares, the others must find
        folder = str(storage.as_path(config.model_dir) / "prepared")
    return TaskData(base.vocabulary, tuple(config.modules), folder,
                    few_shot=config.few_shot, few_shot_length=config.task_feature_lengths["inputs"])


def framed(config: TrainConfig, base: Base, data: TaskData) -> TaskData:
    """The task data with inputs rendered as the run wants them.

    Raises:
        InputError: a chat template is wanted and the base has none.
    """
    return data.with_frame(frame_of(base, config.rendering, config.task_feature_lengths["inputs"],
                                    "train.rendering"))


def make_stream(config: TrainConfig, data: TaskData, tasks: list[str], form: BatchForm
                ) -> tuple[TrainStream, int]:
    """Makes the training stream over all tasks; also returns the number of rows behind it.

    `max_examples` caps a dataset, so its tasks share the cap equally. A mixture with a cap of its own
    (`registry.capped_mixture`) keeps to that as well, if it is the smaller one.

    Raises:
        InputError: a task is for evaluation only, there are no data, or rows that the network's context does
            not hold.
    """
    splits = _train_splits(data, tasks)
    refused = {prepared.name: prepared.info["role"] for prepared in splits
               if prepared.info.get("role") in registry.EVALUATION_ONLY}
    if refused:  # arrays of tasks that are not registered here
        raise registry.evaluation_only(list(refused), set(refused.values()))
    per_dataset: dict[str, int] = {}
    for prepared in splits:
        per_dataset[dataset_of(prepared)] = per_dataset.get(dataset_of(prepared), 0) + 1
    mixture = registry.find_mixture(config.task)

    def cap_of(prepared: PreparedSplit) -> int | None:
        prompts = per_dataset[dataset_of(prepared)]
        caps = [] if config.max_examples is None else [config.max_examples // prompts]
        if mixture is not None and mixture.capped:
            caps.append(int(mixture.share_of(len(prepared), prompts)))
        return max(1, min(caps)) if caps else None

    caps = [cap_of(prepared) for prepared in splits]
    lengths = dict(config.task_feature_lengths)
    sources = [examples_of(prepared, form, lengths) for prepared in splits]
    numbers = numbers_of(splits, form)
    source: Any = sources[0] if len(splits) == 1 and caps == [None] and numbers is None else MixtureSource(
        sources, caps, seed=config.random_seed, tasks=numbers)
    stream = TrainStream(source, form=form, batch_size=config.batch_size, lengths=lengths,
                         seed=config.random_seed, pack=config.pack)
    return stream, sum(len(prepared) for prepared in splits)


def numbers_of(splits: Sequence[PreparedSplit], form: BatchForm) -> list[int] | None:
    """Numbers of the splits' tasks, of a network whose batches carry them; None for others.

    Raises:
        InputError: the network does not know a task.
    """
    return [task_number(split, form) for split in splits] if form.tasks else None


def _train_splits(data: TaskData, tasks: Sequence[str]) -> list[PreparedSplit]:
    if len(tasks) == 1:
        return [data.split(tasks[0], "train")]
    splits = []
    with StageLine("reading", len(tasks), "task") as line:
        for task in tasks:
            splits.append(data.split(task, "train"))
            line.step(len(splits[-1]))
    return splits


def dataset_of(prepared: Any) -> str:
    """``dataset`` or ``dataset/config`` of a prepared split."""
    return dataset_path(prepared.info["dataset"], prepared.info.get("config"))


def num_steps(config: TrainConfig, stream: TrainStream) -> int:
    """Number of optimiser steps: as given, or epochs times the steps of the first epoch."""
    if config.train_steps is not None:
        return config.train_steps
    return max(1, round(config.epochs * stream.steps_per_epoch))


def make_card(config: TrainConfig, base: Base, network: NetworkConfig, data: TaskData, tasks: list[str],
              result: FitResult | Ended, rows: int) -> ExpertCard:
    """Makes the card of a finished run; after an early end, its steps are those of the kept weights."""
    ended_at = {"ended_at": result.ended_at} if config.early_end is not None else {}
    infos = [data.split(task, "train") for task in tasks]
    datasets = sorted({dataset_of(prepared) for prepared in infos})
    return ExpertCard(
        id=id_of(config), kind=config.kind, form=FORM_OF_KIND[config.kind],
        base=base.reference(), network=network.to_dict(),
        tasks=tuple(tasks), templates=tuple(prepared.info["template"] for prepared in infos),
        **template_versions.of_arrays(infos),
        dataset=datasets[0] if len(datasets) == 1 else None,
        training={"steps": result.step, "examples": rows, "seed": config.random_seed,
                  "config_digest": config.digest(), "settings": config.deciding(),
                  "rows": {info.name: info.info["source"] for info in infos if info.info.get("source")},
                  "versions": run_record.versions(), **ended_at,
                  **({"few_shot": config.few_shot} if config.few_shot else {})},
        rendering=config.rendering,
        metrics={name: float(value) for name, value in result.metrics.items() if name != "step"})


def check_same_run(card: ExpertCard, config: TrainConfig, base: Base) -> None:
    """Raises InputError, which names what differs, if the run folder's finished expert is another run's."""
    found, wanted = card.training.get("config_digest"), config.digest()
    cure = "give another run folder (--output), or remove this one"
    if card.base["fingerprint"] != base.fingerprint:
        raise InputError(describe(
            "The run folder holds a finished expert of another base", where=config.model_dir,
            got=f"{card.base.get('name')} {card.base['fingerprint']} there, {named_base(base)} here",
            cure=cure))
    if found != wanted:
        saved = card.training.get("settings")
        raise InputError(describe(
            "The run folder holds a finished expert of other settings", where=config.model_dir,
            got="; ".join(differences(saved, config.deciding())) if saved
            else f"config digest {found} there, {wanted} here", cure=cure))
    if config.prepared_dir is None:  # arrays on disk are compared with their rows when they are read
        registry.import_tasks(config.modules)
    changed = [task for task, source in card.training.get("rows", {}).items()
               if source_now(task, "train") not in (None, source)]
    if changed:
        raise InputError(describe(
            "The run folder holds a finished expert of these settings, but the rows or the template that it "
            "was trained on were changed since", where=config.model_dir,
            got=", ".join(changed), cure=f"{cure}; or go back to the first rows"))
