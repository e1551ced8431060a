"""Settings of studies that compare networks: the arms, and what both such studies share."""

import dataclasses
import math
from typing import Any

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models import families
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import check_choice, check_positive, check_range, check_types
from elm_jax.training.run_settings import check_losses
from elm_jax.workflows.study.study_config import StageSettings

CONTINUED, UPCYCLED, SCRATCH, REGATED = ORIGINS = ("continued", "upcycled", "scratch", "regated")
"""Where an arm's network comes from: the first arm's base, that base made sparse, nothing, or the finished
base of another arm with other gates."""
BASE = "base"
"""Name of an arm's pretrained base, from which its runs begin."""


@dataclasses.dataclass(frozen=True)
class ArmSettings:
    """One network of a study (gin: scoped ``Arm``).

    Attributes:
        name: in results and tables.
        network: dimensions; of the first arm those of the first base.
        origin: one of `ORIGINS`.
        loss: of all of the arm's training: factors of the losses of its routers.
        of: name of the arm whose base gets other gates, for the origin ``regated``. Pretraining has no tasks,
            so networks whose gates read them begin so.
        upcycle_noise: of copies that an upcycled arm begins with, see `UpcycleConfig.noise`.
    """

    name: str
    network: NetworkConfig
    origin: str = CONTINUED
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    upcycle_noise: float = 0.0
    of: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        storage.require_name(self.name, "Arm.name", "name of an arm")
        check_choice("Arm.origin", self.origin, ORIGINS)
        check_range("upcycle_noise", self.upcycle_noise, 0)
        check_losses(self.loss, families.network_of(self.network))
        if self.upcycle_noise and self.origin != UPCYCLED:
            raise InputError(describe("Noise is of copies, and nothing is copied", where=f"arm {self.name}",
                                      got=f"origin {self.origin!r}", cure="leave upcycle_noise out"))
        if (self.of is None) == (self.origin == REGATED):
            raise InputError(describe(
                "Other gates are given to the base of one arm", where=f"arm {self.name}: of", got=self.of,
                expected=f"its name for the origin {REGATED!r}, else None"))
        if self.reads_tasks and self.origin != REGATED:
            raise InputError(describe(
                "Raw passages have no tasks, so gates that read tasks are not pretrained",
                where=f"arm {self.name}: origin", got=self.origin, expected=f"{REGATED!r}, of a sparse arm"))
        if self.origin in (UPCYCLED, REGATED) and not self.is_sparse:
            raise InputError(describe("A dense network is not upcycled", where=f"arm {self.name}",
                                      expected=f"a network with experts, or origin {CONTINUED!r}"))

    @property
    def is_sparse(self) -> bool:
        """Whether the network has experts."""
        return getattr(self.network, "sparse", None) is not None

    @property
    def reads_tasks(self) -> bool:
        """Whether the network's routers read the task of a row."""
        return self.is_sparse and self.network.sparse.gate != "token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmStudySettings:
    """Settings that all studies of arms share.

    Attributes:
        workdir: folder of everything that the study writes.
        title: heading of the report.
        modules: registries to import by name.
        passages: sources of raw passages, see `PretrainConfig.passages`.
        arms: the networks, the dense one that the others are compared with first.
        pretrain: settings of the first base's pretraining, and of the first part of an arm that begins from
            nothing.
        extra_steps: steps that every arm is pretrained for after that, from its origin.
        finetune: settings of runs on one task; its steps are those of a run on all rows.
        tune: settings of runs on several tasks together.
        rates: learning rates of the grid that each arm chooses from.
        batch_sizes: of the same grid; steps change with them, so that every run sees as many rows.
        grid_share: a run of the grid has this share of the steps.
        heldout_rows: rows of each train split that nothing is trained on, and the grid is scored on.
        max_eval_rows: at most this many validation rows a task.
        eval_source_length: tokens of an input at evaluation.
        source_buckets, target_buckets: as in `EvaluationSettings`; few of them mean few programs.
        vocab_pieces: pieces of the vocabulary, without the extra ids.
        character_coverage: see `PretrainConfig`.
        chunk_length: see `PretrainConfig`.
        prefix_lm_share: see `PretrainConfig`.
        seeds: runs on one task are made once with each.
        random_seed: of everything else.
    """

    workdir: storage.PathLike
    modules: tuple[str, ...]
    passages: tuple[str, ...]
    arms: tuple[ArmSettings, ...]
    pretrain: StageSettings
    finetune: StageSettings
    tune: StageSettings
    extra_steps: int
    title: str = "Sparse and dense networks"
    rates: tuple[float, ...] = (0.01, 0.02)
    batch_sizes: tuple[int, ...] = (4,)
    grid_share: float = 0.5
    heldout_rows: int = 200
    max_eval_rows: int = 500
    eval_source_length: int = 256
    source_buckets: tuple[int, ...] = (64, 256)
    target_buckets: tuple[int, ...] = (8, 32)
    vocab_pieces: int = 4000
    character_coverage: float = 0.9995
    chunk_length: int | None = None
    prefix_lm_share: float | None = None
    seeds: tuple[int, ...] = (0, 1)
    random_seed: int = 0

    TUPLES = ("modules", "passages", "arms", "rates", "batch_sizes", "source_buckets", "target_buckets",
              "seeds")
    """Fields that gin may give as lists."""

    def __post_init__(self) -> None:
        for name in self.TUPLES:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        check_positive(extra_steps=self.extra_steps, heldout_rows=self.heldout_rows,
                       max_eval_rows=self.max_eval_rows, eval_source_length=self.eval_source_length,
                       grid_share=self.grid_share,
                       **{f"rates[{n}]": rate for n, rate in enumerate(self.rates)},
                       **{f"batch_sizes[{n}]": size for n, size in enumerate(self.batch_sizes)})
        for name in ("rates", "batch_sizes", "seeds"):
            self.check_names(name, getattr(self, name))
        self.check_names("arms", [arm.name for arm in self.arms], least=2)
        if self.arms[0].origin == UPCYCLED or self.arms[0].is_sparse:
            raise InputError(describe("The first arm is the dense network that the others are compared with",
                                      where="arms", got=self.arms[0].name, cure="put the dense arm first"))
        for arm in self.arms:
            known = [other.name for other in self.arms if other.is_sparse and other.origin != REGATED]
            if arm.of is not None and arm.of not in known:
                raise unknown_name("sparse arm", arm.of, known, where=f"arm {arm.name}: of")
        for stage in ("pretrain", "finetune", "tune"):
            if getattr(self, stage).train_steps is None:
                raise InputError(describe("The arms are compared at equal steps", where=stage,
                                          got="epochs", expected="train_steps"))

    @staticmethod
    def check_names(field: str, values: Any, least: int = 1) -> None:
        """Raises InputError if a field has fewer values than `least`, or one of them twice."""
        if len(values) < least or len(set(values)) < len(values):
            raise InputError(describe("A study's list has too few values, or one twice", where=field,
                                      got=list(values), expected=f"at least {least}, each once"))

    def arm(self, name: str) -> ArmSettings:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def dense(self) -> ArmSettings:
        """The arm that the others are compared with."""
        return self.arms[0]


@dataclasses.dataclass(frozen=True)
class GridPoint:
    """A learning rate and a batch size, as an arm chooses them from the grid."""

    rate: float
    batch_size: int

    def steps(self, stage: StageSettings, share: float = 1.0) -> int:
        """Steps in which a run of a stage sees as many rows as with the stage's own batch size."""
        return max(1, math.ceil(share * stage.train_steps * stage.batch_size / self.batch_size))


def grid(config: ArmStudySettings) -> list[GridPoint]:
    """All points of a study's grid."""
    return [GridPoint(rate, size) for rate in config.rates for size in config.batch_sizes]
