"""Merges experts of one base and one form in memory; optionally saves the merged expert."""

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import Expert, check_base, write_expert
from elm_jax.formats.tensors.streaming import ArrayTensors
from elm_jax.merging.methods import method_table
from elm_jax.merging.methods.method_table import settings_of
from elm_jax.merging.recipes.recipe import MergeRecipe
from elm_jax.routing.vote import RoutingDecision
from elm_jax.runtime import hosts, staging, storage, trees
from elm_jax.workflows.merge import absent_layers, merge_overlays, output_files
from elm_jax.workflows.merge.merge_inputs import TensorsSource
from elm_jax.workflows.route import RouteConfig
from elm_jax.workflows.target_task import route_task

logger = logging.getLogger(__name__)
BY = ("votes", "similarity")
"""Ways to derive merge weights from a routing decision."""


def merge(
    experts: Sequence[Expert] | ExpertLibrary, *, method: str = "mean",
    weights: Sequence[float] | str | None = None, base: Base | None = None,
    decision: RoutingDecision | None = None, top_k: int = 3, expert_id: str | None = None,
    output: storage.PathLike | None = None, rank: int | None = None, **parameters: Any,
) -> Expert:
    """Merges experts, or a library's best experts for a routing decision, into one expert.

    Args:
        experts: two or more experts; or a library, together with `decision`.
        method: name in `method_table.METHODS`, whose row says the equation.
        weights: one an expert; None for the method's own; with a decision also ``votes`` or ``similarity``.
        base: that the experts were trained on, for methods on task vectors. Leaves that it lacks (adapters)
            count as zero.
        decision: with a library, whose `top_k` best experts are merged.
        top_k: how many, with a decision.
        expert_id: name of the merged expert; by default made of its parents' names.
        output: folder to save to, which does not exist or is empty; None keeps it in memory. With several
            processes every process calls this, and the first one writes.
        rank: of merged LoRA updates; None for the sum of the ranks, which is exact for weighted sums.
        parameters: of the method, such as ``density``; a tuple has one for each expert.

    Raises:
        InputError: fewer than two experts, unlike bases, kinds, networks or leaves (all are named), weights
            or parameters that do not fit, a value that is not finite, or an output that is taken.
    """
    if output is not None:
        staging.check_free(output)
    if isinstance(experts, ExpertLibrary):
        if decision is None:
            raise InputError(describe("Merging from a library needs a routing decision"))
        weights = decided_weights(decision, top_k, weights) if isinstance(weights, str) else weights
        experts = [experts.load(name) for name in decision.top(top_k)]
    if isinstance(weights, str):
        raise InputError(describe("Weights are numbers, one an expert", got=repr(weights),
                                  cure=f"{' and '.join(BY)} need a library and a decision"))
    experts = list(experts)
    if len(experts) < 2:
        raise InputError(describe("Merging needs two or more experts", got=len(experts)))
    cards = [expert.card for expert in experts]
    sources = [TensorsSource(ArrayTensors(expert.overlay)) for expert in experts]
    merge_overlays.check_alike(cards, [source.specs for source in sources], base is not None)
    for note in absent_layers.notes_of(cards, [source.specs for source in sources]):
        logger.warning(note)
    recipe = MergeRecipe.simple(method, weights, parameters, experts=[card.id for card in cards],
                           specs=method_table.get_method(method).parameters)
    fingerprints = [trees.fingerprint(expert.overlay) for expert in experts]
    leaves, network = merge_overlays.plan_overlay(cards, sources, _base_source(base, experts), fingerprints,
                                                  recipe, rank)
    for note in method_table.notes_on_signs(settings_of(leaves)):
        logger.warning("%s", note)
    overlay = {}
    with ThreadPoolExecutor(output_files.default_workers()) as pool:
        for leaf in leaves:
            leaf.look(pool)
            # In slices, as on disk, so that few programs are compiled, whatever the leaves' sizes.
            parts = [leaf.rows(*span) for span in leaf.slices()]
            overlay[leaf.path] = np.concatenate([np.empty(0, leaf.dtype), *parts]).reshape(leaf.shape)
            leaf.forget()
    card = merge_overlays.make_card(cards, fingerprints, network, settings_of(leaves), expert_id)
    merged = Expert(card, trees.unflatten(overlay))
    if output is not None:
        hosts.barrier()  # until all have seen that the name is free
        hosts.by_first(lambda: _save(output, merged))
        return dataclasses.replace(merged, path=str(output))
    return merged


def _save(output: storage.PathLike, expert: Expert) -> None:
    with staging.staged(output) as folder:
        write_expert(folder, expert)


def _base_source(base: Base | None, experts: Sequence[Expert]) -> TensorsSource | None:
    if base is None:
        return None
    for expert in experts:
        check_base(base, expert.card, expert.path or expert.card.id)
    return TensorsSource(ArrayTensors(base.params))


def decided_weights(decision: RoutingDecision, top_k: int, by: str) -> list[float]:
    """Merge weights of the `top_k` best experts of a routing decision.

    Args:
        decision: that ranks them.
        top_k: how many.
        by: ``votes``, or ``similarity``: the mean over queries of the nearest key's.

    Raises:
        InputError: an unknown `by`; an expert without votes, or with a negative similarity.
    """
    if by not in BY:
        raise InputError(describe("Weights are numbers, or what a decision says", got=by, expected=BY))
    decision.top(top_k)
    lines = decision.ranking[:top_k]
    weights = [float(line.votes if by == "votes" else line.mean_similarity) for line in lines]
    if min(weights) < 0 or sum(weights) <= 0:
        raise InputError(describe(f"The {by} give no weights", where=", ".join(line.expert for line in lines),
                                  got=weights, cure="give weights, or leave them out for equal ones"))
    return weights


def best_of_library(config: RouteConfig, top_k: int, weights: Sequence[float] | str | None = None
                    ) -> tuple[list[str], Sequence[float] | str | None]:
    """Routes a task over a library; returns folders and merge weights of the `top_k` best experts.

    Args:
        config: says the library and the task.
        top_k: how many experts.
        weights: a key of `BY` is replaced by the decision's weights (``votes`` also choose the experts, where
            the config names no router); any other value is returned unchanged.
    """
    if weights == "votes" and config.router is None:  # the best by priors may have none
        config = dataclasses.replace(config, router="vote")
    decision = route_task(config)
    if isinstance(weights, str) and weights in BY:
        weights = decided_weights(decision, top_k, weights)
    experts = storage.as_path(config.library) / "experts"
    return [str(experts / name) for name in decision.top(top_k)], weights
