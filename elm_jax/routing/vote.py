"""Routing decisions: each query votes for its nearest key's expert, and votes rank ALL experts.

One decision is made for each target task (`decide`), or for each query by itself (`decide_each`); nothing is
carried over from one to the next.
Source: Jang et al., https://arxiv.org/abs/2302.03202, section 3.2 (Retrieval of Experts).
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.routing.evidence import observe
from elm_jax.routing.index import KeyIndex, check_rows
from elm_jax.routing.ranking import Ranking, ranked_by_votes, voted_experts
from elm_jax.routing.search import BEST, winners_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExpertVotes:
    """One entry of a ranking: an expert with its votes, similarities and score.

    Attributes:
        expert: id.
        votes: number of queries whose nearest key is the expert's.
        best_similarity: of any query with any of its keys; without queries of the task's text, or 0.
        mean_similarity: mean over queries of the similarity with its nearest key; without queries of the
            task's text, or 0.
        score: what the router ranks by; None for an expert that it does not score.
        centroid_similarity: mean over queries of the similarity with its nearest centroid.
        prior: how well it does on other data sets; None if that is not known.
        copy_of: the older expert that it is equal to; it stands behind all that are no copies.
        rows: of the task that it was scored on; None for none.
        accuracy: its mean score on them; None without rows.
    """

    expert: str
    votes: int
    best_similarity: float
    mean_similarity: float
    score: float | None = None
    centroid_similarity: float | None = None
    prior: float | None = None
    copy_of: str | None = None
    rows: int | None = None
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class RoutingDecision:
    """The ranking of all experts of a library for one target task, best first.

    Attributes:
        ranking: every expert, also those without votes.
        num_queries: Q, the number of queries; a task with fewer rows has fewer.
        text_format: of keys and queries.
        encoder: its name.
        router: name of the router that ranked them.
        is_sure: whether the library has an expert for the task; False means that none of these should answer,
            but the base. None where that was not asked.
        is_known: whether the library knows the task, so that votes decided, also which experts were scored on
            rows; None where that did not count.
    """

    ranking: Sequence[ExpertVotes]
    num_queries: int
    text_format: str
    encoder: str
    router: str = "vote"
    is_sure: bool | None = None
    is_known: bool | None = None

    def top(self, count: int) -> list[str]:
        """Ids of the `count` best experts; experts without votes count too.

        Raises:
            InputError: the library has fewer.
        """
        if not 1 <= count <= len(self.ranking):
            raise InputError(
                describe(
                    "top_k does not fit the library",
                    got=count,
                    expected=f"1 to {len(self.ranking)} experts",
                )
            )
        return [line.expert for line in self.ranking[:count]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the decision as a JSON-ready dictionary."""
        return {
            "num_queries": self.num_queries,
            "text_format": self.text_format,
            "encoder": self.encoder,
            "router": self.router,
            **{name: value for name in ("is_sure", "is_known")
               if (value := getattr(self, name)) is not None},
            "ranking": [{name: value for name, value in dataclasses.asdict(line).items() if value is not None}
                        for line in self.ranking],
        }


def decide(queries: np.ndarray, index: KeyIndex, *, backend: str = "numpy") -> RoutingDecision:
    """Ranks the experts of an index for one task.

    Order: more votes first; among equal votes (above zero) the expert whose first won query comes
    first, which no two experts share; then the experts without votes, the larger mean similarity
    first; of those within `TIE` of each other, the one that was added to the library first.
    A zero query (a text without known parts) has no vote.

    Args:
        queries: f32[Q, K], unit rows, in the task's own order.
        index: keys of the library.
        backend: ``numpy`` or ``jax``; both decide the same.

    Raises:
        InputError: no keys, no queries, queries that are not unit rows of K, or no such backend.
    """
    queries = checked_queries(queries, index, backend)
    evidence = observe(queries, index, backend=backend).pooled()
    votes, best, mean = evidence.votes[0], evidence.best[0], evidence.mean_nearest[0]
    ranking = Ranking(
        voted_experts(evidence), lambda: ranked_by_votes(evidence),
        lambda e: ExpertVotes(index.experts[e], int(votes[e]), float(best[e]), float(mean[e])), len(votes))
    return RoutingDecision(ranking, len(queries), index.text_format, index.encoder)


def decide_each(queries: np.ndarray, index: KeyIndex, *, backend: str = "numpy") -> list[str]:
    """Ranks the experts for each query alone; returns the best expert's id for each query.

    Args:
        queries: f32[Q, K], unit rows.
        index: keys of the library.
        backend: ``numpy`` or ``jax``.

    Raises:
        InputError: as `decide`.
    """
    queries = checked_queries(queries, index, backend)
    winners = np.where(queries.any(axis=1), winners_of(BEST[backend](queries, index)), 0)
    return [index.experts[winner] for winner in winners]


def checked_queries(queries: np.ndarray, index: KeyIndex, backend: str = "numpy") -> np.ndarray:
    """The queries as f32[Q, K], at least one; raises InputError as `decide`."""
    if backend not in BEST:
        raise unknown_name("routing backend", backend, BEST)
    if not len(index):
        raise InputError(describe("The library has no keys", cure="add experts to it first"))
    queries = np.asarray(queries, np.float32)
    check_rows(queries, index.keys.shape[1], "queries")
    if not len(queries):
        raise InputError(describe("Routing needs at least one query"))
    voting = queries.any(axis=1)
    if not voting.all():
        logger.warning(
            "%d of %d queries are near to nothing: no vote", (~voting).sum(), len(voting)
        )
    return queries
