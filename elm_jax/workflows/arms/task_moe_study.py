"""The study of task-aware gates: low resource, sample efficiency, robustness to unrelated tasks.

bases -> grid -> low resource -> the pool's networks -> few rows -> robustness -> report.
"""

from collections.abc import Callable, Iterator, Sequence

from elm_jax.data.registry import registry
from elm_jax.errors import unknown_name
from elm_jax.reporting.arms.arms_report import ArmsOutcome
from elm_jax.workflows.arms.arm_runs import ArmRun, TaskVector, targets
from elm_jax.workflows.arms.arm_settings import ArmSettings
from elm_jax.workflows.arms.arm_study import ArmStudy, check_data, report_arms, run_arms
from elm_jax.workflows.arms.cut_rows import TaskRows
from elm_jax.workflows.arms.new_task_vectors import DRAWN, MEAN_OF_ALL, RELATED
from elm_jax.workflows.arms.task_moe_config import TaskStudyConfig

LOW, POOL, FEW, ROBUST = SETUPS = ("low", "pool", "few", "robust")
ALONE, WITH_RELATED, WITH_UNRELATED = BESIDE = ("nothing", "related", "unrelated")
OLD, OLD_AND_NEW = ("old", "old and new")
TUNE = "tune"


class TaskStudy(ArmStudy):
    """The stages of the study of task-aware gates."""

    config: TaskStudyConfig

    def run(self) -> ArmsOutcome:
        """Runs all stages in order; see `ArmStudy.run`."""
        config = self.config
        with self.clock.stage("make the bases"):
            self.make_bases()
        with self.clock.stage("prepare tasks"):
            self.prepare(config.all_tasks, config.all_tasks)
        self.choose(TUNE, config.tune, [self.mixed(config.old_tasks)])
        self.do("low resource", list(self.low()))
        self.do("train on the pool", list(self.pools()))
        self.do("learn from few rows", list(self.few()))
        self.do("robustness", list(self.robust()))
        return report_arms(self, "task")

    def mixed(self, tasks: Sequence[str]) -> tuple[TaskRows, ...]:
        """Tasks of a mixture, each with as many rows at most."""
        return tuple(TaskRows(task, self.config.mixed_rows) for task in tasks)

    def low(self) -> Iterator[ArmRun]:
        """Each target, cut to few rows, alone and beside others; equal steps a task."""
        config = self.config
        for target in config.target_tasks:
            for rows in config.low_rows:
                for beside in BESIDE:
                    others = {ALONE: (), WITH_RELATED: config.related[target],
                              WITH_UNRELATED: config.unrelated[target]}[beside]
                    parts = (TaskRows(target, rows, config.mixed_rows), *self.mixed(others))
                    for arm in config.arms:
                        yield from self._low_runs(arm, parts, beside)

    def _low_runs(self, arm: ArmSettings, parts: tuple[TaskRows, ...], beside: str) -> Iterator[ArmRun]:
        config, point = self.config, self.choices[arm.name, TUNE]
        target = parts[0]
        for seed in config.seeds:
            yield ArmRun(
                f"{LOW}-{arm.name}-{target.label}-{beside}-s{seed}", arm, LOW, parts, config.finetune, point,
                point.steps(config.finetune, len(parts)), targets([target.task]), seed=seed,
                facts={"with": beside, "rows": target.rows})

    def pools(self) -> Iterator[ArmRun]:
        """Every arm on all tasks but the targets, kept."""
        config = self.config
        for arm in config.arms:
            point = self.choices[arm.name, TUNE]
            yield ArmRun(
                self.pool_name(arm), arm, POOL, self.mixed(config.pool), config.tune, point,
                point.steps(config.tune), targets(config.pool), seed=config.pool_seed, keep=True)

    def pool_name(self, arm: ArmSettings) -> str:
        """Name of an arm's run on the pool."""
        return f"{POOL}-{arm.name}"

    def few(self) -> Iterator[ArmRun]:
        """Each target from the pool's network, by number of rows and by what its task's vector is made of."""
        config = self.config
        for target in config.target_tasks:
            for rows in config.few_rows:
                for arm in config.arms:
                    for start in (RELATED, DRAWN, MEAN_OF_ALL) if arm.reads_tasks else (None,):
                        yield from self._few_runs(arm, target, rows, start)

    def _few_runs(self, arm: ArmSettings, target: str, rows: int, start: str | None) -> Iterator[ArmRun]:
        config, point = self.config, self.choices[arm.name, TUNE]
        related = [task for task in config.related[target] if task in config.pool]
        others = related if start == RELATED else config.pool
        for seed in config.seeds:
            yield ArmRun(
                f"{FEW}-{arm.name}-{target}-{rows}-{start or 'own'}-s{seed}", arm, FEW,
                (TaskRows(target, rows),), config.finetune, point,
                point.steps(config.finetune, config.few_share) if rows else 0, targets([target]),
                start=self.pool_name(arm), seed=seed,
                vector=None if start is None else TaskVector(target, tuple(others), start),
                facts={"shots": rows, "rows": None, "start": start})

    def robust(self) -> Iterator[ArmRun]:
        """Every arm on the old tasks, and on old and new ones, at equal steps a task."""
        config = self.config
        for arm in config.arms:
            both = (*config.old_tasks, *config.new_tasks)
            for words, tasks in ((OLD, config.old_tasks), (OLD_AND_NEW, both)):
                for seed in config.seeds:
                    point = self.choices[arm.name, TUNE]
                    share = len(tasks) / len(config.old_tasks)
                    yield ArmRun(
                        f"{ROBUST}-{arm.name}-{words.replace(' ', '_')}-s{seed}", arm, ROBUST,
                        self.mixed(tasks), config.tune, point, point.steps(config.tune, share),
                        targets(tasks), seed=seed, facts={"with": words, "rows": None})


def check_task_study(config: TaskStudyConfig) -> None:
    """Raises InputError for the first fault in names and data that would end the study later."""
    registry.import_tasks(config.modules)
    for name in config.all_tasks:
        if name not in registry.task_names():
            raise unknown_name("task", name, registry.task_names(), where="task_study")
        check_data(config, name)
    registry.check_trainable(config.all_tasks)


def run_task_study(config: TaskStudyConfig, *, on_start: Callable[[], None] | None = None,
                   command: str | None = None) -> ArmsOutcome | None:
    """Runs the study of task-aware gates; None if SIGTERM stopped it (the same call resumes it).

    Args:
        config: the study.
        on_start: called once the config is checked, before anything is written.
        command: that runs it, for the report; None for Python code.

    Raises:
        InputError: before anything is trained, for names and data that do not fit, or a work folder that
            another process is writing.
    """
    return run_arms(TaskStudy, check_task_study, config, on_start, command)
