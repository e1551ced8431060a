"""The verb `elm library calibrate`: fills in how general the experts of a library are.

Either from a complete table of experts and tasks that is there, or by scoring the experts on rows of one
another's training tasks: stacked, as `elm evaluate --stack_experts` does, into its ``calibration/``.
What is scored there is not scored again, so that a killed calibration goes on, and one of a library that has
grown scores what is missing.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.evaluation.results import kept_results
from elm_jax.experts import generality
from elm_jax.experts.base import load_base
from elm_jax.experts.generality import Generality
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.routed_library import copies_in
from elm_jax.reporting.library_report import open_without_encoder, results_in
from elm_jax.runtime import locks, sharding, storage
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_positive, check_types
from elm_jax.workflows.calibrate.calibration_rows import CalibrationSetup, tasks_of_training
from elm_jax.workflows.calibrate.score_table import ScoreTable, read_table
from elm_jax.workflows.evaluate.evaluate_models import ScoredModel, evaluate_models, is_done, model_in

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
    """Settings of one calibration; either `results` or `base` is given.

    Attributes:
        library: its folder.
        results: a file or folder of results, or a study's folder: scores of all experts on all tasks.
        base: of the experts, which are scored on it.
        tasks: names of tasks and mixtures that count; none for all of the results, or for
            `tasks_per_dataset` of each data set that an expert was trained on.
        rows: a seeded random subset of at most this many rows a task is scored.
        tasks_per_dataset: see `tasks`.
        source_length: tokens of an input that are kept.
        max_new_tokens: of a generation.
        stack_experts: number of experts of one shape that are scored in one program.
        mesh_data: size of the mesh's data axis, over which instances are split; -1 for all remaining devices.
        mesh_model: size of the mesh's model axis, over which parameters are split.
        mesh_experts: size of the mesh's expert axis, over which a stack of experts is split.
        modules: registries to import by name.
        prepared_dir: folder of prepared arrays; None prepares in memory.
    """

    library: storage.PathLike
    results: storage.PathLike | None = None
    base: storage.PathLike | None = None
    tasks: tuple[str, ...] = ()
    rows: int = 32
    tasks_per_dataset: int = 1
    source_length: int = 512
    max_new_tokens: int = 128
    stack_experts: int = 16
    mesh_data: int = -1
    mesh_model: int = 1
    mesh_experts: int = 1
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: storage.PathLike | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(rows=self.rows, tasks_per_dataset=self.tasks_per_dataset,
                       stack_experts=self.stack_experts)
        self.settings  # noqa: B018  raises for its own fields
        if (self.results is None) == (self.base is None):
            raise InputError(describe(
                "A calibration takes scores that are there, or scores the experts on their base",
                got="neither" if self.base is None else "both",
                cure="give --results FILE of `elm evaluate`, or --base DIR"))
        if self.results is not None:
            self._check_without_effect("a table that is there", *_SCORING)
        elif self.tasks:
            self._check_without_effect("tasks that are named", "tasks_per_dataset")

    def _check_without_effect(self, what: str, *names: str) -> None:
        """Raises InputError for settings that are given and would have no effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        if given:
            raise InputError(describe(f"With {what} these settings have no effect", got=", ".join(given),
                                      cure="leave them out"))

    @property
    def settings(self) -> EvaluationSettings:
        """The settings that turn instances into batches."""
        return EvaluationSettings(source_length=self.source_length, max_new_tokens=self.max_new_tokens)


_SCORING = ("rows", "tasks_per_dataset", "source_length", "max_new_tokens", "stack_experts", "mesh_data",
            "mesh_model", "mesh_experts", "prepared_dir")
"""Settings of scoring."""


@dataclasses.dataclass(frozen=True)
class CalibrationCost:
    """What a calibration has cost.

    Attributes:
        pairs: of an expert and a task, in all.
        reused: of them that were scored before.
        rows: that were scored, one for each expert.
        seconds: that it took.
    """

    pairs: int
    reused: int
    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """A library after its calibration.

    Attributes:
        table: scores that it was made from.
        generality: of the experts, as it was written.
        cost: of the scoring; of a table that was there nothing was scored.
    """

    table: ScoreTable
    generality: Generality
    cost: CalibrationCost

    def to_dict(self) -> dict[str, Any]:
        """Returns the calibration as a JSON-ready dictionary."""
        return {"tasks": list(self.table.tasks), "cost": dataclasses.asdict(self.cost),
                "priors": self.generality.prior_means(), "generality": self.generality.to_dict()}


def calibrate_library(config: CalibrateConfig) -> Calibration:
    """Fills in how general the experts of a library are, in place of what was known.

    Raises:
        InputError: library, base, results and tasks that do not fit each other; a table that is not complete;
            nothing is changed then.
        Stopped: several processes were told to stop; what was scored is kept.
    """
    start = time.monotonic()
    library = open_without_encoder(config.library)
    registry.import_tasks(config.modules)
    if config.results is not None:
        named = [task for name in config.tasks for task in _members(name)]
        table = read_table(library, results_in(config.results), named or None)
        pairs = int((~np.isnan(table.scores)).sum())
        cost = CalibrationCost(pairs, pairs, 0, time.monotonic() - start)
    else:
        table, cost = _scored(config, library, start)
    return Calibration(table, _write(library, table.generality()), cost)


def _members(name: str) -> tuple[str, ...]:
    """The tasks of a mixture, or the one of this name."""
    mixture = registry.find_mixture(name)
    return (name,) if mixture is None else mixture.tasks


def _scored(config: CalibrateConfig, library: ExpertLibrary, start: float
            ) -> tuple[ScoreTable, CalibrationCost]:
    """Scores what is not scored yet; returns the table and the cost."""
    mesh = sharding.make_mesh(config.mesh_data, config.mesh_model, config.mesh_experts)
    base = load_base(config.base, mesh=mesh, rules=sharding.split_rules())
    copies = copies_in(library)
    models = [model_in(base, library.path / "experts" / name, name, mesh)
              for place, name in enumerate(library) if copies is None or copies[place] == place]
    folder = library.path / generality.CALIBRATION
    data = TaskData(base.vocabulary, config.modules, config.prepared_dir)
    keys = frozenset(row["source"] for row in library.instances)
    with kept_results(folder):  # one that cannot be written is told before anything is scored
        store = ResultsStore(folder)
        store.clear_leftovers()
    setup = CalibrationSetup(base, data, config.settings, mesh, max_rows=config.rows, keys=keys, store=store)
    tasks = _tasks(config, library, setup)
    table = ScoreTable(library, tuple(tasks), np.full((len(library), len(tasks)), np.nan), copies)
    table.check_tells()
    scored_on = tasks_to_score(models, table, config.stack_experts)
    digests = {(model.id, task): setup.settings.digest(
        setup.max_rows, False, setup.cut_prompt(task), model.rendering)
        for model in models for task in scored_on[model.id]}
    pending = [(model.id, task) for model in models for task in scored_on[model.id]
               if not is_done(store, model, task, setup, digests[model.id, task])]
    evaluate_models(models, scored_on.__getitem__, setup, store, replace=True,
                    stack_experts=config.stack_experts)
    rows = sum(row["num_instances"] for name, task in pending
               for row in store.rows_of(name, task, setup.split_of(task))[:1])
    return read_table(library, store, tasks), CalibrationCost(
        len(digests), len(digests) - len(pending), rows, time.monotonic() - start)


def tasks_to_score(models: Sequence[ScoredModel], table: ScoreTable, stack: int) -> dict[str, list[str]]:
    """The tasks that each expert is scored on, by its id: not those of its own data sets.

    Priors have no use for them. Only experts of the same tasks are scored in one program, so that those of
    unlike data sets, too few for a whole stack each, are scored on all tasks together, which costs less.

    Args:
        models: the experts that are no copies.
        table: of the library, with the tasks; scores do not matter. A task that nobody needs stays
            everybody's, so that it has a score.
        stack: number of experts that are scored in one program.
    """
    needed = table.needed()
    needed |= ~needed.any(axis=0)
    of = dict(zip(table.library, needed, strict=True))
    found: dict[str, list[str]] = {}
    alike: dict[tuple[str, ...], list[str]] = {}
    for model in models:
        tasks = tuple(itertools.compress(table.tasks, of[model.id]))
        found[model.id] = list(tasks)
        if model.expert is not None:
            alike.setdefault(tasks, []).append(model.id)
    for names in alike.values():
        found |= {name: list(table.tasks) for name in names[len(names) // stack * stack:]}
    return found


def _tasks(config: CalibrateConfig, library: ExpertLibrary, setup: CalibrationSetup) -> list[str]:
    """The tasks that are named, or some of each data set that experts were trained on."""
    if config.tasks:
        return list(dict.fromkeys(task for name in config.tasks for task in setup.data.tasks_of(name)))
    tasks, absent = tasks_of_training(library, setup, config.tasks_per_dataset)
    if absent:
        logger.warning("%d of the experts' data sets have no rows here, and do not count: %s", len(absent),
                       ", ".join(absent))
    if not tasks:
        raise InputError(describe("No task that an expert was trained on has rows here", where=library.path,
                                  cure="set ELM_DATA_DIR, or give --prepared DIR or --task NAME"))
    return tasks


def _write(library: ExpertLibrary, found: Generality) -> Generality:
    """Writes generality of the experts that the library has now; others may have changed it meanwhile."""
    with locks.alone(library.path, locks.CHANGE_SECONDS):
        now = open_without_encoder(library.path)
        kept = found.only([name for name, one in found.experts.items()
                           if name in now and now[name].card.created == one.created])
        generality.write_generality(library.path, kept)
    new = len(now) - len(kept.experts)
    if new:
        logger.warning("%d experts were added meanwhile, and are not calibrated: calibrate again", new)
    return kept
