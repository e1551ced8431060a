"""The study of instruction tuning: do sparse networks gain more from it than dense ones of equal cost?

bases -> grid -> (i) each task alone -> (ii) instruction tuning on growing mixtures -> (iii) each task from
the tuned base -> ablations -> report.
"""

from collections.abc import Callable, Iterator

from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.reporting.arms.arms_report import ArmsOutcome
from elm_jax.workflows.arms.arm_runs import ArmRun, Changes, Target, targets
from elm_jax.workflows.arms.arm_settings import BASE, ArmSettings
from elm_jax.workflows.arms.arm_study import ArmStudy, check_data, report_arms, run_arms
from elm_jax.workflows.arms.cut_rows import TaskRows
from elm_jax.workflows.arms.flan_config import FlanStudyConfig

ALONE, TUNED, TUNED_ALONE = SETUPS = ("i", "ii", "iii")
"""Set-ups: each task alone from the base; the tuned base as it is; each task alone from the tuned base."""
ABLATION = "ablation"
FINETUNE, TUNE = "finetune", "tune"
"""Kinds of runs, for which arms choose rate and batch size apart."""
CHANGES = {
    "freeze gate": Changes(freeze="gate"), "freeze experts": Changes(freeze="experts"),
    "freeze sparse layers": Changes(freeze="sparse layers"),
    "no balance loss": Changes(without=("balance_loss",)),
    "no router z-loss": Changes(without=("router_z_loss",)),
}
"""By ablation, what its run does in another way."""


class FlanStudy(ArmStudy):
    """The stages of the study of instruction tuning."""

    config: FlanStudyConfig

    def run(self) -> ArmsOutcome:
        """Runs all stages in order; see `ArmStudy.run`."""
        config = self.config
        with self.clock.stage("make the bases"):
            self.make_bases()
        with self.clock.stage("prepare tasks"):
            self.prepare([*config.finetune_tasks, *config.tuning_tasks],
                         [*config.finetune_tasks, *config.unseen_tasks])
        self.score_bases(self.scored_when_tuned())
        self.choose(TUNE, config.tune, [self.mixture(config.tuning_counts[-1])])
        self.choose(FINETUNE, config.finetune, [
            (TaskRows(task, config.grid_rows),) for task in config.finetune_tasks[:config.grid_tasks]])
        self.do("(i) each task alone", list(self.alone(ALONE)))
        self.do("(ii) instruction tuning", list(self.tuning()))
        self.do("(iii) each task from the tuned base", list(self.alone(TUNED_ALONE)))
        if config.ablated_arm is not None:
            self.do("ablations", list(self.ablated()))
        return report_arms(self, "flan")

    def mixture(self, count: int) -> tuple[TaskRows, ...]:
        """The first tasks of the instruction tuning, with all their rows."""
        return tuple(map(TaskRows, self.config.tuning_tasks[:count]))

    def scored_when_tuned(self) -> tuple[Target, ...]:
        """What a tuned base is scored on as it is: tasks that it has not seen, without and with exemplars."""
        config = self.config
        tasks = (*config.finetune_tasks, *config.unseen_tasks)
        more = targets(tasks, few_shot=config.few_shot) if config.few_shot else ()
        return (*targets(tasks), *more)

    def alone(self, setup: str) -> Iterator[ArmRun]:
        """The runs of (i), or of (iii): each task alone, by number of rows, arm and seed."""
        config = self.config
        most = max(config.finetune_rows)
        for task in config.finetune_tasks:
            for rows in config.finetune_rows:
                for arm in config.arms:
                    for seed in config.seeds:
                        part, point = TaskRows(task, rows), self.choices[arm.name, FINETUNE]
                        share = max(rows / most, config.least_share)
                        yield ArmRun(
                            f"{setup}-{arm.name}-{part.label}-s{seed}", arm, setup, (part,), config.finetune,
                            point, point.steps(config.finetune, share), targets([task]), seed=seed,
                            start=BASE if setup == ALONE else self.tuned_name(
                                arm, config.tuning_counts[-1], config.tuning_seeds[0]))

    def tuned_name(self, arm: ArmSettings, count: int, seed: int) -> str:
        """Name of the run that tunes an arm on the first `count` tasks."""
        return f"ii-{arm.name}-mix{count}-s{seed}"

    def tuning(self) -> Iterator[ArmRun]:
        """The runs of (ii): by number of tasks, arm and seed; the first seed of all tasks is kept."""
        config = self.config
        for count in config.tuning_counts:
            whole = count == config.tuning_counts[-1]
            for arm in config.arms:
                for seed in config.tuning_seeds:
                    point = self.choices[arm.name, TUNE]
                    scored = self.scored_when_tuned() if whole else targets(
                        (*config.finetune_tasks, *config.unseen_tasks))
                    yield ArmRun(
                        self.tuned_name(arm, count, seed), arm, TUNED, self.mixture(count), config.tune,
                        point, point.steps(config.tune), scored, seed=seed,
                        keep=whole and seed == config.tuning_seeds[0], facts={"tuned_on": count})

    def ablated(self) -> Iterator[ArmRun]:
        """The runs of the ablations: instruction tuning on all tasks, with one thing changed."""
        config = self.config
        arm, seed = config.arm(config.ablated_arm), config.tuning_seeds[0]
        point = self.choices[arm.name, TUNE]
        for name in config.ablations:
            yield ArmRun(
                f"ablation-{arm.name}-{name.replace(' ', '_')}", arm, ABLATION,
                self.mixture(config.tuning_counts[-1]), config.tune, point, point.steps(config.tune),
                targets((*config.finetune_tasks, *config.unseen_tasks)), seed=seed, changes=CHANGES[name],
                facts={"ablation": name})


def check_flan_study(config: FlanStudyConfig) -> None:
    """Raises InputError for the first fault in names and data that would end the study later."""
    registry.import_tasks(config.modules)
    for field in ("finetune_tasks", "tuning_tasks", "unseen_tasks"):
        for name in getattr(config, field):
            if name not in registry.task_names():
                raise unknown_name("task", name, registry.task_names(), where=f"flan_study.{field}")
            check_data(config, name)
    registry.check_trainable([*config.finetune_tasks, *config.tuning_tasks])
    seen = {_dataset(name): name for name in config.tuning_tasks}
    for name in (*config.finetune_tasks, *config.unseen_tasks):
        if _dataset(name) in seen:
            raise InputError(describe(
                "Instruction tuning would see a data set that it is scored on as unseen",
                where=f"flan_study: {name}", got=f"tuning task {seen[_dataset(name)]}",
                cure="take one of them out"))


def _dataset(name: str) -> str:
    task = registry.get_task(name)
    return dataset_path(task.dataset, task.config)


def run_flan_study(config: FlanStudyConfig, *, on_start: Callable[[], None] | None = None,
                   command: str | None = None) -> ArmsOutcome | None:
    """Runs the study of instruction tuning; None if SIGTERM stopped it (the same call resumes it).

    Args:
        config: the study.
        on_start: called once the config is checked, before anything is written.
        command: that runs it, for the report; None for Python code.

    Raises:
        InputError: before anything is trained, for names and data that do not fit, or a work folder that
            another process is writing.
    """
    return run_arms(FlanStudy, check_flan_study, config, on_start, command)
