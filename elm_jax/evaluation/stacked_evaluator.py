"""Evaluates many experts in one program: all on the same instances, or each instance by its own expert."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.data.arrays.batches import padded
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import rendering_in
from elm_jax.errors import InputError, describe
from elm_jax.evaluation import evaluator, rank
from elm_jax.evaluation.batch_plan import TaskInstances, plan_batches
from elm_jax.evaluation.evaluator import Scoring
from elm_jax.evaluation.greedy_texts import decoded
from elm_jax.evaluation.results import TaskResult
from elm_jax.models.adapters.stacked import GroupedNetwork, Many, gather
from elm_jax.models.decode import greedy
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, sharding, trees
from elm_jax.types import Array, Batch, Padded, Params


def put_stack(network: Network, shared: Params, overlays: Sequence[Params], mesh: Mesh) -> Many:
    """Puts the base and E overlays on the mesh: E over 'experts', the other axes by the solo rules.

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
    rules = sharding.rules_of_one()
    flat = {path: leaf for path, leaf in trees.flatten(shared).items() if path not in trained}
    rest = {path: hosts.put(leaf, sharding.leaf_sharding(axes[path], leaf.shape, mesh, rules))
            for path, leaf in flat.items()}
    columns = [trees.flatten(overlay) for overlay in overlays]
    own = {}
    for path, leaf in trained.items():
        spec = sharding.leaf_sharding(axes[path], leaf.shape, mesh, rules).spec
        whole = np.stack([np.asarray(column[path]) for column in columns])
        own[path] = hosts.put(whole, NamedSharding(mesh, PartitionSpec("experts", *spec)))
    return trees.unflatten(rest), trees.unflatten(own)


def evaluate_task_stacked(network: Network, params: Many, split: PreparedSplit, scoring: Scoring,
                          experts: Sequence[str]) -> list[TaskResult]:
    """Evaluates E models on one task in one program; gives the same results as `evaluate_task` for each.

    The budget of tokens a batch counts all models together.

    Args:
        network: static.
        params: of `put_stack`.
        split: the task's prepared rows.
        scoring: how.
        experts: ids, in the order of the stack.

    Raises:
        InputError: the split has no rows, or a row that cannot be scored.
        RunError: scores are not numbers.
    """
    start, size = time.monotonic(), len(experts)
    grouped = GroupedNetwork(network, size)
    budget = max(1, scoring.settings.tokens_per_batch // size)
    smaller = dataclasses.replace(scoring, settings=dataclasses.replace(
        scoring.settings, tokens_per_batch=budget))
    instances = TaskInstances.of(split, network, scoring.settings)
    run = _rank if split.kind == "rank" else _generate
    found = run(grouped, params, instances, smaller)
    seconds = (time.monotonic() - start) / size
    return [evaluator.task_result(instances, evaluator.in_order(own), scoring, expert, seconds=seconds)
            for expert, own in zip(experts, found, strict=True)]


def _rank(network: GroupedNetwork, params: Many, instances: TaskInstances, scoring: Scoring
          ) -> list[list[dict[str, Any]]]:
    mesh = scoring.mesh
    found: list[list[dict[str, Any]]] = [[] for _ in range(network.size)]
    for shape, numbers in plan_batches(instances, scoring.settings, mesh.shape["data"]):
        batch = scoring.with_states(instances.batch(shape, numbers))
        placed = _repeated(batch, network.size, mesh)
        scores = rank.score_choices(network, params, padded(placed, "inputs"), padded(placed, "choices"))
        scores = hosts.whole(scores)
        for own, group in zip(found, np.split(scores, network.size), strict=True):
            own += evaluator.ranked_rows(instances, numbers, group, scoring.settings)
    return found


def _generate(network: GroupedNetwork, params: Many, instances: TaskInstances, scoring: Scoring
              ) -> list[list[dict[str, Any]]]:
    settings, mesh = scoring.settings, scoring.mesh
    found: list[list[dict[str, Any]]] = [[] for _ in range(network.size)]
    for shape, numbers in plan_batches(instances, settings, mesh.shape["data"]):
        batch = scoring.with_states(instances.batch(shape, numbers))
        placed = _repeated(batch, network.size, mesh)
        tokens = greedy(network, params, padded(placed, "inputs"), max_length=settings.max_new_tokens)
        tokens = hosts.whole(tokens)
        for own, group in zip(found, np.split(tokens, network.size), strict=True):
            texts = [decoded(network.config, row, scoring.vocabulary) for row in group[:len(numbers)]]
            own += evaluator.generated_rows(instances.split, numbers, texts, settings)
    return found


def _repeated(batch: Batch, size: int, mesh: Mesh) -> dict[str, Array]:
    """Puts a batch on the mesh, repeated once for each of E models."""
    return {name: put_rows(np.concatenate([rows] * size), mesh) for name, rows in batch.items()}


def put_rows(rows: np.ndarray, mesh: Mesh) -> Array:
    """Puts rows [E * B, ...] on the mesh: E over 'experts', B over 'data'."""
    return hosts.put(rows, NamedSharding(mesh, PartitionSpec(("experts", "data"))))


@functools.partial(jax.jit, static_argnames=("network",))
def score_mixed(
    network: Network, params: Many, expert_index: Array, inputs: Padded, choices: Padded
) -> Array:
    """Log-probability f32[B, C] of every choice, each instance scored by its own expert.

    Args:
        network: static.
        params: the base's leaves, and the overlays' [E, ...], from which one gather takes each instance's.
        expert_index: i32[B], in [0, E).
        inputs: tokens i32[B, S], lengths i32[B].
        choices: tokens i32[B, C, T], EOS included, lengths i32[B, C].

    Returns:
        f32[B, C]; 0 for a choice of length 0.
    """
    own = (params[0], gather(params[1], expert_index))
    return GroupedNetwork(network, inputs.tokens.shape[0]).target_log_probs(own, inputs, choices).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=("network", "max_length", "eos_id"))
def greedy_mixed(network: Network, params: Many, expert_index: Array, inputs: Padded, *, max_length: int,
                 eos_id: int | None = None) -> Array:
    """Decodes greedily, each instance by its own expert; returns i32[B, max_length] (see `decode.greedy`).

    Args:
        network: static.
        params: as for `score_mixed`.
        expert_index: i32[B], in [0, E).
        inputs: tokens i32[B, S], lengths i32[B].
        max_length: most tokens a row gets, EOS included; static.
        eos_id: token that ends a row; None for the network's own; static.

    Returns:
        i32[B, max_length].
    """
    own = (params[0], gather(params[1], expert_index))
    grouped = GroupedNetwork(network, inputs.tokens.shape[0])
    return greedy(grouped, own, inputs, max_length=max_length, eos_id=eos_id)


def check_index(expert_index: np.ndarray, size: int) -> np.ndarray:
    """Checks the expert number of each instance; returns them as i32[B].

    Raises:
        InputError: an index outside of the stack, which a gather would clip in silence.
    """
    index = np.asarray(expert_index)
    if index.ndim != 1 or index.dtype.kind not in "iu" or index.min(initial=0) < 0 or (
            index.max(initial=0) >= size):
        raise InputError(describe("Each instance needs an expert of the stack", got=index,
                                  expected=f"whole numbers from 0 to {size - 1}, one an instance"))
    return index.astype(np.int32)


def evaluate_task_mixed(network: Network, params: Many, split: PreparedSplit, expert_index: Sequence[int],
                        scoring: Scoring, name: str) -> TaskResult:
    """Evaluates a split whose row n is scored by expert ``expert_index[n]``, as a router decides.

    Args:
        network: static.
        params: of `put_stack`.
        split: the task's prepared rows.
        expert_index: one expert a row of the split.
        scoring: how; the mesh's expert axis should be 1.
        name: of the router, in the row's place of an expert's id.

    Raises:
        InputError: not one expert of the stack a row; no rows; a row that cannot be scored.
        RunError: scores are not numbers.
    """
    start, index = time.monotonic(), check_index(expert_index, jax.tree.leaves(params[1])[0].shape[0])
    if not len(split) or len(index) != len(split):
        raise InputError(describe("Each row needs one expert", where=f"{split.name} {split.split}",
                                  got=f"{len(index)} experts for {len(split)} rows"))
    settings, mesh = scoring.settings, scoring.mesh
    instances = TaskInstances.of(split, network, settings)
    found: list[dict[str, Any]] = []
    for shape, numbers in plan_batches(instances, settings, mesh.shape["data"]):
        batch = scoring.with_states(instances.batch(shape, numbers))
        placed = sharding.put_batch({**batch, "index": np.resize(index[numbers], shape.rows)}, mesh)
        if instances.choices is None:
            tokens = greedy_mixed(network, params, placed["index"], padded(placed, "inputs"),
                                  max_length=settings.max_new_tokens)
            tokens = hosts.whole(tokens)
            texts = [decoded(network.config, row, scoring.vocabulary) for row in tokens]
            found += evaluator.generated_rows(split, numbers, texts, settings)
        else:
            scores = score_mixed(network, params, placed["index"], padded(placed, "inputs"),
                                 padded(placed, "choices"))
            scores = hosts.whole(scores)
            found += evaluator.ranked_rows(instances, numbers, scores, settings)
    result = evaluator.task_result(instances, evaluator.in_order(found), scoring, name,
                                   seconds=time.monotonic() - start)
    digest = settings.digest(scoring.max_rows, mixed=True, cut_prompt=split.cut_prompt,
                             rendering=rendering_in(split))
    return dataclasses.replace(result, rows=[{**row, "settings": digest} for row in result.rows])
