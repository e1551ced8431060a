"""Loss of a task's targets in nats a token: less noisy than a share of right answers, and for every task."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.batches import padded
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import check_context, prompts_of, task_number
from elm_jax.errors import InputError, RunError, describe
from elm_jax.evaluation import rank
from elm_jax.evaluation.batch_plan import TaskInstances, plan_batches
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, sharding, trees
from elm_jax.types import Params


class TargetLoss(NamedTuple):
    """Loss of one model on some rows of a task.

    Attributes:
        loss: cross-entropy of the rows' targets, in nats a token, EOS included.
        tokens: of these targets.
        rows: of the task.
    """

    loss: float
    tokens: int
    rows: int


def target_loss(network: Network, params: Params, split: PreparedSplit, settings: EvaluationSettings,
                mesh: Mesh) -> TargetLoss:
    """Computes the loss of a split's targets, whether the task ranks choices or generates.

    Args:
        network: static.
        params: on the mesh.
        split: a task's prepared rows.
        settings: lengths and budgets; targets are cut at `max_new_tokens`.
        mesh: whose data axis the rows are split over.

    Raises:
        InputError: the split has no rows, or a row that is longer than the network's context.
        RunError: a loss is not a number.
    """
    instances = _with_targets(split, network, settings)
    total = 0.0
    for shape, numbers in plan_batches(instances, settings, mesh.shape["data"]):
        placed = sharding.put_batch(instances.batch(shape, numbers), mesh)
        sums = rank.score_choices(network, params, padded(placed, "inputs"), padded(placed, "choices"))
        total -= float(np.sum(hosts.whole(sums)[:len(numbers), 0], dtype=np.float64))
    if not np.isfinite(total):
        raise RunError(describe("The loss is not finite", where=f"task {split.name}, {split.split}",
                                cure="look at the model's weights: something made NaN or infinity"))
    tokens = sum(len(target) for target, in instances.choices)
    return TargetLoss(total / tokens, tokens, len(split))


def _with_targets(split: PreparedSplit, network: Network, settings: EvaluationSettings) -> TaskInstances:
    """The rows of a split, each with its target as the only choice."""
    if not len(split):
        raise InputError(describe("There is nothing to evaluate", where=f"{split.name} {split.split}",
                                  got="no rows"))
    form = form_of(network)
    prompts = prompts_of(split, form, settings.source_length)
    targets = [[form.target(split.targets(row), settings.max_new_tokens)] for row in range(len(split))]
    check_context(split, form, prompts, [len(target) for target, in targets])
    return TaskInstances(split, form, prompts, targets, trees.count(network.abstract_params()),
                         task_number(split, form))
