"""Orders of experts: by votes, and by scores with a stated rule for ties."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elm_jax.routing.evidence import Evidence
from elm_jax.routing.search import TIE


class Ranking(Sequence):
    """Lines about all experts, best first; lines, and the order behind `first`, are made when looked at.

    Equal to a tuple of the same lines.

    Args:
        first: positions of the experts that stand first.
        order: gives the positions of all experts, best first.
        line: makes the line about an expert from its position.
        length: E.
    """

    def __init__(self, first: list[int], order: Callable[[], list[int]], line: Callable[[int], Any],
                 length: int) -> None:
        self._known, self._order, self._line, self._length = first, order, line, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int | slice) -> Any:
        places = range(self._length)[place]
        last = places if isinstance(places, int) else max(places, default=0)
        if last >= len(self._known):
            self._known = self._order()
        if isinstance(places, int):
            return self._line(self._known[places])
        return tuple(self._line(self._known[each]) for each in places)

    def __iter__(self) -> Any:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple | Ranking) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def voted_experts(evidence: Evidence, group: int = 0) -> list[int]:
    """Positions of the experts with votes, best first: those that `ranked_by_votes` begins with."""
    votes, first = evidence.votes[group], evidence.first_won[group]
    voted = np.flatnonzero(votes)
    return voted[np.lexsort((first[voted], -votes[voted]))].tolist()


def ranked_by_votes(evidence: Evidence, group: int = 0) -> list[int]:
    """Positions i64[E] of all experts, best first, by the votes of one group of queries.

    More votes first; among equal votes (above zero) the expert whose first won query comes first, which no
    two experts share; then the experts without votes, the larger mean similarity first.
    """
    others = np.flatnonzero(evidence.votes[group] == 0)
    return voted_experts(evidence, group) + ranked_by_score(evidence.mean_nearest[group], others)


def ranked_by_score(scores: np.ndarray, experts: np.ndarray, places: np.ndarray | None = None) -> list[int]:
    """Orders experts i64[n] by f64[E]: of those within `TIE` of the largest left, the first in place.

    What is further apart than `TIE` never ties: each chain of nearer ones is ordered by itself.

    Args:
        scores: f64[E].
        experts: to order.
        places: i64[E], places of all experts among equals; by default the oldest comes first.
    """
    places = np.arange(len(scores)) if places is None else places
    falling = experts[np.lexsort((places[experts], -scores[experts]))]
    near = scores[falling[1:]] >= scores[falling[:-1]] - TIE  # the next one is of the same chain
    order = falling.tolist()
    edges = np.flatnonzero(np.diff(near, prepend=False, append=False))  # where chains begin and end, in turn
    for start, end in edges.reshape(-1, 2).tolist():
        order[start:end + 1] = _chain(scores, order[start:end + 1], places)
    return order


def _chain(scores: np.ndarray, falling: list[int], places: np.ndarray) -> list[int]:
    """Orders experts of falling scores by the rule of `ranked_by_score`.

    A heap holds the experts that tie with the largest score left, as they come within `TIE` of it.
    """
    values, ranks = scores[falling].tolist(), places[falling].tolist()
    order: list[int] = []
    tied: list[tuple[int, int]] = []
    taken = [False] * len(falling)
    largest, following = 0, 0
    while len(order) < len(falling):
        while taken[largest]:
            largest += 1
        while following < len(falling) and values[following] >= values[largest] - TIE:
            heapq.heappush(tied, (ranks[following], following))
            following += 1
        first = heapq.heappop(tied)[1]
        order.append(falling[first])
        taken[first] = True
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
