"""Loss of an upcycled base before it is trained, beside that of the dense base: what raw gates cost.

Experts that are copies compute what the dense layer computes. A token's output is their sum, weighted by its
gates: with gates that are normalised to sum 1 the network is the dense one, and the loss is unchanged. Raw
gates are probabilities of K of E experts. Their sum is below 1, so each sparse layer gives that share of the
dense one, and the loss rises until training has made up for it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.evaluation.target_loss import TargetLoss, target_loss
from elm_jax.experts.base import Base, load_base
from elm_jax.models import families
from elm_jax.models.layers.sparse_config import TOKENS
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import sharding, storage
from elm_jax.runtime.config_checks import DEFAULT_MODULES

DENSE, RAW, NORMALISED = "dense", "raw", "normalised"
"""What a loss is of: the dense base, the sparse one with raw gates, or with gates that sum to 1."""
ROWS, SOURCE_LENGTH = 64, 512


@dataclasses.dataclass(frozen=True)
class LossRows:
    """The rows that a loss is computed on.

    Attributes:
        task: a registered task.
        count: a seeded random subset of at most so many rows.
        split: None for the one that the task is scored on.
        source_length: tokens of an input that are kept.
        modules: registries to import by name; None for the verbs' own.
    """

    task: str
    count: int | None = None
    split: str | None = None
    source_length: int | None = None
    modules: Sequence[str] | None = None

    def of(self, base: Base) -> PreparedSplit:
        """The rows in the tokens of a base.

        Raises:
            InputError: no such task or split, or a mixture; the base has no vocabulary.
        """
        if base.vocabulary is None:
            raise InputError(describe("The base carries no vocabulary, so no task has a loss",
                                      where=base.path, cure="leave --loss_on out"))
        data = TaskData(base.vocabulary, tuple(self.modules or DEFAULT_MODULES))
        tasks = data.tasks_of(self.task)
        if tasks != [self.task]:
            raise InputError(describe("The loss is that of one task, and this is a mixture",
                                      where=self.task, expected=", ".join(tasks[:3])))
        return data.split(self.task, self.split or data.evaluation_split(self.task), self.count or ROWS)


@dataclasses.dataclass(frozen=True)
class DenseLoss:
    """The loss of a dense base, and the rows that it is of."""

    rows: PreparedSplit
    settings: EvaluationSettings
    found: TargetLoss


def of_dense(rows: LossRows, folder: storage.PathLike) -> DenseLoss:
    """Computes the loss of a dense base, which is read for it and let go.

    Raises:
        InputError: as `LossRows.of`; a row is longer than the network's context.
    """
    base, mesh = load_base(folder), _mesh()
    split, settings = rows.of(base), EvaluationSettings(source_length=rows.source_length or SOURCE_LENGTH)
    return DenseLoss(split, settings, _loss(base.params, base.config, split, settings, mesh))


def of_sparse(before: DenseLoss, folder: storage.PathLike, same_experts: bool) -> dict[str, Any]:
    """Computes the loss of the sparse base with either kind of gates; returns the report, JSON-ready.

    Args:
        before: of the dense base.
        folder: of the sparse one.
        same_experts: whether all experts are copies of one feed-forward.
    """
    base, mesh, found = load_base(folder), _mesh(), {}
    own = base.config.sparse
    for gates in (RAW, NORMALISED) if own.choice == TOKENS else (_gates(own.normalize_gates),):
        sparse = dataclasses.replace(own, normalize_gates=gates == NORMALISED)
        config = dataclasses.replace(base.config, sparse=sparse)
        found[gates] = _loss(base.params, config, before.rows, before.settings, mesh)
    models = {DENSE: before.found, **found}
    return {
        "task": before.rows.name, "split": before.rows.split, "rows": before.found.rows,
        "tokens": before.found.tokens, "gates": _gates(own.normalize_gates),
        "nats_per_token": {name: each.loss for name, each in models.items()},
        "jump": {name: each.loss - before.found.loss for name, each in found.items()},
        "why": _why(own.experts_per_token, own.num_experts, same_experts),
    }


def _gates(normalised: bool) -> str:
    return NORMALISED if normalised else RAW


def _why(chosen: int, experts: int, same: bool) -> str:
    if not same:
        return ("The experts differ, and the router is fresh: it sends tokens to them at random. So neither "
                "kind of gates gives the loss of the dense base.")
    return (f"All {experts} experts are equal. Normalised gates sum to 1, so nothing changes. Raw gates are "
            f"the {chosen} largest of {experts} probabilities: a sparse layer's output is their sum times "
            "the dense one, until training has made up for it.")


def _mesh() -> Mesh:
    return sharding.make_mesh(len(jax.devices()), 1)


def _loss(params: Any, config: NetworkConfig, split: PreparedSplit, settings: EvaluationSettings, mesh: Mesh
          ) -> TargetLoss:
    network = families.network_of(config)
    placed = sharding.put_tree(params, sharding.tree_shardings(network.logical_axes(), params, mesh))
    return target_loss(network, placed, split, settings, mesh)
