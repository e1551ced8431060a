"""Runs the stages that all studies of arms share; every run that is done is skipped.

A run is done once its scores are in ``results/results.jsonl`` (and, if later runs start from it, its weights
in ``kept/``); its folder in ``runs/`` is removed then. A run that was killed goes on from its checkpoint.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.data.sources.row_files import DATA_DIR_VARIABLE
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluator import ResultsStore
from elm_jax.experts.base import Base, load_base, save_base
from elm_jax.experts.overlay import resolve
from elm_jax.formats.elm import base_json
from elm_jax.models import families
from elm_jax.models.families import plain_settings
from elm_jax.planning.token_flops import token_cost
from elm_jax.reporting.arms.arms_report import ArmsOutcome, write_arms_report
from elm_jax.reporting.page_parts import Made
from elm_jax.runtime import hosts, locks, storage, trees
from elm_jax.runtime.differences import as_json
from elm_jax.runtime.preemption import Stopped
from elm_jax.runtime.terminal.progress import StageLine, tell_item
from elm_jax.types import Params
from elm_jax.workflows.arms.arm_bases import ArmBases, mesh_of
from elm_jax.workflows.arms.arm_runs import ArmRun, Target, targets
from elm_jax.workflows.arms.arm_scores import TARGET_LOSS, Scorer
from elm_jax.workflows.arms.arm_settings import BASE, ArmSettings, ArmStudySettings, GridPoint, grid
from elm_jax.workflows.arms.cut_rows import CutTaskData, RowCuts, TaskRows
from elm_jax.workflows.arms.new_task_vectors import with_vector
from elm_jax.workflows.study.study_config import StageSettings
from elm_jax.workflows.train import run_record
from elm_jax.workflows.train.train_expert import train

logger = logging.getLogger(__name__)
MOST_BASES = 4
"""Bases that are kept in memory."""


class ArmStudy:
    """Bases, runs, scores and choices of one study in one work folder.

    Args:
        config: of the study.
        command: that runs it, for the report.
    """

    def __init__(self, config: ArmStudySettings, command: str | None = None) -> None:
        if hosts.count() > 1:
            raise InputError(describe("A study of arms runs in one process", got=hosts.count(), expected=1))
        registry.import_tasks(config.modules)
        self.config, self.command = config, command
        self.root = storage.as_path(config.workdir)
        self.mesh = mesh_of(config)
        self.bases = ArmBases(config, self.mesh)
        self.clock = run_record.StageClock(self.root / "stages.json")
        self.compiled = run_record.CompileCounter()
        self.store = ResultsStore(self.root / "results")
        self.choices: dict[tuple[str, str], GridPoint] = {}
        self._loaded: collections.OrderedDict[str, Base] = collections.OrderedDict()
        self._digests: dict[str, str] = {}
        self.data: TaskData | None = None
        self.cuts: RowCuts | None = None
        self.scorer: Scorer | None = None

    def run(self) -> ArmsOutcome:
        """Runs all stages in order; what is done is skipped.

        Raises:
            Stopped: by SIGTERM, during training.
        """
        raise NotImplementedError

    def make_bases(self) -> None:
        """Runs the stage of the arms' bases, then opens the task data in their vocabulary."""
        self._check_bases()
        with StageLine("making", len(self.config.arms), "base") as line:
            for arm in self.config.arms:
                self._loaded[self.start_name(arm, BASE)] = self.bases.make(arm)
                line.step()
        vocabulary = next(iter(self._loaded.values())).vocabulary
        self.data = TaskData(vocabulary, self.config.modules, str(self.root / "prepared"))
        self.cuts = RowCuts(self.data, self.config.heldout_rows, self.config.random_seed)
        self.scorer = Scorer(self.config, self.cuts, self.store, self.mesh)

    def _check_bases(self) -> None:
        """Raises InputError if the work folder holds bases of other settings; records what they are of."""
        made_of = run_record.MadeOf(self.root / "made_of.json")
        for arm in self.config.arms:
            digest = self.bases.digest(arm)
            if arm.name in made_of.known and not made_of.fits(arm.name, digest):
                raise InputError(describe(
                    "The work folder holds the base of an arm of other settings", where=self.root,
                    got=f"arm {arm.name}", cure="choose an empty folder, or go back to its settings"))
            made_of.record(arm.name, digest)

    def prepare(self, trained: Iterable[str], scored: Iterable[str]) -> None:
        """Prepares the arrays of all tasks."""
        splits = [(task, "train", None) for task in dict.fromkeys(trained)]
        splits += [(task, self.data.evaluation_split(task), self.config.max_eval_rows)
                   for task in dict.fromkeys(scored)]
        with StageLine("preparing", len(splits), "split") as line:
            for task, split, rows in splits:
                line.step(len(self.data.split(task, split, rows)))

    def start_name(self, arm: ArmSettings, start: str) -> str:
        """Name of what a run starts from, as digests and loaded bases are kept by."""
        return f"{BASE} {arm.name}" if start == BASE else start

    def digest_of(self, arm: ArmSettings, start: str) -> str:
        """Digest of what a run starts from."""
        if start != BASE:
            return self._digests[start]
        return self.bases.digest(arm)

    def base_of(self, arm: ArmSettings, start: str) -> Base:
        """What a run starts from; the last ones stay in memory."""
        name = self.start_name(arm, start)
        if name not in self._loaded:
            folder = self.bases.folder(arm) if start == BASE else self.kept_folder(start)
            self._loaded[name] = load_base(folder)
            while len(self._loaded) > MOST_BASES:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def kept_folder(self, name: str) -> storage.PathLike:
        """Folder of a kept run's weights, as a base."""
        return self.root / "kept" / name

    def do(self, what: str, runs: Sequence[ArmRun]) -> None:
        """Runs a stage of several runs, those that are not done.

        Raises:
            Stopped: by SIGTERM, during training.
        """
        with self.clock.stage(what), StageLine(what, len(runs), "run") as line:
            for run in runs:
                self._do_one(run)
                line.step()

    def _do_one(self, run: ArmRun) -> None:
        digest = run.digest(self.config, self.digest_of(run.arm, run.start))
        self._digests[run.name] = digest
        folder, kept = self.root / "runs" / run.name, self.kept_folder(run.name)
        keeps = run.keep and not _is_kept(kept, digest)
        if keeps or any(not self.scorer.is_done(run.name, target, digest) for target in run.scored):
            self._train_and_score(run, digest, keeps)
        if folder.exists():
            folder.rmtree()

    def _train_and_score(self, run: ArmRun, digest: str, keeps: bool) -> None:
        start = self.base_of(run.arm, run.start)
        if run.vector is not None:
            start = with_vector(start, run.vector.task, run.vector.others, run.vector.how, run.seed)
        if not run.steps:
            self._score(run, digest, start, {})
            return
        outcome = train(run.train_config(self.config, start.path), base=start, mesh=self.mesh,
                        data=CutTaskData.of(self.cuts, run.parts, run.seed))
        if outcome.stopped:
            raise Stopped
        params = self._score(run, digest, start, outcome.expert.overlay)
        if keeps:
            save_base(self.kept_folder(run.name), params, start.config, start.vocabulary_path, {
                "steps": outcome.step, "config_digest": digest, "started_from": start.fingerprint})
        tell_item(logger, "%s: %s", run.name, self.loss_of(run))

    def _score(self, run: ArmRun, digest: str, start: Base, overlay: Params) -> Params:
        """Scores the result of a run, as the network that it started from; returns its parameters."""
        network, params = families.network_of(start.config), trees.merge(start.params, overlay)
        self.scorer.score(run.name, digest, run.scored, lambda: (network, params), run.columns())
        return params

    def loss_of(self, run: ArmRun) -> str:
        """The mean target loss of a run in words, for progress lines."""
        return f"{mean_loss(self.store, run.name, run.scored, self.scorer):.3f} nats a token"

    def score_bases(self, wanted: Sequence[Target]) -> None:
        """Runs the stage that scores the arms' bases as they are."""
        with self.clock.stage("score the bases"), StageLine("scoring", len(self.config.arms), "base") as line:
            for arm in self.config.arms:
                columns = {"arm": arm.name, "setup": BASE, "seed": 0, "rows": 0, "steps": 0}
                self.scorer.score(f"{arm.name}-{BASE}", self.digest_of(arm, BASE), wanted,
                                  lambda arm=arm: resolve(self.base_of(arm, BASE), None), columns)
                line.step()

    def choose(self, kind: str, stage: StageSettings, parts: Sequence[tuple[TaskRows, ...]]) -> None:
        """Runs the stage of a grid: each arm chooses the rate and batch size of the lowest held-out loss.

        Args:
            kind: of the runs that the choice is for.
            stage: their settings.
            parts: a run of the grid is made on each of these.
        """
        runs, points = {}, grid(self.config)
        for arm in self.config.arms:
            for point in points:
                runs[arm.name, point] = [self._grid_run(kind, arm, stage, point, own) for own in parts]
        if len(points) > 1:
            self.do(f"choose settings: {kind}", [run for own in runs.values() for run in own])
        for arm in self.config.arms:
            losses = {point: self._grid_loss(runs[arm.name, point]) for point in points} if len(
                points) > 1 else {points[0]: 0.0}
            self.choices[arm.name, kind] = min(points, key=lambda point: losses[point])

    def _grid_run(self, kind: str, arm: ArmSettings, stage: StageSettings, point: GridPoint,
                  parts: tuple[TaskRows, ...]) -> ArmRun:
        tasks = [part.task for part in parts]
        label = parts[0].label if len(parts) == 1 else f"mix{len(parts)}"
        return ArmRun(
            f"grid-{kind}-{arm.name}-{label}-{point.rate:g}-{point.batch_size}", arm, f"grid {kind}", parts,
            stage, point, point.steps(stage, self.config.grid_share), targets(tasks, heldout=True),
            seed=self.config.random_seed)

    def _grid_loss(self, runs: Sequence[ArmRun]) -> float:
        losses = [mean_loss(self.store, run.name, run.scored, self.scorer) for run in runs]
        return sum(losses) / len(losses)

    def facts(self) -> dict[str, Any]:
        """The facts that the report needs beside the results."""
        config = self.config
        lengths = config.finetune.task_feature_lengths
        arms = []
        for arm in config.arms:
            cost = token_cost(families.network_of(arm.network), lengths["inputs"], lengths["targets"])
            arms.append({"name": arm.name, "origin": arm.origin, "reads_tasks": arm.reads_tasks,
                         "is_sparse": arm.is_sparse, "loss": arm.loss.facts(),
                         **dataclasses.asdict(cost),
                         "choices": {kind: dataclasses.asdict(point) for (name, kind), point
                                     in self.choices.items() if name == arm.name}})
        return {
            "schema_version": 1, "title": config.title, "command": self.command, "arms": arms,
            "lengths": dict(lengths), "stage_seconds": dict(self.clock.seconds),
            "programs": {"count": self.compiled.programs, "seconds": self.compiled.seconds},
            "versions": run_record.versions(), "config": plain_config(config)}


def report_arms(study: ArmStudy, kind: str) -> ArmsOutcome:
    """Runs a study's last stage: writes the facts of its kind beside the results, and the report."""
    results = study.root / "results"
    with study.clock.stage("report"):
        storage.write_json(results / "arms.json", {**study.facts(), "kind": kind})
        return write_arms_report(results, study.store, made=Made(study.command))


def run_arms(study: type[ArmStudy], check: Callable[[Any], None], config: ArmStudySettings,
             on_start: Callable[[], None] | None, command: str | None) -> ArmsOutcome | None:
    """Runs a study of arms, alone in its work folder; None if SIGTERM stopped it.

    Args:
        study: its class.
        check: of the config, before anything is written; raises InputError.
        config: the study's.
        on_start: called once the config is checked, before anything is written.
        command: that runs it, for the report; None for Python code.
    """
    try:
        with locks.alone(config.workdir):
            check(config)
            made = study(config, command)
            if on_start is not None:
                on_start()
            return made.run()
    except Stopped:
        return None


def _is_kept(folder: storage.PathLike, digest: str) -> bool:
    """Whether a folder holds the weights of the run of this digest."""
    return storage.is_committed(folder) and base_json.read(
        storage.as_path(folder))["training"].get("config_digest") == digest


def check_data(config: ArmStudySettings, task: str) -> None:
    """Raises InputError if a task has neither rows nor prepared arrays."""
    reason = registry.get_task(task).why_unavailable()
    if reason is not None and not (storage.as_path(config.workdir) / "prepared" / task).exists():
        raise InputError(describe("A task of the study cannot be prepared", where=task, got=reason,
                                  cure=f"set {DATA_DIR_VARIABLE} to the folder that holds the data sets"))


def plain_config(config: ArmStudySettings) -> dict[str, Any]:
    """A study's settings as plain values."""
    return as_json({**dataclasses.asdict(config), "arms": [plain_settings(arm) for arm in config.arms]})


def mean_loss(store: ResultsStore, model: str, wanted: Sequence[Target], scorer: Scorer) -> float:
    """Mean of a model's target losses over targets, which the store has."""
    losses = []
    for target in wanted:
        split = "heldout" if target.heldout else scorer.cuts.data.evaluation_split(target.task)
        losses += [row["value"] for row in store.rows_of(target.model_of(model), target.task, split)
                   if row["metric"] == TARGET_LOSS]
    return sum(losses) / len(losses)
