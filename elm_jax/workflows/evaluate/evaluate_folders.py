"""Evaluates folders of a base and of experts on tasks, into a file ``results.jsonl``."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluation_settings import KNOWN_METRICS
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.evaluation.results import kept_results
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.library import ExpertLibrary
from elm_jax.runtime import hosts, sharding, storage
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_positive, check_range, check_types
from elm_jax.training.trunk.trunk_cache import DEFAULT_BYTES, TrunkSettings
from elm_jax.workflows.evaluate.evaluate_mixed import (
    MixedExperts,
    mixed_of_assignment,
    mixed_of_library,
    read_assignment,
)
from elm_jax.workflows.evaluate.evaluate_models import (
    ScoringSetup,
    distinct,
    evaluate_models,
    model_in,
    model_of,
)
from elm_jax.workflows.row_routes import check_none_of_these

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:-]{0,199}")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation.

    Attributes:
        base: folder of the base.
        tasks: names of tasks and mixtures.
        output: file of the results; what it holds is not scored again. ``predictions/`` is beside it.
        experts: folders of experts; none scores the base itself.
        split: of every task; None for each task's own: validation, or the only one.
        max_rows: a seeded random subset of at most this many rows a task; None for what mixtures say, or all.
        source_length: tokens of an input that are kept.
        max_new_tokens: of a generation.
        choice_score: of a choice to rank: 'sum' of its log-probabilities, or their 'mean'.
        metrics: to score by beside those that a task has (`evaluation.task_metrics`); one that fits none of
            the tasks is refused.
        few_shot: rows with answers to put before every input, as far as `source_length` allows.
        stack_experts: number of experts of one shape that are scored in one program.
        mesh_data: size of the mesh's data axis, over which instances are split; -1 for all remaining devices.
        mesh_model: size of the mesh's model axis, over which parameters are split.
        mesh_experts: size of the mesh's expert axis, over which a stack of experts is split.
        modules: registries to import by name.
        mixed: whether each row is scored by an expert of its own, in mixed batches.
        library: with `mixed`, folder of a library, which routes each row by itself to one of its experts.
        router: with `library`, which router decides for each row; None for the library's own.
        none_of_these: with `library`, who answers rows that none of its experts fits: ``base``, or an
            expert's id in the library or its folder; None does not ask whether one fits.
        none_per: with `none_of_these`, whether that is told of each ``row`` by itself, as None does, or of
            all rows of a ``task`` together.
        assignment: with `mixed` in place of a library, file that says which of `experts` scores which row:
            `evaluate_mixed.read_assignment`.
        expert_id: with `mixed`, its name in the results; None for ``mixed:`` and the name of library or file.
        prepared_dir: folder of prepared arrays; None prepares in memory, or beside the results if there are
            several processes.
        trunk_cache: folder in which the states of inputs below the experts' lowest layer are kept, so that
            they are computed once for all experts; None computes them for each.
        trunk_cache_bytes: most bytes of that folder; None for 16 GiB.
    """

    base: storage.PathLike
    tasks: tuple[str, ...]
    output: storage.PathLike
    experts: tuple[storage.PathLike, ...] = ()
    split: str | None = None
    max_rows: int | None = None
    source_length: int = 512
    max_new_tokens: int = 128
    few_shot: int = 0
    choice_score: str = "sum"
    metrics: tuple[str, ...] = ()
    stack_experts: int = 1
    mesh_data: int = -1
    mesh_model: int = 1
    mesh_experts: int = 1
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: storage.PathLike | None = None
    mixed: bool = False
    library: storage.PathLike | None = None
    assignment: storage.PathLike | None = None
    expert_id: str | None = None
    trunk_cache: storage.PathLike | None = None
    trunk_cache_bytes: int | None = None
    router: str | None = None
    none_of_these: storage.PathLike | None = None
    none_per: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not self.tasks:
            raise InputError(describe("An evaluation needs a task", where="EvaluateConfig.tasks", got="none",
                                      expected="names of tasks or mixtures"))
        check_positive(max_rows=self.max_rows, stack_experts=self.stack_experts,
                       trunk_cache_bytes=self.trunk_cache_bytes)
        if self.trunk_cache is None and self.trunk_cache_bytes is not None:
            raise InputError(describe("A limit without a cache has no effect", where="trunk_cache_bytes",
                                      got=self.trunk_cache_bytes, cure="give --trunk_cache DIR too"))
        check_range("few_shot", self.few_shot, 0)
        self.settings  # noqa: B018  raises for its own fields
        self._check_mixed()

    def _check_mixed(self) -> None:
        """Raises InputError for a missing field, or one that would have no effect."""
        if not self.mixed:
            given = [name for name in ("library", "assignment", "expert_id", "router", "none_of_these",
                                       "none_per") if getattr(self, name) is not None]
            if given:
                raise InputError(describe("Only a mixed evaluation has a use for these", got=", ".join(given),
                                          cure="give --mixed too, or leave them out"))
            return
        if (self.library is None) == (self.assignment is None):
            raise InputError(describe(
                "A mixed evaluation finds each row's expert through a library, or through an assignment",
                got="neither" if self.library is None else "both",
                cure="give --library DIR, or --assignment FILE and an --expert DIR for each of its experts"))
        if (self.library is None) != bool(self.experts):
            raise InputError(describe(
                "An assignment speaks of given experts, a library of its own",
                got=f"{len(self.experts)} experts beside the {'library' if self.library else 'assignment'}",
                cure="give --expert DIR with --assignment, and none with --library"))
        if self.router is not None and self.library is None:
            raise InputError(describe("An assignment needs no router", where="router", got=self.router,
                                      cure="leave it out, or give --library"))
        check_none_of_these(self.none_of_these, self.none_per, self.library)
        for name in ("stack_experts", "mesh_experts"):
            if getattr(self, name) != 1:
                raise InputError(describe("This has no effect on a mixed evaluation", where=name,
                                          got=getattr(self, name), cure="leave it out"))
        if self.expert_id is not None and not _ID.fullmatch(self.expert_id):
            raise InputError(describe("The name of results becomes a folder's name", got=repr(self.expert_id),
                                      expected="letters, digits and _ . + : - only, the first a letter, a "
                                      "digit or _, at most 200"))

    @property
    def settings(self) -> EvaluationSettings:
        """The settings that turn instances into batches."""
        return EvaluationSettings(source_length=self.source_length, max_new_tokens=self.max_new_tokens,
                                  few_shot=self.few_shot, choice_score=self.choice_score,
                                  metrics=self.metrics)


def evaluate_folders(config: EvaluateConfig) -> ResultsStore:
    """Scores a base, or experts, on tasks; appends new rows to the output file.

    Returns:
        All results of the output file, older ones included.

    Raises:
        InputError: as `evaluate_rows`.
        Stopped: several processes were told to stop; what was scored is kept.
    """
    return evaluate_rows(config)[0]


def evaluate_rows(config: EvaluateConfig) -> tuple[ResultsStore, list[dict[str, Any]]]:
    """Scores a base, or experts, on tasks; appends new rows to the output file.

    Returns:
        All results of the output file; and the rows of these models on these tasks, be they new or older.

    Raises:
        InputError: folders, tasks or results that do not fit each other.
        Stopped: several processes were told to stop; what was scored is kept.
    """
    output = storage.as_path(config.output)
    store = ResultsStore(output.parent, output.name)
    _check_choice_score(store, config.choice_score)
    with kept_results(output.parent):  # a folder that cannot be written is told before anything is scored
        if hosts.is_first():
            store.clear_leftovers()
    mesh = sharding.make_mesh(config.mesh_data, config.mesh_model, config.mesh_experts)
    base = load_base(config.base, mesh=mesh, rules=sharding.split_rules())
    prepared = config.prepared_dir or (str(output.parent / "prepared") if hosts.count() > 1 else None)
    data = TaskData(base.vocabulary, tuple(config.modules), prepared,
                    few_shot=config.few_shot, few_shot_length=config.source_length)
    tasks = list(dict.fromkeys(task for name in config.tasks for task in data.tasks_of(name)))
    registry.import_tasks(config.modules)  # of registered tasks a changed template is noticed
    if config.mixed:
        models = [_mixed_experts(config, base, tasks)]
    else:
        models = [model_in(base, folder, mesh=mesh) for folder in config.experts] or [model_of(base, None)]
    most = data.evaluation_rows(config.tasks) if config.max_rows is None else config.max_rows
    trunk = None if config.trunk_cache is None else TrunkSettings(
        config.trunk_cache, config.trunk_cache_bytes or DEFAULT_BYTES)
    setup = ScoringSetup(base, data, config.settings, mesh, config.split, most, trunk)
    _check_fit(config.metrics, tasks)
    evaluate_models(models, lambda _: tasks, setup, store, stack_experts=config.stack_experts)
    rows = [store.with_interval(row) for model in distinct(models) for task in tasks
            for row in store.rows_of(model.id, task, setup.split_of(task))]
    return store, rows


def _check_fit(metrics: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises InputError for a metric that was asked for and fits none of the tasks, if all are registered."""
    known = [registry.find_task(task) for task in tasks]
    if None in known:
        return
    kinds = sorted({task.kind for task in known})
    fitting = [name for kind in kinds for name in KNOWN_METRICS[kind]]
    for name in metrics:
        if name not in fitting:
            raise InputError(describe("A metric fits none of the tasks", where=f"metrics: {name}",
                                      got=f"tasks of kind {' and '.join(kinds)}",
                                      expected=", ".join(fitting), cure="leave it out"))


def _check_choice_score(store: ResultsStore, wanted: str) -> None:
    """Raises InputError if a file holds choices that were scored in another way: these rows would be lost."""
    others = sorted({row.get("choice_score", "sum") for row in store.rows() if row["metric"] == "accuracy"}
                    - {wanted})
    if others:
        raise InputError(describe(
            "The results were scored in another way", where=store.path, got=f"choices by their {others[0]}",
            expected=f"choices by their {wanted}",
            cure="write into another folder: the two cannot be compared, predictions share their names"))


def _mixed_experts(config: EvaluateConfig, base: Base, tasks: Sequence[str]) -> MixedExperts:
    if config.library is not None:
        return mixed_of_library(base, ExpertLibrary.open(config.library), config.expert_id,
                                config.router, config.none_of_these, config.none_per)
    name = config.expert_id or f"mixed:{storage.as_path(config.assignment).name.split('.')[0]}"
    members = [model_in(base, folder) for folder in config.experts]
    return mixed_of_assignment(members, read_assignment(config.assignment, tasks), name)
