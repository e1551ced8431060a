"""The config of the study of instruction tuning: sparse against dense networks (gin: ``flan_study.*``)."""

import dataclasses

from elm_jax.errors import InputError, describe
from elm_jax.runtime.config_checks import check_positive, check_range
from elm_jax.workflows.arms.arm_settings import ArmStudySettings

ABLATIONS = ("freeze gate", "freeze experts", "freeze sparse layers", "no balance loss", "no router z-loss")
"""What a run of the ablations does in another way, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlanStudyConfig(ArmStudySettings):
    """Settings of the study of instruction tuning; see `ArmStudySettings` for the others.

    Each task of `finetune_tasks` is learnt (i) from an arm's base and (iii) from its instruction-tuned base,
    and (ii) scored on that one as it is. No data set of theirs is among those of `tuning_tasks`, so all three
    are scored on the same rows of tasks that instruction tuning does not see.

    Attributes:
        finetune_tasks: tasks that are learnt alone.
        finetune_rows: rows that they are learnt from, each number apart.
        tuning_tasks: tasks of the instruction tuning, the mixtures' first ones first.
        tuning_counts: so many of them make a mixture, each number apart, rising; the last one is what (ii)
            and (iii) mean.
        tuning_seeds: instruction tuning is done once with each; (iii) starts from the first.
        unseen_tasks: more tasks that (ii) is scored on.
        few_shot: exemplars of the few-shot scores; 0 for none.
        grid_tasks: how many of `finetune_tasks` the grid of their settings is tried on.
        grid_rows: rows of each then.
        least_share: share of the steps that a run on few rows has at least; else the steps go with the rows.
        ablated_arm: name of the arm of the ablations; None for no ablations.
        ablations: some of `ABLATIONS`.
    """

    finetune_tasks: tuple[str, ...]
    tuning_tasks: tuple[str, ...]
    finetune_rows: tuple[int, ...] = (250, 2500)
    tuning_counts: tuple[int, ...] = (1, 3, 6, 12)
    tuning_seeds: tuple[int, ...] = (0,)
    unseen_tasks: tuple[str, ...] = ()
    few_shot: int = 0
    grid_tasks: int = 2
    grid_rows: int = 250
    least_share: float = 0.3
    ablated_arm: str | None = None
    ablations: tuple[str, ...] = ABLATIONS

    TUPLES = (*ArmStudySettings.TUPLES, "finetune_tasks", "finetune_rows", "tuning_tasks", "tuning_counts",
              "tuning_seeds", "unseen_tasks", "ablations")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(grid_tasks=self.grid_tasks, grid_rows=self.grid_rows)
        check_range("few_shot", self.few_shot, 0)
        for name in ("finetune_tasks", "finetune_rows", "tuning_tasks", "tuning_counts", "tuning_seeds"):
            self.check_names(f"flan_study.{name}", getattr(self, name))
        counts = self.tuning_counts
        if list(counts) != sorted(counts) or counts[0] < 1 or counts[-1] != len(self.tuning_tasks):
            raise InputError(describe("The mixtures are the first of the tuning tasks, the last all of them",
                                      where="flan_study.tuning_counts", got=counts,
                                      expected=f"rising numbers, the last {len(self.tuning_tasks)}"))
        if self.grid_tasks > len(self.finetune_tasks):
            raise InputError(describe("The grid is tried on more tasks than there are",
                                      where="flan_study.grid_tasks", got=self.grid_tasks,
                                      expected=f"at most {len(self.finetune_tasks)}"))
        self._check_ablations()

    def _check_ablations(self) -> None:
        if self.ablated_arm is None:
            return
        found = [arm for arm in self.arms if arm.name == self.ablated_arm]
        if not found or not found[0].is_sparse:
            raise InputError(describe("The ablations are of an arm with experts",
                                      where="flan_study.ablated_arm", got=self.ablated_arm,
                                      expected=[arm.name for arm in self.arms if arm.is_sparse]))
        unknown = [name for name in self.ablations if name not in ABLATIONS]
        without = [name for name, loss in (
            ("no balance loss", found[0].loss.balance_loss),
            ("no router z-loss", found[0].loss.router_z_loss))
                   if name in self.ablations and not loss]
        if unknown or without:
            raise InputError(describe(
                "An ablation is unknown or takes nothing away", where="flan_study.ablations",
                got=[*unknown, *without], expected=f"some of {', '.join(ABLATIONS)}, of what the arm has"))
