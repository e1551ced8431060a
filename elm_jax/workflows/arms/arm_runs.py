"""One run of a study of arms: what it trains, from where, on which rows, and on what it is scored."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.runtime import storage
from elm_jax.workflows.arms.arm_settings import BASE, ArmSettings, ArmStudySettings, GridPoint
from elm_jax.workflows.arms.cut_rows import TaskRows
from elm_jax.workflows.study.study_config import StageSettings
from elm_jax.workflows.train import run_record
from elm_jax.workflows.train.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Target:
    """Rows that a model is scored on.

    Attributes:
        task: name.
        heldout: whether they are the held-out rows of its train split; else those of its evaluation split.
        few_shot: exemplars before each input.
    """

    task: str
    heldout: bool = False
    few_shot: int = 0

    def model_of(self, name: str) -> str:
        """The name under which results hold a model's score here."""
        return f"{name}+{self.few_shot}shot" if self.few_shot else name


def targets(tasks: Sequence[str], *, heldout: bool = False, few_shot: int = 0) -> tuple[Target, ...]:
    """Targets of several tasks."""
    return tuple(Target(task, heldout, few_shot) for task in tasks)


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a run does in another way than its arm's others; for ablations.

    Attributes:
        freeze: leaves that do not train, as `TrainConfig.freeze` names them; None for none.
        without: losses of the arm's that it leaves out.
    """

    freeze: str | None = None
    without: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskVector:
    """How a run's task gets its vector, in a network whose gates read tasks.

    Attributes:
        task: that gets it.
        others: tasks that it is made of.
        how: one of `new_task_vectors.VECTORS`.
    """

    task: str
    others: tuple[str, ...]
    how: str


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """One training run of a study, and what its result is scored on.

    Attributes:
        name: of the run, unique in its study: a folder's name.
        arm: that is trained.
        setup: which part of the study the run belongs to; results are tabled by it.
        parts: tasks and rows.
        stage: settings of the training, but for rate, batch size and steps.
        point: rate and batch size.
        steps: of the run; 0 scores what it starts from.
        scored: what it is scored on.
        start: name of a kept run, or `BASE` for the arm's base.
        seed: of rows, order and dropout.
        keep: whether later runs start from the result.
        changes: for ablations.
        vector: how its task gets a vector before the first step; None leaves the table as it is.
        facts: more columns of its result rows.
    """

    name: str
    arm: ArmSettings
    setup: str
    parts: tuple[TaskRows, ...]
    stage: StageSettings
    point: GridPoint
    steps: int
    scored: tuple[Target, ...]
    start: str = BASE
    seed: int = 0
    keep: bool = False
    changes: Changes = Changes()
    vector: TaskVector | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def columns(self) -> dict[str, Any]:
        """Columns that say, in its result rows, what the run is."""
        rows = {part.rows for part in self.parts}
        return {"arm": self.arm.name, "setup": self.setup, "seed": self.seed, "steps": self.steps,
                "learning_rate": self.point.rate, "batch_size": self.point.batch_size,
                "tasks": [part.task for part in self.parts],
                "rows": rows.pop() if len(rows) == 1 else None, **self.facts}

    def train_config(self, config: ArmStudySettings, start: storage.PathLike) -> TrainConfig:
        """The run as `train` takes it; the rows are those of its task data.

        Args:
            config: of the study.
            start: folder of the base that it starts from.
        """
        settings = self.stage.for_training()
        settings |= {"train_steps": max(1, self.steps), "batch_size": self.point.batch_size,
                     "optimizer": dataclasses.replace(self.stage.optimizer, learning_rate=self.point.rate),
                     "loss": dataclasses.replace(self.arm.loss, **dict.fromkeys(self.changes.without, 0.0)),
                     "freeze": self.changes.freeze}
        return TrainConfig(
            model_dir=str(storage.as_path(config.workdir) / "runs" / self.name),
            task=",".join(part.task for part in self.parts),
            initial_checkpoint_path=str(start), kind="dataset" if len(self.parts) == 1 else "multitask",
            **settings, random_seed=self.seed, keep_checkpoints=1,
            modules=config.modules, expert_id=self.name, tensorboard=False)

    def digest(self, config: ArmStudySettings, start: str) -> str:
        """Hash of all that decides the run's result.

        Args:
            config: of the study.
            start: digest of what it starts from.
        """
        settings = self.train_config(config, "").deciding()
        parts = [dataclasses.asdict(part) for part in self.parts]
        vector = self.vector and dataclasses.asdict(self.vector)
        return run_record.digest([settings, start, parts, config.heldout_rows, config.random_seed, vector,
                                  self.steps])
