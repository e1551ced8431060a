"""Orders of experts: by votes, and by scores with a stated rule for ties."""

import heapq

import numpy as np

from elm_jax.routing.evidence import Evidence
from elm_jax.routing.search import TIE


def ranked_by_votes(evidence: Evidence, group: int = 0) -> list[int]:
    """Positions i64[E] of all experts, best first, by the votes of one group of queries.

    More votes first; among equal votes (above zero) the expert whose first won query comes first, which no
    two experts share; then the experts without votes, the larger mean similarity first.
    """
    votes, first = evidence.votes[group], evidence.first_won[group]
    voted = np.flatnonzero(votes)
    order = voted[np.lexsort((first[voted], -votes[voted]))].tolist()
    return order + ranked_by_score(evidence.mean_nearest[group], np.flatnonzero(votes == 0))


def ranked_by_score(scores: np.ndarray, experts: np.ndarray, places: np.ndarray | None = None) -> list[int]:
    """Orders experts i64[n] by f64[E]: of those within `TIE` of the largest left, the first in place.

    A heap holds the experts that tie with the largest score left, as they come within `TIE` of it.

    Args:
        scores: f64[E].
        experts: to order.
        places: i64[E], places of all experts among equals; by default the oldest comes first.
    """
    places = np.arange(len(scores)) if places is None else places
    falling = experts[np.lexsort((places[experts], -scores[experts]))]
    order: list[int] = []
    tied: list[tuple[int, int]] = []
    taken = np.zeros(len(scores), bool)
    largest, following = 0, 0
    while len(order) < len(falling):
        while largest < len(falling) and taken[falling[largest]]:
            largest += 1
        while following < len(falling) and scores[falling[following]] >= scores[falling[largest]] - TIE:
            heapq.heappush(tied, (int(places[falling[following]]), int(falling[following])))
            following += 1
        order.append(heapq.heappop(tied)[1])
        taken[order[-1]] = True
    return order


def ranking(scores: np.ndarray, evidence: Evidence, different: np.ndarray, group: int = 0) -> list[int]:
    """Positions of all experts, best first: by score, those without (and ties) by votes, copies last.

    Args:
        scores: f64[E]; -inf for an expert that the router does not score.
        evidence: whose votes order those that tie.
        different: bool[E], the experts that are no copies.
        group: of the evidence.
    """
    by_votes = np.array(ranked_by_votes(evidence, group))
    places = np.empty(len(scores), np.int64)
    places[by_votes] = np.arange(len(scores))
    order = ranked_by_score(scores, np.flatnonzero(np.isfinite(scores)), places)
    order += [int(expert) for expert in by_votes if not np.isfinite(scores[expert])]
    return [e for e in order if different[e]] + [e for e in order if not different[e]]


def firsts(scores: np.ndarray, evidence: Evidence, different: np.ndarray) -> np.ndarray:
    """Positions i64[R] of the first of `ranking` for every group at once, from f64[R, E]."""
    left = np.broadcast_to(different, scores.shape)
    for values in (scores, evidence.votes.astype(np.float64), -evidence.first_won.astype(np.float64),
                   evidence.mean_nearest):
        largest = np.where(left, values, -np.inf).max(axis=1, keepdims=True)
        left = left & ((values >= largest - TIE) | (values == largest))
    return left.argmax(axis=1)
