"""Routing decisions: each query votes for its nearest key's expert, and votes rank ALL experts.

One decision is made for each target task (`decide`), or for each query by itself (`decide_each`); nothing is
carried over from one to the next.
Source: Jang et al., https://arxiv.org/abs/2302.03202, section 3.2 (Retrieval of Experts).
"""

import dataclasses
import heapq
import logging
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.routing.index import KeyIndex, check_rows
from elm_jax.routing.search import BEST, TIE, winners_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExpertVotes:
    """One entry of a ranking: an expert with its votes and similarities.

    Attributes:
        expert: id.
        votes: number of queries whose nearest key is the expert's.
        best_similarity: of any query with any of its keys.
        mean_similarity: mean over queries of the similarity with its nearest key.
    """

    expert: str
    votes: int
    best_similarity: float
    mean_similarity: float


@dataclasses.dataclass(frozen=True)
class RoutingDecision:
    """The ranking of all experts of a library for one target task, best first.

    Attributes:
        ranking: every expert, also those without votes.
        num_queries: Q, the number of queries; a task with fewer rows has fewer.
        text_format: of keys and queries.
        encoder: its name.
    """

    ranking: tuple[ExpertVotes, ...]
    num_queries: int
    text_format: str
    encoder: str

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
            "ranking": [dataclasses.asdict(line) for line in self.ranking],
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
    queries, voting = _checked(queries, index, backend)
    similarities = BEST[backend](queries, index)
    winners = winners_of(similarities)[voting]
    votes = np.bincount(winners, minlength=len(index.experts))
    best, mean = similarities.max(axis=0), similarities.mean(axis=0, dtype=np.float64)
    ranking = tuple(
        ExpertVotes(index.experts[e], int(votes[e]), float(best[e]), float(mean[e]))
        for e in _ranked(winners, votes, mean)
    )
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
    return [index.experts[winner] for winner in nearest_experts(queries, index, backend=backend)[0]]


def nearest_experts(queries: np.ndarray, index: KeyIndex, *, backend: str = "numpy"
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Finds the expert nearest to each query, and says how near every expert is.

    Args:
        queries: f32[Q, K], unit rows.
        index: keys of the library.
        backend: ``numpy`` or ``jax``.

    Returns:
        (positions i64[Q] of the experts, the oldest for a zero query; similarities f32[Q, E]).

    Raises:
        InputError: as `decide`.
    """
    queries, voting = _checked(queries, index, backend)
    similarities = BEST[backend](queries, index)
    return np.where(voting, winners_of(similarities), 0), similarities


def _checked(queries: np.ndarray, index: KeyIndex, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """The queries as f32[Q, K], and a mask bool[Q] of those that vote."""
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
    return queries, voting


def _ranked(winners: np.ndarray, votes: np.ndarray, mean: np.ndarray) -> list[int]:
    """Positions i64[E] of the experts, best first, from i32[voting queries], i64[E] votes, f64[E] means."""
    seen = list(dict.fromkeys(winners.tolist()))  # in the order of each one's first won query
    order = sorted(seen, key=lambda expert: -votes[expert])  # stable
    return order + _by_similarity(mean, np.flatnonzero(votes == 0))


def _by_similarity(mean: np.ndarray, experts: np.ndarray) -> list[int]:
    """Orders experts i64[n] by f64[E] means: of those within `TIE` of the largest left, the oldest first.

    A heap holds the experts that tie with the largest mean left, as they come within `TIE` of it.
    """
    falling = experts[np.lexsort((experts, -mean[experts]))]
    order: list[int] = []
    tied: list[int] = []
    taken = np.zeros(len(mean), bool)
    largest, following = 0, 0
    while len(order) < len(falling):
        while largest < len(falling) and taken[falling[largest]]:
            largest += 1
        while following < len(falling) and mean[falling[following]] >= mean[falling[largest]] - TIE:
            heapq.heappush(tied, int(falling[following]))
            following += 1
        order.append(heapq.heappop(tied))
        taken[order[-1]] = True
    return order
