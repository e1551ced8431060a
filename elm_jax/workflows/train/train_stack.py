"""Trains many experts in one program (`elm train` with a table), each as if it trained alone.

``<model_dir>/<id>/`` is each expert's run folder, with the expert, the card and the metrics that its solo
run would leave; ``<model_dir>/stack/`` holds the checkpoints of all experts that are not done.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, RunError, describe
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, initial_overlay, read_card, save_expert
from elm_jax.models import families
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, locks, records, sharding, storage
from elm_jax.runtime.config_checks import check_positive, check_types
from elm_jax.training.run_settings import StackConfig
from elm_jax.training.stack.slots import Opened, StackedRun
from elm_jax.training.stack.stacked_loop import Ended, StackCallbacks, StackResult, fit_stack
from elm_jax.workflows.train import frozen_trunk
from elm_jax.workflows.train.stack_table import Row, rows_of_table
from elm_jax.workflows.train.train_config import FORM_OF_KIND, TrainConfig
from elm_jax.workflows.train.train_expert import (
    check_network,
    check_same_run,
    framed,
    id_of,
    make_card,
    make_stream,
    named_base,
    num_steps,
    run_digest,
    settings_of_run,
    task_data,
    tasks_of,
    validation_batches,
    whole_overlay,
)

logger = logging.getLogger(__name__)
STACK_FOLDER = "stack"
FAILED_FILE = "failed.json"
_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TrainStackConfig:
    """Settings of training many experts in one program (gin: ``train_stack.*``).

    Attributes:
        train: what the experts share. Its `model_dir` is the folder of all; its `task` names tasks, or
            mixtures, each task of which becomes an expert, unless there is a table.
        table: file of experts, ``.jsonl`` or ``.csv``, see `stack_table`; None for the tasks of `train`.
        stack_experts: how many train at once; 1 is one after another.
        mesh_experts: size of the mesh's expert axis.
        at_once: number of experts of each part of that axis that are computed at once, the others in turn
            within the same step; None for all.
    """

    train: TrainConfig
    table: str | None = None
    stack_experts: int = 16
    mesh_experts: int = 1
    at_once: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(stack_experts=self.stack_experts, mesh_experts=self.mesh_experts, at_once=self.at_once)
        if self.train.task_recipe:
            raise InputError(describe("Experts of one program share lengths and batch size",
                                      where="train_stack.train.task_recipe", got=True, expected=False,
                                      cure="train them one by one, or give the lengths and the batch size"))
        if not self.table and not self.train.task:
            raise InputError(describe("Neither tasks nor a table is given", where="train_stack",
                                      cure="give TASK (tasks and mixtures, separated by commas) or TABLE"))
        if self.table and self.train.task:
            raise InputError(describe("Tasks and a table are given", where="train_stack",
                                      got=f"TASK {self.train.task!r}, TABLE {self.table!r}",
                                      expected="one of them"))

    @property
    def model_dir(self) -> str:
        """Folder of all experts."""
        return self.train.model_dir


class StackSize(NamedTuple):
    """Number of experts of a stack that train at once.

    Attributes:
        slots: experts that train at once, at most.
        at_once: experts of each part of the mesh's expert axis that are computed at once, at most; None for
            all.
    """

    slots: int
    at_once: int | None = None


@dataclasses.dataclass(frozen=True)
class StackOutcome:
    """Result of a stacked run.

    Attributes:
        done: folders of all finished experts of the table, by id, in the table's order.
        failed: error messages of failed experts, by id.
        stopped: whether SIGTERM ended it; the same call resumes it.
    """

    done: dict[str, str]
    failed: dict[str, str]
    stopped: bool

    def check(self) -> None:
        """Raises RunError, naming the experts, if any failed."""
        if self.failed:
            raise RunError(describe(
                f"{len(self.failed)} of {len(self.failed) + len(self.done)} experts failed",
                got="\n    " + "\n    ".join(f"{name}: {message.splitlines()[0]}"
                                             for name, message in self.failed.items()),
                cure=f"give each a lower learning rate; or remove its {FAILED_FILE} to try the same again"))


def train_stack(config: TrainStackConfig, *, base: Base | None = None, data: TaskData | None = None,
                mesh: Mesh | None = None, on_start: Callable[[], None] | None = None) -> StackOutcome:
    """Trains the experts of a table; resumes those that are not done and skips those that are.

    Args:
        config: what to train.
        base: the base, if it is loaded already.
        data: the task data, if it is there already.
        mesh: the mesh, if there is one already.
        on_start: called once everything is checked, before anything is written.

    Raises:
        InputError: a task is unknown, the table is not valid, or a run folder is of another config.
        RunError: the disk is full. An expert whose loss is not finite is in `failed` of the outcome.
    """
    mesh = mesh or sharding.make_mesh(config.train.mesh_data, config.train.mesh_model, config.mesh_experts)
    base = base or load_base(config.train.initial_checkpoint_path, mesh=mesh, rules=config.train.base_rules())
    check_network(config.train, base)
    data = data or task_data(config.train, base)
    if config.table:
        rows = rows_of_table(config.table)
    else:
        names = [name.strip() for name in config.train.task.split(",")]
        rows = [Row(task=task) for task in
                dict.fromkeys(task for name in names for task in data.tasks_of(name))]
    configs = [config_of(config.train, row) for row in rows]
    size = StackSize(config.stack_experts, config.at_once)
    return train_experts(configs, config.model_dir, size, base=base, data=data, mesh=mesh, on_start=on_start)


def config_of(shared: TrainConfig, row: Row) -> TrainConfig:
    """Makes the config of one expert's solo run."""
    changes: dict[str, Any] = {"task": row.task, "expert_id": row.expert_id,
                               "model_dir": str(storage.as_path(shared.model_dir) / row.id)}
    if row.learning_rate is not None:
        changes["optimizer"] = dataclasses.replace(shared.optimizer, learning_rate=row.learning_rate)
    if row.seed is not None:
        changes["random_seed"] = row.seed
    if row.train_steps is not None or row.epochs is not None:
        changes |= {"train_steps": row.train_steps, "epochs": row.epochs}
    if row.max_examples is not None:
        changes["max_examples"] = row.max_examples
    return dataclasses.replace(shared, **changes)


def train_experts(configs: Sequence[TrainConfig], folder: str, size: StackSize, *, base: Base, data: TaskData,
                  mesh: Mesh, on_start: Callable[[], None] | None = None) -> StackOutcome:
    """Trains the experts of many solo configs, a few at a time, as one stack.

    The configs may differ in what `config_of` can change. The longest runs enter first, so that few slots
    are idle at the end; the order changes no result.

    Args:
        configs: one config for each expert.
        folder: folder of the stack; its checkpoints are in ``<folder>/stack``.
        size: how many experts train at once.
        base: the base.
        data: the task data.
        mesh: the mesh.
        on_start: called once everything is checked, before anything is written.

    Raises:
        InputError: as `train_stack`, or another process is writing the stack's folder or an expert's.
    """
    with locks.alone_in_each([folder, *(config.model_dir for config in configs)]):
        return _train_experts(configs, folder, size, base=base, data=data, mesh=mesh, on_start=on_start)


def _train_experts(configs: Sequence[TrainConfig], folder: str, size: StackSize, *, base: Base,
                   data: TaskData, mesh: Mesh, on_start: Callable[[], None] | None) -> StackOutcome:
    """Does as `train_experts`, in folders that no other process writes."""
    _check_ids(configs, base)
    done, failed, waiting = {}, {}, []
    earlier = hosts.by_first(lambda: [_earlier_end(config, base) for config in configs])
    for config, (is_done, message) in zip(configs, earlier, strict=True):
        if is_done:
            done[id_of(config)] = ""
        elif message is not None:
            failed[id_of(config)] = message
        else:
            tasks_of(config, framed(config, base, data))  # refuses what is wrong now, not when its turn comes
            waiting.append(config)
    result = StackResult([], {}, False, 0, 0)
    if waiting:
        waiting.sort(key=lambda config: -(config.train_steps or 0))
        # No more slots than experts; of the whole table, so that later sessions have the same number.
        axis = mesh.shape["experts"]
        size = size._replace(slots=min(size.slots, -(-len(configs) // axis) * axis))
        stack_folder = str(storage.as_path(folder) / STACK_FOLDER)
        result = _train_waiting(waiting, _stack_config(waiting, stack_folder, size, base), base, data, mesh,
                                on_start)
        done |= dict.fromkeys(result.ended, "")
        failed |= result.failed
    if not result.stopped:
        hosts.barrier()  # no thread writes there any more
        storage.remove(storage.as_path(folder) / STACK_FOLDER)
    order = [(id_of(config), str(storage.as_path(config.model_dir) / "expert")) for config in configs]
    return StackOutcome({name: path for name, path in order if name in done}, failed, result.stopped)


def _stack_config(configs: Sequence[TrainConfig], folder: str, size: StackSize, base: Base) -> StackConfig:
    """Settings of the stack; what the experts share is in each of their configs."""
    first = configs[0]
    return StackConfig.of(
        first, model_dir=folder, size=size.slots, at_once=size.at_once, rules=first.rules(),
        config_digest=base.fingerprint, settings={"base": named_base(base)}, name=f"{len(configs)} experts")


def _train_waiting(configs: Sequence[TrainConfig], settings: StackConfig, base: Base, data: TaskData,
                   mesh: Mesh, on_start: Callable[[], None] | None) -> StackResult:
    """Trains the experts that are not done."""
    first, by_id = configs[0], {id_of(config): config for config in configs}
    network, overlay, frozen = _start(first, base)
    trained = frozen_trunk.network_of(first, network.config, overlay)
    callbacks = StackCallbacks(
        on_end=lambda ended: _save(ended, by_id[ended.run.id], network, base, data),
        on_fail=lambda run, message: _mark_failed(by_id[run.id], base, message), on_start=on_start)
    with frozen_trunk.opened(first, trained, base, mesh) as trunk:
        runs = [StackedRun(
            id=name, random_seed=config.random_seed, learning_rate=config.optimizer.learning_rate,
            digest=run_digest(config, base), model_dir=config.model_dir,
            settings=settings_of_run(config, base),
            open=lambda config=config: trunk.with_states(_open(config, base, data)))
            for name, config in by_id.items()]
        logger.info("%d experts wait, %d train at once", len(runs), settings.size)
        return fit_stack(trained, frozen, runs, settings, mesh, callbacks)


def _start(config: TrainConfig, base: Base) -> tuple[Network, Any, Any]:
    network_config, overlay, frozen = initial_overlay(
        base, FORM_OF_KIND[config.kind], adapter=config.adapter(),
        train_norms=config.train_norms, seed=config.random_seed, freeze=config.freeze)
    return families.network_of(network_config), overlay, frozen


def _open(config: TrainConfig, base: Base, data: TaskData) -> Opened:
    form = form_of(families.network_of(base.config))
    data = framed(config, base, data)
    stream, _ = make_stream(config, data, tasks_of(config, data), form)
    validation = [] if config.early_end is None else validation_batches(config, data, form)
    return Opened(_start(config, base)[1], stream, num_steps(config, stream), validation)


def _save(ended: Ended, config: TrainConfig, network: Network, base: Base, data: TaskData) -> None:
    """Writes the expert as its solo run would."""
    data, tasks = framed(config, base, data), tasks_of(config, data)
    rows = sum(len(data.split(task, "train")) for task in tasks)
    card = make_card(config, base, network.config, data, tasks, ended, rows)
    save_expert(storage.as_path(config.model_dir) / "expert",
                Expert(card, whole_overlay(config, base, ended.overlay)))


@dataclasses.dataclass(frozen=True)
class FailureMark:
    """Fields of the file that says that an expert failed, under which config and on which base."""

    config_digest: str
    base: str
    message: str


def _mark_failed(config: TrainConfig, base: Base, message: str) -> None:
    storage.write_json(storage.as_path(config.model_dir) / FAILED_FILE, {
        "schema_version": _SCHEMA_VERSION, "config_digest": config.digest(), "base": base.fingerprint,
        "message": message})


def _earlier_end(config: TrainConfig, base: Base) -> tuple[bool, str | None]:
    """Whether an earlier session finished this expert; also the error message if it failed there.

    Raises:
        InputError: the expert that is there is of another config.
    """
    finished = storage.as_path(config.model_dir) / "expert"
    if not storage.is_committed(finished):
        return False, _earlier_failure(config, base)
    check_same_run(read_card(finished)[1], config, base)
    return True, None


def _earlier_failure(config: TrainConfig, base: Base) -> str | None:
    """Error message of an earlier session with the same config, which would fail again at the same step."""
    path = storage.as_path(config.model_dir) / FAILED_FILE
    if not path.exists():
        return None
    mark = records.read_record(path, FailureMark, kind="mark of a failure", schema_version=_SCHEMA_VERSION)
    if (mark["config_digest"], mark["base"]) != (config.digest(), base.fingerprint):
        return None
    return mark["message"]


def _check_ids(configs: Sequence[TrainConfig], base: Base) -> None:
    names = [id_of(config) for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(describe("Two experts of the table have one id", got=", ".join(twice),
                                  cure="give each row an expert_id of its own"))
    if STACK_FOLDER in names:
        raise InputError(describe("An expert's folder would be that of the stack's checkpoints",
                                  got=STACK_FOLDER, cure="give another expert_id"))
    for config in configs:  # now, not after hours of training
        ExpertCard(id=id_of(config), kind=config.kind, form=FORM_OF_KIND[config.kind],
                   base=base.reference(), network={})
    shared = {json.dumps(_shared_part(config), sort_keys=True, default=str) for config in configs}
    if len(shared) > 1:
        raise InputError(describe("Experts of one stack share shapes, network and optimiser",
                                  got=f"{len(shared)} unlike configs"))


_OWN = ("model_dir", "task", "train_steps", "epochs", "random_seed", "max_examples", "expert_id",
        "prepared_dir")


def _shared_part(config: TrainConfig) -> dict[str, Any]:
    """The settings that all experts of one stack must share."""
    facts = {name: value for name, value in families.plain_settings(config).items() if name not in _OWN}
    facts["optimizer"] = {**facts["optimizer"], "learning_rate": None}
    return facts
