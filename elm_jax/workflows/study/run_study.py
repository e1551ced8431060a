"""Runs a study: the whole chain from one config; every stage skips work that is done.

base -> task arrays -> prompt experts -> dataset experts -> multitask baseline -> library -> routing ->
merging -> evaluation (the complete matrix of experts and tasks) -> comparison of routers -> report.
"""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import load_expert, save_expert
from elm_jax.reporting import study_report as reporting
from elm_jax.reporting.page_parts import Made
from elm_jax.runtime import hosts, locks, sharding, staging, storage
from elm_jax.runtime.preemption import Stopped
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.build_library import build_library
from elm_jax.workflows.evaluate.evaluate_models import (
    ScoredModel,
    ScoringSetup,
    evaluate_models,
    model_in,
    model_of,
)
from elm_jax.workflows.merge import in_memory as merging
from elm_jax.workflows.study import study_checks, study_results, study_routers, study_routing, study_runs
from elm_jax.workflows.study.study_config import StudyConfig
from elm_jax.workflows.study.study_results import ALL_DATASETS_ID
from elm_jax.workflows.study.study_runs import MULTITASK_ID, expert_config, pretrain_config
from elm_jax.workflows.train import run_record
from elm_jax.workflows.train.pretrain import check_same_base, pretrain
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_expert import train
from elm_jax.workflows.train.train_stack import StackSize, train_experts


class Study:
    """The stages of one study in one work folder."""

    def __init__(self, config: StudyConfig, command: str | None = None) -> None:
        self.command = command
        config = study_checks.expanded(config)
        study_checks.check(config)
        self.absent = hosts.by_first(lambda: study_checks.absent_tasks(config))
        self.config = config = study_checks.without(config, self.absent)
        self.root = storage.as_path(config.workdir)
        self.mesh: Mesh = study_checks.mesh_of(config)
        if config.pretrain is not None and storage.is_committed(self.root / "base" / "base"):
            check_same_base(self.root / "base" / "base", pretrain_config(config))
        self.made_of = run_record.MadeOf(self.root / "made_of.json")
        self.clock = run_record.StageClock(self.root / "stages.json")
        self.compiled = run_record.CompileCounter()
        self.base: Base | None = None
        self.data: TaskData | None = None

    def run(self) -> reporting.ReportOutcome:
        """Runs all stages in order.

        Raises:
            Stopped: by SIGTERM, during training.
        """
        config = self.config
        with self.clock.stage("pretrain the base"):
            self.base = self.make_base()
        with self.clock.stage("prepare tasks"):
            self.data = TaskData(self.base.vocabulary, config.modules, str(self.root / "prepared"))
            dataset_tasks = {name: self.data.tasks_of(name) for name in config.datasets}
            mixed = [task for tasks in dataset_tasks.values() for task in tasks]
            study_runs.prepare(config, self.data, [*mixed, *study_runs.multitask_tasks(config, self.data)])
        with self.clock.stage("train prompt experts"):
            prompts = self.train_prompts()
        with self.clock.stage("train dataset experts"):
            datasets = self.train_each("dataset expert", [
                expert_config(config, "dataset", f"{name}-de", name, config.dataset)
                for name in config.datasets])
        with self.clock.stage("train the multitask baseline"):
            multitask, = self.train_each("multitask baseline", [expert_config(
                config, "multitask", MULTITASK_ID, ",".join(config.multitask_names), config.multitask)])
        with self.clock.stage("build the library"):
            library = self.make_library(prompts)
        with self.clock.stage("route"):
            routing = hosts.by_first(lambda: self.route(library))
        with self.clock.stage("merge"):
            merged = self.merge_routed(prompts, routing, datasets)
        with self.clock.stage("evaluate"):
            store = self.evaluate(prompts + datasets, multitask, merged, routing, dataset_tasks)
        with self.clock.stage("compare routers"):
            tasks = study_routers.compared_tasks(study_results.plain(config), self.data)
            hosts.by_first(lambda: study_routers.compare_once(self.made_of, library, store, tasks))
        with self.clock.stage("report"):
            hosts.by_first(lambda: self.report(store, self.facts(prompts, datasets, routing, dataset_tasks)))
            return reporting.read_report(self.root / "results")

    def report(self, store: ResultsStore, facts: dict[str, Any]) -> None:
        """Runs the stage of the report."""
        storage.write_json(self.root / "results" / "study.json", facts)
        reporting.write_report(self.root / "results", store, made=Made(self.command))

    def make_base(self) -> Base:
        """Runs the stage of the base: pretrains it unless one is given."""
        if self.config.initial_checkpoint_path is not None:
            return load_base(self.config.initial_checkpoint_path, mesh=self.mesh,
                             rules=sharding.split_rules())
        base = pretrain(pretrain_config(self.config), mesh=self.mesh)
        if base is None:
            raise Stopped
        return base

    def train_prompts(self) -> list[ScoredModel]:
        """Runs the stage of the prompt experts, several at once if the config says so."""
        config = self.config
        configs = [expert_config(config, "prompt", task, task, config.prompt) for task in config.prompt_tasks]
        if config.stack_experts == 1:
            return self.train_each("prompt expert", configs)
        size = StackSize(config.stack_experts, config.stack_at_once)
        outcome = train_experts(configs, str(self.root / "experts"), size, base=self.base, data=self.data,
                                mesh=self.mesh)
        if outcome.stopped:
            raise Stopped
        outcome.check()
        return [self.model(expert_id, folder) for expert_id, folder in outcome.done.items()]

    def train_each(self, kind: str, configs: list[TrainConfig]) -> list[ScoredModel]:
        """Trains experts one after another, those that are not finished."""
        models = []
        with StageLine("training", len(configs), kind) as line:
            for config in configs:
                models.append(self.train_one(config))
                line.step()
        return models

    def train_one(self, config: TrainConfig) -> ScoredModel:
        """Runs the stage of one expert: trains it unless it is finished."""
        outcome = train(config, base=self.base, data=self.data, mesh=self.mesh)
        if outcome.stopped:
            raise Stopped
        return self.model(config.expert_id, storage.as_path(config.model_dir) / "expert")

    def model(self, expert_id: str, folder: storage.PathLike) -> ScoredModel:
        """An expert on disk as a scorable model, loaded when it is scored."""
        return model_in(self.base, folder, expert_id, self.mesh)

    def expert_folder(self, expert_id: str) -> storage.PathLike:
        """Folder of a trained expert."""
        return self.root / "experts" / expert_id / "expert"

    def make_library(self, prompts: list[ScoredModel]) -> ExpertLibrary:
        """Runs the stage of the library of prompt experts (from which RoE picks), in one process."""
        hosts.by_first(lambda: self._ensure_library(prompts))
        library = ExpertLibrary.open(self.root / "library")
        library.encoder = study_routing.RememberingEncoder(library.encoder)  # routed by, then compared
        return library

    def _ensure_library(self, prompts: list[ScoredModel]) -> None:
        with locks.alone(self.root / "library", locks.CHANGE_SECONDS):  # `elm library add` may change it
            self._make_library(prompts)

    def _make_library(self, prompts: list[ScoredModel]) -> None:
        path, config = self.root / "library", self.config
        made_of = {"experts": {model.id: model.fingerprint for model in prompts},
                   **study_routing.library_settings_of(config)}
        if self.made_of.fits("library", made_of) and (path / "library.json").exists():
            return
        staging.empty(path)  # not removed: its lock is on the folder itself
        build_library(
            path, [self.expert_folder(model.id) for model in prompts], self.data, encoder=config.encoder,
            text_format=config.text_format, instances_per_expert=config.instances_per_expert,
            means=config.means_per_expert, seed=config.random_seed)
        self.made_of.record("library", made_of)

    def route(self, library: ExpertLibrary) -> dict[str, Any]:
        """Runs the stage of routing: a decision for every target task, and how often routing finds home."""
        config, path = self.config, self.root / "routing.json"
        made_of = {"library": self.made_of.known["library"], "encoder": library.encoder.fingerprint,
                   **study_routing.settings_of(config)}
        if not self.made_of.fits("routing", made_of):
            path.unlink(missing_ok=True)
        routing = study_routing.route_study(config, library, self.data, path)
        self.made_of.record("routing", made_of)
        return routing

    def merge_routed(self, prompts: list[ScoredModel], routing: dict[str, Any],
                     datasets: list[ScoredModel]) -> dict[str, ScoredModel]:
        """Runs the stage of merging: the mean of the top k of every decision, and of all dataset experts."""
        by_id = {model.id: model for model in prompts}
        sets = {name: [by_id[member] for member in members]
                for name, members in study_routing.merged_sets(routing).items()}
        sets[ALL_DATASETS_ID], models = datasets, {}
        with StageLine("merging", len(sets), "set") as line:
            for name, members in sets.items():
                models[name] = self.merge_once(name, members)
                line.step()
        return models

    def merge_once(self, name: str, members: list[ScoredModel]) -> ScoredModel:
        """Merges a set of experts, unless their merged expert exists and has the same parents."""
        hosts.by_first(lambda: self._ensure_merged(name, members))
        return self.model(name, self.root / "merged" / name)

    def _ensure_merged(self, name: str, members: list[ScoredModel]) -> None:
        folder = self.root / "merged" / name
        made_of = {model.id: model.fingerprint for model in members}
        if not (self.made_of.fits(name, made_of) and storage.is_committed(folder)):
            experts = [load_expert(self.expert_folder(model.id)) for model in members]
            save_expert(folder, merging.merge(experts, expert_id=name))
            self.made_of.record(name, made_of)

    def evaluate(self, experts: list[ScoredModel], multitask: ScoredModel, merged: dict[str, ScoredModel],
                 routing: dict[str, Any], dataset_tasks: dict[str, list[str]]) -> ResultsStore:
        """Runs the stage of evaluation: experts, base and baseline on every task, merged ones on theirs."""
        config = self.config
        tasks_of = study_results.tasks_to_score(
            config, [model.id for model in (*experts, multitask)], routing, dataset_tasks)
        store = ResultsStore(self.root / "results")
        models = [model_of(self.base, None), multitask, *experts, *merged.values()]
        settings = EvaluationSettings(source_length=config.eval_source_length, tokens_per_batch=4096,
                                      max_new_tokens=config.max_new_tokens)
        setup = ScoringSetup(self.base, self.data, settings, self.mesh, max_rows=config.max_eval_rows)
        evaluate_models(models, lambda name: tasks_of.get(name, []), setup, store, replace=True,
                        stack_experts=config.stack_experts)
        return store

    def facts(self, prompts: list[ScoredModel], datasets: list[ScoredModel], routing: dict[str, Any],
              dataset_tasks: dict[str, list[str]]) -> dict[str, Any]:
        """The facts that the report needs beside the results."""
        config = self.config
        cards = [load_expert(self.expert_folder(model.id)).card for model in (*prompts, *datasets)]
        return {
            "schema_version": 1, "title": config.title, "command": self.command,
            **study_results.facts_of_models(cards, [model.id for model in prompts]),
            **study_results.facts_of_tasks(config, self.absent, dataset_tasks,
                                           study_runs.multitask_tasks(config, self.data)),
            **study_results.facts_of_routing(routing), "stage_seconds": dict(self.clock.seconds),
            "programs": {"count": self.compiled.programs, "seconds": self.compiled.seconds},
            "versions": run_record.versions(), "config": study_results.plain(config),
        }


def run_study(config: StudyConfig, *,
              on_start: Callable[[], None] | None = None,
              command: str | None = None) -> reporting.ReportOutcome | None:
    """Runs a study to its end; returns None if SIGTERM stopped it (the same call resumes it).

    Args:
        config: the study.
        on_start: called once the config is checked, before anything is written.
        command: that runs it, for the report; None for Python code.

    Raises:
        InputError: before anything is trained, for names, sizes and a work folder that do not fit, or that
            another process is writing.
    """
    try:
        with locks.alone(config.workdir):
            study = Study(config, command)
            if on_start is not None:
                on_start()
            return study.run()
    except Stopped:
        return None
