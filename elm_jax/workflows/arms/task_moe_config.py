"""The config of the study of task-aware gates (gin: ``task_study.*``)."""

import dataclasses

from elm_jax.errors import InputError, describe
from elm_jax.runtime.config_checks import check_positive
from elm_jax.workflows.arms.arm_settings import ArmStudySettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskStudyConfig(ArmStudySettings):
    """Settings of the study of gates that read tasks; see `ArmStudySettings` for the others.

    Low resource: each target task is cut to few rows and learnt alone, beside related tasks and beside
    unrelated ones. Sample efficiency: a network that was trained on a pool without the targets learns each
    from 0 rows upwards, its task's vector made of related tasks', of all tasks', or drawn. Robustness: old
    tasks together, then with new ones that have nothing to do with them, at equal steps an old task.

    Attributes:
        target_tasks: tasks with few rows.
        related: by target, tasks like it.
        unrelated: by target, tasks unlike it.
        low_rows: rows of a target beside others, each number apart, rising.
        mixed_rows: rows of each other task beside it; the target's rows are repeated until they are as many.
        few_rows: rows of a target that is learnt from the pool's network, each number apart, rising from 0.
        few_share: share of the steps that such a run has.
        old_tasks: the tasks of the robustness part.
        new_tasks: that are added to them.
        pool_seed: of the pool's network.
    """

    target_tasks: tuple[str, ...]
    related: dict[str, tuple[str, ...]]
    unrelated: dict[str, tuple[str, ...]]
    old_tasks: tuple[str, ...]
    new_tasks: tuple[str, ...]
    low_rows: tuple[int, ...] = (32, 128, 512)
    mixed_rows: int = 512
    few_rows: tuple[int, ...] = (0, 16, 32, 64, 128)
    few_share: float = 0.5
    pool_seed: int = 0

    TUPLES = (*ArmStudySettings.TUPLES, "target_tasks", "old_tasks", "new_tasks", "low_rows", "few_rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("related", "unrelated"):
            object.__setattr__(self, name, {target: tuple(tasks) for target, tasks
                                            in getattr(self, name).items()})
        check_positive(mixed_rows=self.mixed_rows, few_share=self.few_share)
        for name in ("target_tasks", "low_rows", "few_rows", "old_tasks", "new_tasks"):
            self.check_names(f"task_study.{name}", getattr(self, name))
        for name in ("low_rows", "few_rows"):
            if list(getattr(self, name)) != sorted(getattr(self, name)):
                raise InputError(describe("Numbers of rows rise", where=f"task_study.{name}",
                                          got=getattr(self, name)))
        if self.few_rows[0] or len(self.few_rows) < 2:
            raise InputError(describe("Learning from few rows begins with none", where="task_study.few_rows",
                                      got=self.few_rows, expected="0 and larger numbers"))
        for name in ("related", "unrelated"):
            given = getattr(self, name)
            if set(given) != set(self.target_tasks) or not all(given.values()):
                raise InputError(describe("Every target has related and unrelated tasks",
                                          where=f"task_study.{name}", got=sorted(given),
                                          expected=sorted(self.target_tasks)))
        for target in self.target_tasks:
            self.check_names(f"the tasks beside {target}",
                             [target, *self.related[target], *self.unrelated[target]])
        self.check_names("task_study.old_tasks and new_tasks", [*self.old_tasks, *self.new_tasks])
        self._check_gates()

    @property
    def pool(self) -> tuple[str, ...]:
        """Tasks of the network that learns the targets from few rows: all beside them but the targets."""
        beside = [task for kind in (self.related, self.unrelated) for own in kind.values() for task in own]
        return tuple(task for task in dict.fromkeys(beside) if task not in self.target_tasks)

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """All tasks that are trained on."""
        return tuple(dict.fromkeys([*self.target_tasks, *self.pool, *self.old_tasks, *self.new_tasks]))

    def _check_gates(self) -> None:
        for arm in self.arms:
            missing = [task for task in self.all_tasks if task not in arm.network.sparse.tasks
                       ] if arm.reads_tasks else []
            if missing:
                raise InputError(describe(
                    "A gate that reads tasks knows all tasks of the study from the start",
                    where=f"arm {arm.name}: SparseConfig.tasks", got=f"no {', no '.join(missing[:5])}",
                    expected="a name for each"))
