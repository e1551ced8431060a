"""What `elm route` says: the decisions of one router or of all, the reasons, and what matched best."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.experts.routed_library import text_of_key
from elm_jax.routing.router import ROUTERS
from elm_jax.routing.routers.by_fit import why_no_fit
from elm_jax.routing.text import RoutingInstance
from elm_jax.routing.vote import RoutingDecision
from elm_jax.workflows.route import RouteConfig, check_row_router
from elm_jax.workflows.row_routes import RowRoute, row_reasons
from elm_jax.workflows.target_task import TargetTask


@dataclasses.dataclass(frozen=True)
class BestMatch:
    """The key of an expert that matched a task best, and its text.

    Attributes:
        expert: id.
        similarity: of the two texts.
        nearest: the training instance whose key it is; None of a library of means, which keeps none.
        query: the instance of the task that it matched, or the task's text at Q = 0.
    """

    expert: str
    similarity: float
    nearest: str | None
    query: str


@dataclasses.dataclass(frozen=True)
class RouteReport:
    """Decisions for one task, and their reasons.

    Attributes:
        decision: of the router that was asked for, or of the usual one.
        decisions: of all routers that were asked for, by name.
        unable: why others did not decide, by name.
        matches: of the first experts.
        dataset: that priors left out; None for none.
        family: whose data sets they left out.
    """

    decision: RoutingDecision
    decisions: dict[str, RoutingDecision]
    unable: dict[str, str]
    matches: tuple[BestMatch, ...]
    dataset: str | None = None
    family: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the decision as a JSON-ready dictionary, with all else beside it."""
        several = {"routers": {name: one.to_dict() for name, one in self.decisions.items()},
                   "unable": self.unable} if len(self.decisions) > 1 else {}
        left_out = {name: value for name, value in (("dataset", self.dataset), ("family", self.family))
                    if value is not None}
        return {**self.decision.to_dict(), **left_out,
                "matches": [dataclasses.asdict(one) for one in self.matches], **several}

    def ranks(self, router: str) -> dict[str, int]:
        """The rank of each expert by a router, 1 for the first."""
        return {line.expert: rank for rank, line in enumerate(self.decisions[router].ranking, start=1)}


def report_route(config: RouteConfig, *, every: bool = False, top_k: int = 3) -> RouteReport:
    """Routes one task and says why.

    Args:
        config: of the task.
        every: whether all routers decide that can with what is given.
        top_k: for so many experts the text that matched best is found.

    Raises:
        InputError: as `route_task`.
    """
    target = TargetTask.read(config, every=every)
    unable = {name: reason for name in ROUTERS if (reason := _why_not(name, target))} if every else {}
    decisions = {name: target.decide(name)
                 for name in (ROUTERS if every else (target.router,)) if name not in unable}
    decision = decisions[target.router]
    matches = best_matches(target, [line.expert for line in decision.ranking[:top_k]])
    return RouteReport(decision, decisions, unable, matches, target.arrays.dataset, target.arrays.family)


def report_rows(config: RouteConfig) -> tuple[str, list[RoutingInstance], list[RowRoute]]:
    """Routes each of a task's instances alone; returns the router's name, the instances, and their routes.

    Raises:
        InputError: as `route_task`; there are no instances, or the router decides for tasks alone.
    """
    target = TargetTask.read(config)
    check_row_router(target.router)
    if not target.instances:
        raise InputError(describe("Rows are decided for one by one, and there are none", where="per_row",
                                  got="the task's text alone", cure="give queries"))
    routes = row_reasons(target.library, target.routed, target.arrays, target.router,
                         none_per="row" if config.none_of_these else None)
    return target.router, list(target.instances), routes


def _why_not(router: str, target: TargetTask) -> str | None:
    """Why a router cannot decide for a task with what is given, in words; None if it can."""
    row = ROUTERS[router]
    if row.needs_priors and target.routed.priors is None:
        return "the library has no priors: elm library calibrate"
    kin = target.arrays.dataset, target.arrays.family
    if row.needs_fit and (reason := why_no_fit(target.routed, *kin)) is not None:
        return reason
    if not target.instances and row.needs_queries and not (row.takes_text and target.text):
        return "it needs queries"
    if row.needs_rows and target.config.labelled is None:
        return "no --labelled rows"
    return None


def best_matches(target: TargetTask, experts: Sequence[str]) -> tuple[BestMatch, ...]:
    """For each expert the key that is nearest to any query, or to the text; none without either."""
    vectors, texts = target.arrays.queries, [one.source for one in target.instances]
    if not texts:
        if target.arrays.text is None:
            return ()
        vectors, texts = target.arrays.text[None], [target.text.source]
    index, found = target.routed.index, []
    for expert in experts:
        own = index.places_of(index.experts.index(expert))
        similarities = index.keys[own] @ vectors.T
        key, query = np.unravel_index(similarities.argmax(), similarities.shape)
        found.append(BestMatch(expert, round(float(similarities[key, query]), 4),
                               text_of_key(target.library, own[key]), texts[query]))
    return tuple(found)
