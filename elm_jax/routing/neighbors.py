"""How a library routes its own keys: each key without itself, as a query to all the others."""

import dataclasses

import numpy as np

from elm_jax.routing.index import KeyIndex
from elm_jax.routing.search import winners_of

ROWS = 512
"""Keys that are queries at once: ROWS x N similarities are in memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeyNeighbors:
    """Where the keys of each of E experts go.

    Attributes:
        shares: f64[E, E], of the keys of a row's expert the share whose nearest other key is the column's
            expert's; a row sums to 1, or to less where keys are near to nothing.
        similarity: f64[E, E], the mean over the row's keys of the similarity with the column's nearest key;
            on the diagonal without the key itself, so NaN for an expert of one key.
    """

    shares: np.ndarray
    similarity: np.ndarray

    def nearest_pairs(self, count: int) -> list[tuple[int, int, float]]:
        """The pairs of experts whose keys are most alike, ``(first, second, similarity)``, nearest first."""
        both = (self.similarity + self.similarity.T) / 2
        first, second = np.triu_indices(len(both), 1)
        order = np.argsort(-both[first, second], kind="stable")[:count]
        return [(int(first[place]), int(second[place]), float(both[first[place], second[place]]))
                for place in order]


def key_neighbors(index: KeyIndex) -> KeyNeighbors:
    """Routes every key of an index among all other keys, as `vote.decide_each` routes a query.

    Ties go to the lowest key, which is the earliest expert's.
    """
    order = np.argsort(index.owners, kind="stable")
    keys, owners = index.keys[order], index.owners[order]
    experts = len(index.experts)
    starts = np.searchsorted(owners, np.arange(experts))
    shares, similarity = np.zeros((experts, experts)), np.zeros((experts, experts))
    for start in range(0, len(keys), ROWS):
        queries, own = keys[start:start + ROWS], owners[start:start + ROWS]
        products = queries @ keys.T
        products[np.arange(len(queries)), start + np.arange(len(queries))] = -np.inf  # itself
        best = np.maximum.reduceat(products, starts, axis=1)
        votes = queries.any(axis=1) & np.isfinite(best.max(axis=1))
        np.add.at(shares, (own[votes], winners_of(best[votes])), 1)
        np.add.at(similarity, own, best)
    counts = np.bincount(owners, minlength=experts)[:, None]
    similarity = np.where(np.isfinite(similarity), similarity / np.maximum(counts, 1), np.nan)
    return KeyNeighbors(shares / np.maximum(counts, 1), similarity)
