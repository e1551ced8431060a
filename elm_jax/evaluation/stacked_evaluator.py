"""Many experts scored in one program: all on the same instances, or each instance by its own expert."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.errors import InputError, describe
from elm_jax.evaluation import evaluator, rank
from elm_jax.evaluation.evaluator import EvaluationSettings
from elm_jax.evaluation.results import TaskResult
from elm_jax.models.adapters.stacked import GroupedNetwork, Many, gather
from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import hosts, sharding, trees
from elm_jax.types import Array, Params
from elm_jax.vocabularies.vocabulary import Vocabulary


def put_stack(network: T5Network, shared: Params, overlays: Sequence[Params], mesh: Mesh) -> Many:
    """The base and E overlays on the mesh: E over 'experts', all other axes by the solo rules.

    Args:
        network: of the base with any of the overlays.
        shared: the base's leaves; those that the overlays replace are left out.
        overlays: of one shape.
        mesh: E is a multiple of its expert axis.

    Raises:
        InputError: overlays of unlike shapes, or E that does not divide over the mesh.
    """
    for number, overlay in enumerate(overlays):
        difference = trees.first_difference(overlays[0], overlay)
        if difference:
            raise InputError(describe("Only overlays of one shape stack", where=f"expert {number}",
                                      got=difference))
    if len(overlays) % mesh.shape["experts"]:
        raise InputError(describe("The stack does not divide over the mesh", got=f"{len(overlays)} experts",
                                  expected=f"a multiple of {mesh.shape['experts']}"))
    axes, trained = trees.flatten(network.logical_axes()), trees.flatten(overlays[0])
    flat = {path: leaf for path, leaf in trees.flatten(shared).items() if path not in trained}
    rest = {path: hosts.put(leaf, sharding.leaf_sharding(axes[path], leaf.shape, mesh))
            for path, leaf in flat.items()}
    columns = [trees.flatten(overlay) for overlay in overlays]
    own = {}
    for path, leaf in trained.items():
        spec = sharding.leaf_sharding(axes[path], leaf.shape, mesh).spec
        whole = np.stack([np.asarray(column[path]) for column in columns])
        own[path] = hosts.put(whole, NamedSharding(mesh, PartitionSpec("experts", *spec)))
    return trees.unflatten(rest), trees.unflatten(own)


def evaluate_task_stacked(
    network: T5Network, params: Many, split: PreparedSplit, *, settings: EvaluationSettings,
    vocabulary: Vocabulary, mesh: Mesh, experts: Sequence[str], base: str, max_rows: int | None = None,
) -> list[TaskResult]:
    """Scores E models on one task in one program; the same results as `evaluate_task` a model.

    The budget of tokens a batch is of all models together.

    Args:
        network: static.
        params: of `put_stack`.
        split: the task's prepared rows.
        settings: lengths and budgets.
        vocabulary: turns generations into text.
        mesh: experts are split over its expert axis, instances over its data axis.
        experts: ids, in the order of the stack.
        base: fingerprint of the base, for the rows.
        max_rows: with which the split was prepared, for the rows.

    Raises:
        InputError: the split has no rows, or a row to rank has no choices.
        RunError: scores are not numbers.
    """
    start, size = time.monotonic(), len(experts)
    grouped = GroupedNetwork(network, size)
    smaller = dataclasses.replace(settings, tokens_per_batch=max(1, settings.tokens_per_batch // size))
    run = _rank if split.kind == "rank" else _generate
    found = run(grouped, params, split, smaller, mesh, vocabulary)
    seconds = (time.monotonic() - start) / size
    return [evaluator.task_result(split, evaluator.in_order(own), settings, expert=expert, base=base,
                                  max_rows=max_rows, seconds=seconds)
            for expert, own in zip(experts, found, strict=True)]


def _rank(network: GroupedNetwork, params: Many, split: PreparedSplit, settings: EvaluationSettings,
          mesh: Mesh, vocabulary: Vocabulary) -> list[list[dict[str, Any]]]:
    del vocabulary  # choices are tokens already
    choices = evaluator.choices_of(split)
    found: list[list[dict[str, Any]]] = [[] for _ in range(network.size)]
    for shape, numbers in evaluator.plan_batches(split, choices, settings, mesh.shape["data"]):
        batch = evaluator.choice_batch(split, choices, shape, numbers)
        placed = {name: put_rows(np.concatenate([rows] * network.size), mesh) for name, rows in batch.items()}
        scores = rank.score_choices(network, params, placed["inputs"], placed["choices"])
        scores = hosts.whole(scores)
        for own, group in zip(found, np.split(scores, network.size), strict=True):
            own += evaluator.ranked_rows(split, choices, numbers, group)
    return found


def _generate(network: GroupedNetwork, params: Many, split: PreparedSplit, settings: EvaluationSettings,
              mesh: Mesh, vocabulary: Vocabulary) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = [[] for _ in range(network.size)]
    for shape, numbers in evaluator.plan_batches(split, None, settings, mesh.shape["data"]):
        rows = put_rows(np.concatenate([evaluator.input_rows(split, shape, numbers)] * network.size), mesh)
        tokens = greedy(network, params, rows, max_length=settings.max_new_tokens)
        tokens = hosts.whole(tokens)
        for own, group in zip(found, np.split(tokens, network.size), strict=True):
            texts = [vocabulary.decode(row) for row in group[:len(numbers)]]
            own += evaluator.generated_rows(split, numbers, texts)
    return found


def put_rows(rows: np.ndarray, mesh: Mesh) -> Array:
    """Rows [E * B, ...] on the mesh: E over 'experts', B over 'data'."""
    return hosts.put(rows, NamedSharding(mesh, PartitionSpec(("experts", "data"))))


@functools.partial(jax.jit, static_argnames=("network",))
def score_mixed(
    network: T5Network, params: Many, expert_index: Array, inputs: Array, choices: Array
) -> Array:
    """Log-probability of every choice, each instance by its own expert.

    Args:
        network: static.
        params: the base's leaves, and the overlays' [E, ...], from which one gather takes each instance's.
        expert_index: i32[B], in [0, E).
        inputs: i32[B, S], padded with 0.
        choices: i32[B, C, T], EOS included, padded with 0.

    Returns:
        f32[B, C]; 0 for a choice that is all padding.
    """
    own = (params[0], gather(params[1], expert_index))
    return GroupedNetwork(network, inputs.shape[0]).target_log_probs(own, inputs, choices).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=("network", "max_length", "eos_id"))
def greedy_mixed(network: T5Network, params: Many, expert_index: Array, inputs: Array, *, max_length: int,
                 eos_id: int = 1) -> Array:
    """The most likely token at every step, each instance by its own expert; see `decode.greedy`.

    Args:
        network: static.
        params: as for `score_mixed`.
        expert_index: i32[B], in [0, E).
        inputs: i32[B, S], padded with 0.
        max_length: most tokens a row gets, EOS included; static.
        eos_id: token that ends a row; static.

    Returns:
        i32[B, max_length].
    """
    own = (params[0], gather(params[1], expert_index))
    return greedy(GroupedNetwork(network, inputs.shape[0]), own, inputs, max_length=max_length, eos_id=eos_id)


def check_index(expert_index: np.ndarray, size: int) -> np.ndarray:
    """The expert of each instance as i32[B].

    Raises:
        InputError: an index outside of the stack, which a gather would clip in silence.
    """
    index = np.asarray(expert_index)
    if index.ndim != 1 or index.dtype.kind not in "iu" or index.min(initial=0) < 0 or (
            index.max(initial=0) >= size):
        raise InputError(describe("Each instance needs an expert of the stack", got=index,
                                  expected=f"whole numbers from 0 to {size - 1}, one an instance"))
    return index.astype(np.int32)


def evaluate_task_mixed(
    network: T5Network, params: Many, split: PreparedSplit, expert_index: Sequence[int], *,
    settings: EvaluationSettings, vocabulary: Vocabulary, mesh: Mesh, name: str, base: str,
    max_rows: int | None = None,
) -> TaskResult:
    """Scores a router's decisions an instance: row n of the split by expert ``expert_index[n]``.

    Args:
        network: static.
        params: of `put_stack`.
        split: the task's prepared rows.
        expert_index: one expert a row of the split.
        settings: lengths and budgets.
        vocabulary: turns generations into text.
        mesh: instances are split over its data axis; its expert axis should be 1.
        name: of the router, in the row's place of an expert's id.
        base: fingerprint of the base, for the row.
        max_rows: with which the split was prepared, for the row.

    Raises:
        InputError: not one expert of the stack a row; no rows; a row without choices.
        RunError: scores are not numbers.
    """
    start, index = time.monotonic(), check_index(expert_index, jax.tree.leaves(params[1])[0].shape[0])
    if not len(split) or len(index) != len(split):
        raise InputError(describe("Each row needs one expert", where=f"{split.name} {split.split}",
                                  got=f"{len(index)} experts for {len(split)} rows"))
    choices = evaluator.choices_of(split) if split.kind == "rank" else None
    found: list[dict[str, Any]] = []
    for shape, numbers in evaluator.plan_batches(split, choices, settings, mesh.shape["data"]):
        chosen = np.resize(index[numbers], shape.rows)
        if choices is None:
            placed = sharding.put_batch({"inputs": evaluator.input_rows(split, shape, numbers),
                                         "index": chosen}, mesh)
            tokens = greedy_mixed(network, params, placed["index"], placed["inputs"],
                                  max_length=settings.max_new_tokens)
            tokens = hosts.whole(tokens)
            found += evaluator.generated_rows(split, numbers, [vocabulary.decode(row) for row in tokens])
        else:
            placed = sharding.put_batch({**evaluator.choice_batch(split, choices, shape, numbers),
                                         "index": chosen}, mesh)
            scores = score_mixed(network, params, placed["index"], placed["inputs"], placed["choices"])
            scores = hosts.whole(scores)
            found += evaluator.ranked_rows(split, choices, numbers, scores)
    result = evaluator.task_result(split, evaluator.in_order(found), settings, expert=name, base=base,
                                   max_rows=max_rows, seconds=time.monotonic() - start)
    rows = [{**row, "settings": settings.digest(max_rows, mixed=True)} for row in result.rows]
    return dataclasses.replace(result, rows=rows)
