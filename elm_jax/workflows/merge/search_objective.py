"""Objectives of a weight search: how well a merge does on a few instances, as a function of its weights.

``objective(weights) = task loss of (base + merge(overlays, weights)) on the instances + l1 * mean |w|``,
differentiable in the weights, and hashable, so that programs are shared between searches of equal shapes.
The task loss is

- labelled, classification by rank: the cross-entropy of the right choice, ``-log softmax(scores)[label]``,
  of the choices' log-probabilities by which `rank` decides; where choices have a credit each,
  ``-log sum(credit * softmax(scores))``;
- labelled, generation: the cross-entropy a target token;
- unlabelled, classification by rank: the entropy of ``softmax(scores)``. Labels are not even looked up.

Source: Huang et al., https://arxiv.org/abs/2307.13269, section 3.3 (few-shot loss and L1); Yang et al.,
https://arxiv.org/abs/2310.02575, section 3.2 (entropy).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.data.arrays.batch_forms import BatchForm
from elm_jax.data.arrays.batches import ChoiceShape, make_choice_batch, padded
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import check_context, prompts_of, task_number
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.batch_plan import source_width, target_width
from elm_jax.evaluation.evaluation_settings import CHOICE_TOKEN_COST, EvaluationSettings
from elm_jax.merging.methods import alike, compose
from elm_jax.models.network import TASK_IDS, Network
from elm_jax.runtime import hosts, sharding, trees
from elm_jax.types import Array, FlatParams, Params

NEVER = -1e9
"""Score of a missing choice: its probability and its part of a gradient are zero."""
KINDS = {("rank", True): "cross-entropy of the right choice", ("generation", True): "cross-entropy a token",
         ("rank", False): "entropy of the choices"}
"""(kind of the task, labelled) -> name of its objective."""


class MergeData(NamedTuple):
    """Data of an objective beside the weights: a pytree of arrays.

    Attributes:
        shared: leaves of the base that no overlay replaces, flat.
        overlays: E flat overlays of one shape.
        base: the base's own values of leaves that the overlays replace, flat; empty where the method needs
            none of them.
        batches: of `make_batches`, on the mesh.
    """

    shared: FlatParams
    overlays: tuple[FlatParams, ...]
    base: FlatParams
    batches: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class MergeObjective:
    """Objective of one network, method and kind of task; see the module's docstring.

    Attributes:
        network: of the base with any of the overlays.
        method: name in `method_table.METHODS`.
        kind: of the task, ``rank`` or ``generation``.
        labelled: whether the right answers are used.
        l1: factor of the mean absolute weight.
        parameters: of the method, beside the weights, as pairs.
        names: of the experts, on which random masks depend; None takes their numbers.
    """

    network: Network
    method: str
    kind: str
    labelled: bool = True
    l1: float = 0.0
    parameters: tuple[tuple[str, Any], ...] = ()
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.kind, self.labelled) not in KINDS:
            raise InputError(describe(
                "Without labels only a task that ranks choices tells anything", got=f"a {self.kind} task",
                expected="a task of kind rank", cure="use labelled instances"))

    def __call__(self, weights: Array, data: MergeData) -> Array:
        """Computes the objective f32[] of weights f32[E]."""
        merged = compose.merge_params(self.method, data.overlays, weights, data.base, names=self.names,
                                      **dict(self.parameters))
        params = trees.unflatten({**data.shared, **merged})

        @jax.checkpoint  # the backward pass holds one batch at a time
        def add(total: tuple[Array, Array], batch: Mapping[str, Array]) -> tuple[tuple[Array, Array], None]:
            loss, count = batch_loss(self.network, params, batch, self.kind, self.labelled)
            return (total[0] + loss, total[1] + count), None

        zero = jnp.zeros((), jnp.float32)
        (loss, count), _ = jax.lax.scan(add, (zero, zero), dict(data.batches))
        return loss / jnp.maximum(count, 1.0) + self.l1 * jnp.mean(jnp.abs(weights))


def batch_loss(network: Network, params: Params, batch: Mapping[str, Array], kind: str, labelled: bool
               ) -> tuple[Array, Array]:
    """Sum f32[] of one batch's losses, and its divisor f32[]: rows, or tokens of a generation."""
    log_probs = network.target_log_probs(params, padded(batch, "inputs"), padded(batch, "choices"))
    real = batch["real"]
    if kind == "generation":  # the one choice is the target; padding has log-probability 0
        return -jnp.sum(log_probs), jnp.sum(batch["choice_lengths"]).astype(jnp.float32)
    scores = jnp.where(batch["choice_mask"], log_probs.sum(axis=-1), NEVER)
    choice_log_probs = jax.nn.log_softmax(scores, axis=-1)
    if labelled and "credits" in batch:
        credit = batch["credits"]
        weighted = choice_log_probs + jnp.log(jnp.where(credit > 0, credit, 1.0))
        right = jax.nn.logsumexp(jnp.where(credit > 0, weighted, NEVER), axis=-1)
        return -jnp.sum(right * real), jnp.sum(real)
    if labelled:
        right = jnp.take_along_axis(choice_log_probs, batch["labels"][:, None], axis=-1)[:, 0]
        return -jnp.sum(right * real), jnp.sum(real)
    entropy = -jnp.sum(jnp.exp(choice_log_probs) * choice_log_probs, axis=-1)
    return jnp.sum(entropy * real), jnp.sum(real)


def make_batches(split: PreparedSplit, rows: Sequence[int], *, labelled: bool, settings: EvaluationSettings,
                 form: BatchForm, data_axis: int = 1) -> dict[str, np.ndarray]:
    """Makes N batches of one shape from some rows of a split, so that one program serves all.

    Args:
        split: of a task.
        rows: numbers of rows in it.
        labelled: whether labels, or targets, come along.
        settings: lengths and the budget of tokens a batch; targets are cut at `max_new_tokens`.
        form: of the network's batches.
        data_axis: size of the mesh's data axis, of which B is a multiple.

    Returns:
        inputs i32[N, B, S], choices i32[N, B, C, T] (for a generation C = 1, the target), the lengths of
        both, choice_mask bool[N, B, C], real f32[N, B], 0 for padding rows; with labels of choices
        also labels i32[N, B]; and credits f32[N, B, C] if a row's choices have a score each. For a network
        that takes them also task_ids i32[N, B].

    Raises:
        InputError: no rows, a row without choices, a labelled row without a right choice, or a row that is
            longer than the network's context.
    """
    if not len(rows):
        raise InputError(describe("A search needs instances", where=f"{split.name} {split.split}",
                                  got="no rows"))
    ranked = split.kind == "rank"
    choices = [split.choices(row) if ranked else [form.target(split.targets(row), settings.max_new_tokens)]
               for row in rows]
    prompts = prompts_of(split, form, settings.source_length, rows)
    longest = [max(map(len, own), default=0) for own in choices]
    check_context(split, form, prompts, longest, rows)
    # One shape fits all rows: the network's context holds each row, if not the longest of both together.
    source = source_width(max(map(len, prompts)), settings, form.context)
    target = target_width(max(longest, default=1), settings, form.context)
    number = max(map(len, choices))
    most = max(1, settings.tokens_per_batch // max(source, CHOICE_TOKEN_COST * number * target)) * data_axis
    count = -(-len(rows) // most)
    size = -(-len(rows) // (count * data_axis)) * data_axis
    batch = dict(make_choice_batch(prompts, choices, ChoiceShape(count * size, source, number, target),
                                   form.ids.pad))
    if form.tasks:
        batch[TASK_IDS] = np.full(count * size, task_number(split, form), np.int32)
    batch["real"] = (np.arange(count * size) < len(rows)).astype(np.float32)
    if ranked and labelled:
        batch["labels"] = np.pad(_labels(split, rows), (0, count * size - len(rows)))
        if any("scores" in split.text(row) for row in rows):
            batch["credits"] = _credits(split, rows, batch["choice_mask"].shape)
    return {name: array.reshape(count, size, *array.shape[1:]) for name, array in batch.items()}


def _labels(split: PreparedSplit, rows: Sequence[int]) -> np.ndarray:
    labels = np.asarray([split.label(row) for row in rows], np.int32)
    if labels.min() < 0:
        raise InputError(describe("A row has no right choice", where=f"{split.name} {split.split}",
                                  got=f"row {rows[int(labels.argmin())]}",
                                  cure="leave it out, or search without labels"))
    return labels


def _credits(split: PreparedSplit, rows: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Credit f32[B, C] of each choice; rows of padding have 1 for the first."""
    table = np.zeros(shape, np.float32)
    table[len(rows):, 0] = 1.0
    for own, row in zip(table, rows, strict=False):
        credits = split.credits(row)
        own[:len(credits)] = credits
    return table


def make_data(network: Network, base: Params, overlays: Sequence[Params], batches: Mapping[str, np.ndarray],
              mesh: Mesh, *, needs_base: bool = True) -> MergeData:
    """Puts base, overlays and batches on the mesh: parameters by the network's rules, rows over 'data'.

    Args:
        network: of the base with any of the overlays.
        base: its parameters.
        overlays: of one shape.
        batches: of `make_batches`.
        mesh: whose data axis the batches were made for.
        needs_base: whether the method needs the base's values of the overlays' leaves.

    Raises:
        InputError: overlays of unlike leaves.
    """
    flat = [trees.flatten(overlay) for overlay in overlays]
    alike.check_alike(flat, [f"expert {number}" for number in range(1, len(flat) + 1)])
    axes = trees.flatten(network.logical_axes())

    def put(leaves: FlatParams) -> FlatParams:
        return {path: hosts.put(leaf, sharding.leaf_sharding(axes[path], leaf.shape, mesh))
                for path, leaf in leaves.items()}

    start = trees.flatten(base)
    own = {path: start[path] for path in flat[0] if needs_base and path in start}
    shared = {path: leaf for path, leaf in start.items() if path not in flat[0]}
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    return MergeData(put(shared), tuple(put(overlay) for overlay in flat), put(own),
                     {name: hosts.put(array, rows) for name, array in batches.items()})
