"""Settings of a training run: what solo runs and stacks share, and what each has of its own.

A setting has the same name here as in the configs of the verbs (`TrainConfig`, `PretrainConfig`,
`StageSettings`), so `RunSettings.of` can copy it by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from elm_jax.errors import InputError, describe
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import Network, is_router
from elm_jax.runtime import sharding, trees
from elm_jax.training.early_end import EarlyEnd
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.step import StepConfig


def check_losses(loss: LossConfig, network: Network) -> None:
    """Checks that every loss that is asked for has an effect on a network.

    Raises:
        InputError: a loss of sparse layers, and the network has none, or none above its frozen trunk.
    """
    if not loss.of_sparse_layers:
        return
    routers = [path for path in trees.flatten(network.abstract_params()) if is_router(path)]
    depth = getattr(network, "trunk", 0)
    if not any(depth == 0 or network.depth_of(path) >= depth for path in routers):
        name = loss.of_sparse_layers[0]
        raise InputError(describe(
            "This loss has no effect: no layer is sparse" + " above the frozen ones" * bool(routers),
            where=f"LossConfig.{name}", got=getattr(loss, name), expected="0",
            cure="leave it out" + ", or give a sparse base" * (not routers)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run trains, what it logs and what it leaves on disk; shared by solo runs and stacks.

    Attributes:
        model_dir: folder of checkpoints and metrics; None keeps everything in memory.
        checkpoint_period: steps between checkpoints; one more is saved at the end.
        keep_checkpoints: how many checkpoints stay.
        log_period: steps between rows of metrics.
        tensorboard: whether TensorBoard files are written too.
        optimizer: optimiser and learning rate.
        loss: of tokens and of sparse layers; plain cross-entropy by default.
        num_microbatches: parts into which a batch is cut to save memory.
        base_dtype: dtype of frozen kernels and embeddings on the devices; None keeps that of the base.
        rules: sharding rules, from logical axes of the network to axes of the mesh.
        config_digest: hash of the run's whole config; only a run with the same hash resumes its folder.
        settings: the whole config and its base, JSON-ready, which name what differs when another run's folder
            is refused.
        name: shown in the progress line; None shows no line.
    """

    model_dir: str | None = None
    checkpoint_period: int = 1000
    keep_checkpoints: int = 2
    log_period: int = 1
    tensorboard: bool = False
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    num_microbatches: int = 1
    base_dtype: str | None = None
    rules: sharding.Rules = sharding.DEFAULT_RULES
    config_digest: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None

    LEAST: ClassVar[dict[str, int]] = {
        "num_microbatches": 1, "checkpoint_period": 1, "keep_checkpoints": 1, "log_period": 1}
    """The smallest valid value of each whole number."""

    def __post_init__(self) -> None:
        for field, low in self.LEAST.items():
            value = getattr(self, field)
            if type(value) is not int or value < low or value >= 2**31:
                raise InputError(
                    describe("Training setting is wrong", where=f"{type(self).__name__}.{field}",
                             got=repr(value), expected=f"an integer, at least {low}")
                )

    def step_config(self, network: Network) -> StepConfig:
        """The settings of one training step of a network.

        Raises:
            InputError: as `check_losses`.
        """
        check_losses(self.loss, network)
        return StepConfig(network, self.optimizer, self.loss, self.num_microbatches)

    @classmethod
    def of(cls, config: Any, **others: Any) -> Self:
        """Copies every setting that a verb's config has under the same name.

        Args:
            config: a dataclass, for example a `TrainConfig`.
            **others: settings that the config does not have, or that differ from its own.
        """
        names = {field.name for field in dataclasses.fields(config)}
        shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)
                  if field.name in names}
        return cls(**{**shared, **others})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """Settings of a solo run.

    Attributes:
        train_steps: number of updates over all sessions of the run.
        random_seed: seed of dropout.
        donate_overlay: whether the run takes over the buffers of the overlay that it is given, so that the
            devices never hold two copies of the trained leaves.
    """

    train_steps: int
    random_seed: int = 0
    donate_overlay: bool = False
    name: str | None = "train"

    LEAST: ClassVar[dict[str, int]] = {"train_steps": 1, "random_seed": 0, **RunSettings.LEAST}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(RunSettings):
    """Settings that all experts of a stack share. Seed, length and learning rate are each expert's own.

    `model_dir` holds the stack's checkpoints, and `checkpoint_period` counts steps of the whole stack;
    `log_period` counts steps of each expert. The optimiser's learning rate is not used.

    Attributes:
        size: number of slots, E.
        at_once: how many experts of each part of the mesh's expert axis are computed at once, at most; the
            others wait their turn within the same step. None computes all at once.
        early_end: rule by which an expert may end before its last step; None trains every step.
    """

    size: int
    at_once: int | None = None
    early_end: EarlyEnd | None = None
    name: str | None = "stack"
