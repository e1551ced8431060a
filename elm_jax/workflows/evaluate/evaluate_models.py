"""Evaluates a base and experts on tasks: results that a store lacks, or rows that are only returned."""

import abc
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import ClassVar, TypedDict, TypeVar

import jax
from jax.sharding import Mesh

from elm_jax.data.arrays.prepared import PLAIN, PreparedSplit
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.evaluation import stacked_evaluator
from elm_jax.evaluation.bleu import require_sacrebleu
from elm_jax.evaluation.evaluation_settings import wanted_metrics
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore, Scoring, TaskResult, evaluate_task
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, check_base, load_expert, read_card, resolve
from elm_jax.experts.rendering import frame_of
from elm_jax.experts.template_versions import warn_of_arrays, warn_of_changes
from elm_jax.models.network import Network, frozen_depth
from elm_jax.runtime import hosts, preemption, sharding, storage, trees
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.terminal.progress import StageLine, tell_item
from elm_jax.training.trunk.trunk_cache import TrunkBase, TrunkCache, TrunkSettings
from elm_jax.types import Params
from elm_jax.workflows.merge.search_merge import warn_of_searched_rows
from elm_jax.workflows.row_routes import BASE_ID

logger = logging.getLogger(__name__)
ScorableModel = TypeVar("ScorableModel", bound="Scorable")


@dataclasses.dataclass(frozen=True)
class ScoringSetup:
    """Base, data, settings and mesh that all models of one evaluation share.

    Attributes:
        base: gives the vocabulary and its fingerprint.
        data: prepared splits.
        settings: lengths, budgets.
        mesh: parameters are split over 'model', instances over 'data'.
        split: of every task; None for each task's own: validation, or the only one.
        max_rows: a seeded random subset of at most this many rows a task.
        trunk: where the states of inputs below the layers that a model changes are kept, for all models
            that share these layers with the base; None computes them for each model.
    """

    base: Base
    data: TaskData
    settings: EvaluationSettings
    mesh: Mesh
    split: str | None = None
    max_rows: int | None = None
    trunk: TrunkSettings | None = None

    @classmethod
    def of(cls, base: Base, *, data: TaskData | None = None, settings: EvaluationSettings | None = None,
           mesh: Mesh | None = None, split: str | None = None, max_rows: int | None = None) -> "ScoringSetup":
        """Makes a setup with default values: the default registries, all devices on the data axis."""
        return cls(base, data or TaskData(base.vocabulary), settings or EvaluationSettings(),
                   mesh or sharding.make_mesh(len(jax.devices()), 1), split, max_rows)

    @property
    def scoring(self) -> Scoring:
        """The part of the setup that scoring itself needs."""
        return Scoring(self.settings, self.base.vocabulary, self.mesh, self.base.fingerprint, self.max_rows)

    @contextlib.contextmanager
    def above_trunk(self, network: Network, own: Collection[str], model: str
                    ) -> Iterator[tuple[Network, Scoring]]:
        """Opens the cache of states, if there is one; gives a network with a trunk, and the scoring with it.

        Args:
            network: of a model.
            own: paths of the leaves in which it differs from the base.
            model: its id, for the error.

        Raises:
            InputError: the model has a lowest layer of its own, or there are several processes.
        """
        if self.trunk is None:
            yield network, self.scoring
            return
        if hosts.count() > 1:  # each makes whole batches, and would compute the states of all rows
            raise InputError(describe("Scoring keeps states of the lower layers in one process only",
                                      where="trunk_cache", got=f"{hosts.count()} processes",
                                      cure="leave --trunk_cache out"))
        depth = frozen_depth(network, own)
        if depth == 0:
            raise InputError(describe(
                "This model shares no lower layers with the base: there are no states to keep", where=model,
                got=f"{len(own)} leaves of its own, one of them in the lowest layer",
                expected="an expert that was trained with ADAPTER_LAYERS, above layer 0",
                cure="leave --trunk_cache out, or score this model apart"))
        network = dataclasses.replace(network, trunk=depth)
        made_of = TrunkBase(self.base.fingerprint, self.base.params)
        with TrunkCache(network, made_of, self.trunk, self.mesh) as cache:
            yield network, dataclasses.replace(self.scoring, trunk=cache)

    def split_of(self, task: str) -> str:
        """Name of the split that a task is scored on."""
        return self.split or self.data.evaluation_split(task)

    def rows(self, task: str, rendering: str = PLAIN, model: str = BASE_ID) -> PreparedSplit:
        """The rows of a task that are scored, as a prepared split in the rendering of a model.

        A registered task says its metrics.

        Raises:
            InputError: the model was trained in a chat template, and the base has none.
        """
        split = self.drawn(task, self.data_in(rendering, model))
        known = registry.find_task(task)
        return split if known is None else dataclasses.replace(
            split, info={**split.info, "metrics": list(known.metrics)})

    def drawn(self, task: str, data: TaskData) -> PreparedSplit:
        """The rows of a task that are scored, from the task data in some rendering."""
        return data.split(task, self.split_of(task), self.max_rows)

    def data_in(self, rendering: str, model: str) -> TaskData:
        """The task data in the rendering of a model; reads no rows.

        Raises:
            InputError: as `rows`, or exemplars together with a chat template.
        """
        return self.data.with_frame(
            frame_of(self.base, rendering, self.settings.source_length, f"the card of {model}"))

    def cut_prompt(self, task: str) -> str:
        """The side on which a task's prompts are cut: as it is registered, or as its arrays say."""
        known = registry.find_task(task)
        return self.rows(task).cut_prompt if known is None else known.cut_prompt

    def check_metrics(self, tasks: Iterable[str]) -> None:
        """Raises InputError if a task cannot be scored by the metrics that it names, or are asked for."""
        for known in filter(None, map(registry.find_task, tasks)):
            names = wanted_metrics(known.kind, known.metrics, self.settings.metrics, known.name)
            if "bleu" in names:
                require_sacrebleu(known.name)


class ScoringOptions(TypedDict, total=False):
    """Options of `ScoringSetup.of` beside the base."""

    data: TaskData | None
    settings: EvaluationSettings | None
    mesh: Mesh | None
    split: str | None
    max_rows: int | None


@dataclasses.dataclass(frozen=True)
class Scorable(abc.ABC):
    """Something that can be scored on tasks.

    Attributes:
        id: its name in the results.
        fingerprint: of its weights, so that a model trained again is scored again.
        mixed: whether each row has an expert of its own.
    """

    id: str
    fingerprint: str
    mixed: ClassVar[bool] = False

    @property
    def rendering(self) -> str:
        """How its inputs are rendered, one of `prepared.RENDERINGS`."""
        return PLAIN

    @abc.abstractmethod
    def score(self, tasks: Sequence[str], setup: ScoringSetup) -> Iterator[TaskResult]:
        """Scores it on each task; puts its parameters onto the mesh once."""


@dataclasses.dataclass(frozen=True)
class ScoredModel(Scorable):
    """A base or an expert that can be scored on tasks.

    Attributes:
        load: gives its network and parameters.
        expert: gives the expert behind it, for scoring many in one program; None for what never stacks.
        card: the expert's, None for a base.
    """

    load: Callable[[], tuple[Network, Params]]
    expert: Callable[[], Expert] | None = None
    card: ExpertCard | None = None

    @property
    def rendering(self) -> str:
        """How its inputs are rendered: as its card says; a base's plainly."""
        return PLAIN if self.card is None else self.card.rendering

    def score(self, tasks: Sequence[str], setup: ScoringSetup) -> Iterator[TaskResult]:
        """Scores the model on each task, with its parameters loaded once."""
        network, params = self.load()
        shared = trees.flatten(setup.base.params)
        own = [path for path, leaf in trees.flatten(params).items() if shared.get(path) is not leaf]
        params = sharding.put_tree(params, sharding.tree_shardings(
            network.logical_axes(), params, setup.mesh))
        with setup.above_trunk(network, own, self.id) as (network, scoring):
            for task in tasks:
                instances = setup.rows(task, self.rendering, self.id)
                warn_of_rows(self.card, instances)
                yield evaluate_task(network, params, instances, scoring, self.id)


def warn_of_rows(card: ExpertCard | None, instances: PreparedSplit) -> None:
    """Logs warnings about an expert's result on a split: a changed template, rows that it has seen."""
    warn_of_arrays(card, instances)
    warn_of_searched_rows(card, instances)


def model_of(base: Base, expert: Expert | None) -> ScoredModel:
    """Makes a base (None) or an expert on it scorable."""
    if expert is None:
        return ScoredModel(BASE_ID, base.fingerprint, lambda: resolve(base, None))
    return ScoredModel(expert.card.id, trees.fingerprint(expert.overlay), lambda: resolve(base, expert),
                       (lambda: expert) if expert.card.form == "adapter" else None, expert.card)


def model_in(base: Base, folder: storage.PathLike, expert_id: str | None = None,
             mesh: Mesh | None = None) -> ScoredModel:
    """Makes an expert on disk scorable; its weights are read, onto the mesh, when it is scored.

    Raises:
        InputError: the folder is not whole, or the expert is another base's.
    """
    folder, card, fingerprint = read_card(folder)
    check_base(base, card, folder)
    warn_of_changes([card])
    return ScoredModel(expert_id or card.id, str(fingerprint),
                       lambda: resolve(base, load_expert(folder, mesh=mesh)),
                       (lambda: load_expert(folder)) if card.form == "adapter" else None, card)


def is_done(store: ResultsStore, model: Scorable, task: str, setup: ScoringSetup, digest: str) -> bool:
    """Whether the store holds this model's result on the task with the settings of this digest."""
    split, metrics, several = setup.split_of(task), setup.settings.metrics, False
    known = registry.find_task(task)
    if known is not None:
        metrics, several = (*known.metrics, *metrics), known.lists.scores is not None
    return store.done(model.id, task, split, digest, metrics=metrics, several_right=several) and any(
        row["model"] == model.fingerprint for row in store.rows_of(model.id, task, split))


def distinct(models: Iterable[ScorableModel]) -> list[ScorableModel]:
    """Drops repeated models; two different ones with one id are an InputError."""
    found: dict[str, ScorableModel] = {}
    for model in models:
        known = found.setdefault(model.id, model)
        if known.fingerprint != model.fingerprint:
            raise InputError(describe(
                "Two models of unlike weights have one id, by which results are kept", where=model.id,
                got=f"{known.fingerprint} and {model.fingerprint}",
                cure="evaluate one of them into another folder, or give it another id"))
    return list(found.values())


def check_ids(models: Iterable[Scorable], store: ResultsStore) -> None:
    """Raises InputError if the store holds results of another model under one of these ids."""
    fingerprints = {model.id: model.fingerprint for model in models}
    for row in store.rows():
        wanted = fingerprints.get(row["expert"])
        if wanted is not None and row.get("model") != wanted:
            raise InputError(describe(
                "These results are of another model of the same id, and would be lost",
                where=f"{row['expert']} in {store.path}", got=row.get("model"), expected=wanted,
                cure="give a file in another folder, or remove these results"))


def evaluate_models(
    models: Iterable[Scorable], tasks_of: Callable[[str], Sequence[str]], setup: ScoringSetup,
    store: ResultsStore, *, replace: bool = False, stack_experts: int = 1,
) -> None:
    """Evaluates every model on its tasks; skips results that the store has.

    Results are kept by the models' ids, so two models of one id never share a store.

    Args:
        models: scored one after another, each put onto the mesh once.
        tasks_of: from a model's id to the tasks that it is scored on.
        setup: rows, lengths and devices.
        store: results and predictions on disk.
        replace: whether a model replaces another of its id in the store, for one that was trained again.
        stack_experts: number of experts, with overlays of one shape and with the same tasks to score, that
            are scored in one program; the results are the same.

    Raises:
        InputError: two models of one id, or one of the id of another in the store without `replace`; a model
            of a rendering that the base or the data do not have. Nothing is scored then.
        Stopped: several processes were told to stop; what was scored is kept.
    """
    models = distinct(models)
    if not replace:
        hosts.by_first(lambda: check_ids(models, store))
    for model in models:
        setup.data_in(model.rendering, model.id)

    def pending_of(model: Scorable) -> list[str]:
        setup.check_metrics(tasks_of(model.id))
        # Opened in every process: what only the first has open, the others would wait for it to share.
        digests = {task: setup.settings.digest(setup.max_rows, model.mixed, setup.cut_prompt(task),
                                               model.rendering) for task in tasks_of(model.id)}
        return hosts.by_first(lambda: not_done(model, digests))

    def not_done(model: Scorable, digests: dict[str, str]) -> list[str]:
        store.refresh()  # another evaluation may write the same file
        return [task for task, digest in digests.items()
                if not is_done(store, model, task, setup, digest)]

    if stack_experts > 1:
        groups = list(_groups(models, pending_of, stack_experts))
        with StageLine("scoring", len(groups), "stack") as line:
            for group in groups:
                _evaluate_group(group, pending_of(group[0]), setup, store)
                line.step()
    with StageLine("scoring", len(models), "model") as line:
        for model in models:
            pending = pending_of(model)
            for number, result in enumerate(model.score(pending, setup) if pending else (), start=1):
                _keep(store, model, result)  # its parameters leave the devices at the end
                line.detail(f"{model.id}: {number} of {len(pending)} tasks")
                if preemption.reached_sync_point():  # one process is ended by SIGTERM itself
                    raise preemption.Stopped
            line.step()


def _keep(store: ResultsStore, model: Scorable, result: TaskResult) -> None:
    rows = [{**row, "model": model.fingerprint} for row in result.rows]
    store.append(dataclasses.replace(result, rows=rows))


def _groups(models: Sequence[Scorable], pending_of: Callable[[Scorable], list[str]], most: int
            ) -> Iterator[list[ScoredModel]]:
    """Groups models to score together: adapter experts of one network with the same tasks, evenly."""
    by_tasks: dict[tuple[str, ...], list[ScoredModel]] = {}  # by rendering and network too
    for model in models:
        pending = tuple(pending_of(model))
        if isinstance(model, ScoredModel) and model.expert is not None and pending:
            network = json.dumps(model.card.network, sort_keys=True)
            by_tasks.setdefault((model.rendering, network, *pending), []).append(model)
    for members in by_tasks.values():
        count = -(-len(members) // most)
        for number in range(count):
            group = members[number::count]
            if len(group) > 1:
                yield group


def _evaluate_group(models: Sequence[ScoredModel], tasks: Sequence[str], setup: ScoringSetup,
                    store: ResultsStore) -> None:
    """Evaluates several experts in one program; leaves those whose overlays do not fit for later."""
    start, base, mesh = time.monotonic(), setup.base, setup.mesh
    experts = [model.expert() for model in models]
    network, _ = resolve(base, experts[0])
    for expert in experts:
        resolve(base, expert)  # belongs to this base, fits its own network
    axis = mesh.shape["experts"]
    alike = [expert.card.network == experts[0].card.network
             and trees.first_difference(experts[0].overlay, expert.overlay) is None for expert in experts]
    if not all(alike) or len(experts) % axis:
        logger.info("%d experts are scored one after another: %s", len(experts), "their overlays are unlike"
                    if not all(alike) else f"the mesh has {axis} parts for experts")
        return
    params = stacked_evaluator.put_stack(network, base.params, [expert.overlay for expert in experts], mesh)
    with setup.above_trunk(network, trees.flatten(experts[0].overlay), models[0].id) as (network, scoring):
        for task in tasks:
            instances = setup.rows(task, models[0].rendering, models[0].id)
            for model in models:
                warn_of_rows(model.card, instances)
            results = stacked_evaluator.evaluate_task_stacked(
                network, params, instances, scoring, [model.id for model in models])
            for model, result in zip(models, results, strict=True):
                _keep(store, model, result)
            if preemption.reached_sync_point():
                raise preemption.Stopped
    tell_item(logger, "evaluated %d experts together on %d tasks in %.1f s", len(models), len(tasks),
              time.monotonic() - start)


def evaluate(base: Base, expert: Expert | None, tasks: Sequence[str], *, data: TaskData | None = None,
             settings: EvaluationSettings | None = None, mesh: Mesh | None = None,
             split: str | None = None, max_rows: int | None = None) -> list[dict]:
    """Evaluates one expert (None: the base itself) on tasks; returns result rows and writes nothing.

    Args:
        base: the base.
        expert: an expert of that base.
        tasks: names of tasks; a string is one name.
        data: prepared splits; by default prepared through the default registries.
        settings: lengths, budgets.
        mesh: by default all devices on the data axis.
        split: of every task; None for each task's own: validation, or the only one.
        max_rows: a seeded random subset of at most this many rows a task.
    """
    setup = ScoringSetup.of(base, data=data, settings=settings, mesh=mesh, split=split, max_rows=max_rows)
    name, card = (BASE_ID, None) if expert is None else (expert.card.id, expert.card)
    model = ScoredModel(name, "not kept", lambda: resolve(base, expert), card=card)
    setup.check_metrics(items_of(tasks))
    return [row for result in model.score(items_of(tasks), setup) for row in result.rows]
