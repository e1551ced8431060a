"""`elm merge`: experts of one base and one form into one expert, by arithmetic on their overlays."""

import dataclasses
from collections.abc import Sequence

from elm_jax import storage, trees
from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import Expert, save_expert
from elm_jax.merging import methods
from elm_jax.routing.vote import RoutingDecision


def merge(
    experts: Sequence[Expert] | ExpertLibrary, *, method: str = "mean",
    weights: Sequence[float] | None = None, decision: RoutingDecision | None = None,
    top_k: int = 3, expert_id: str | None = None, output: storage.PathLike | None = None,
) -> Expert:
    """Merges experts, or the best of a library for a routing decision.

    Args:
        experts: two or more experts; or a library, together with `decision`.
        method: name in `merging.methods.METHODS`.
        weights: one a expert, normalised to sum 1; None for equal weights.
        decision: with a library, whose `top_k` best experts are merged.
        top_k: how many, with a decision.
        expert_id: name of the merged expert; by default made of its parents' names.
        output: folder to save to; None keeps it in memory.

    Raises:
        InputError: fewer than two experts, unlike bases, forms, leaves or shapes (the first
            differing leaf is named), or weights that do not fit.
    """
    if isinstance(experts, ExpertLibrary):
        if decision is None:
            raise InputError(describe("Merging from a library needs a routing decision"))
        experts = [experts.load(name) for name in decision.top(top_k)]
    experts = list(experts)
    if len(experts) < 2:
        raise InputError(describe("Merging needs two or more experts", got=len(experts)))
    check_alike(experts)
    methods.check_mergeable({_unique_name(e, n): trees.flatten(e.overlay) for n, e in enumerate(experts)})
    weights = methods.normalised_weights(weights, len(experts))
    overlay = methods.get_method(method)([trees.flatten(e.overlay) for e in experts], weights)
    merged = Expert(_card(experts, method, weights, expert_id), trees.unflatten(overlay))
    if output is not None:
        save_expert(output, merged)
        merged = dataclasses.replace(merged, path=str(output))
    return merged


def check_alike(experts: Sequence[Expert]) -> None:
    """Raises InputError if two experts have unlike bases, kinds or networks."""
    first = experts[0].card
    for expert in experts[1:]:
        other = expert.card
        for what, left, right in (("base", first.base["fingerprint"], other.base["fingerprint"]),
                                  ("kind", _kind(first), _kind(other)),
                                  ("network", first.network, other.network)):
            if left != right:
                raise InputError(describe(
                    f"Experts of unlike {what} cannot be merged", where=f"{first.id} and {other.id}",
                    got=f"{left} and {right} ({_first_leaf(experts[0], expert)})",
                    expected="the same for all"))


def _kind(card: ExpertCard) -> str:
    """The kind, and of a merged expert that of its parents, which are all of one."""
    return card.parents[0]["kind"] if card.kind == "merged" and card.parents else card.kind


def _first_leaf(a: Expert, b: Expert) -> str:
    difference = trees.first_difference(a.overlay, b.overlay)
    return f"first differing leaf: {difference}" if difference else "their leaves have equal names and shapes"


def _unique_name(expert: Expert, number: int) -> str:
    return f"{expert.card.id}#{number + 1}"


def _card(experts: Sequence[Expert], method: str, weights: Sequence[float],
          expert_id: str | None) -> ExpertCard:
    first = experts[0].card
    datasets = {expert.card.dataset for expert in experts}
    return ExpertCard(
        id=expert_id or "merged-" + "+".join(expert.card.id for expert in experts)[:150],
        kind="merged", form=first.form, base=dict(first.base), network=dict(first.network),
        tasks=tuple(dict.fromkeys(task for expert in experts for task in expert.card.tasks)),
        dataset=datasets.pop() if len(datasets) == 1 else None, method=method,
        parents=tuple({"id": expert.card.id, "kind": _kind(expert.card), "weight": float(weight)}
                      for expert, weight in zip(experts, weights, strict=True)))
