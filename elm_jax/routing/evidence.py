"""What queries say of the experts of a library: votes, similarities with keys, and with centroids.

Evidence is sums over queries, so that of two streams joined is that of all queries at once.
"""

import dataclasses
import weakref

import numpy as np

from elm_jax.routing.index import KeyIndex
from elm_jax.routing.search import BEST, winners_of

NEVER = np.iinfo(np.int64).max
"""The place of the first query won, for an expert that has won none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Evidence of R groups of queries, each a whole task's or one query's, on E experts.

    Attributes:
        num_queries: i64[R]; 0 for a task of which only the text is known.
        votes: i64[R, E], queries whose nearest key is the expert's.
        first_won: i64[R, E], place of the first such query, or `NEVER`.
        nearest: f64[R, E], sum over queries of the similarity with the expert's nearest key.
        best: f32[R, E], the largest of them; -inf without queries.
        centroid: f64[R, E], sum over queries of the similarity with the expert's nearest centroid; NaN where
            centroids were not asked for.
    """

    num_queries: np.ndarray
    votes: np.ndarray
    first_won: np.ndarray
    nearest: np.ndarray
    best: np.ndarray
    centroid: np.ndarray

    def __len__(self) -> int:
        return len(self.num_queries)

    @property
    def mean_nearest(self) -> np.ndarray:
        """f64[R, E], mean similarity with the nearest key; 0 without queries."""
        return self.nearest / np.maximum(self.num_queries, 1)[:, None]

    @property
    def mean_centroid(self) -> np.ndarray:
        """f64[R, E], mean similarity with the nearest centroid; 0 without queries."""
        return self.centroid / np.maximum(self.num_queries, 1)[:, None]

    def pooled(self) -> "Evidence":
        """All groups as one, in their order: R = 1."""
        before = np.concatenate([[0], np.cumsum(self.num_queries)[:-1]])[:, None]
        first = np.where(self.first_won == NEVER, NEVER, self.first_won + before)
        return Evidence(
            self.num_queries.sum(keepdims=True), self.votes.sum(axis=0, keepdims=True),
            first.min(axis=0, keepdims=True), self.nearest.sum(axis=0, keepdims=True),
            self.best.max(axis=0, keepdims=True), self.centroid.sum(axis=0, keepdims=True))

    def joined(self, later: "Evidence") -> "Evidence":
        """These groups, and those of another evidence after them."""
        return Evidence(*(np.concatenate([getattr(self, field.name), getattr(later, field.name)])
                          for field in dataclasses.fields(self)))


def no_evidence(experts: int) -> Evidence:
    """Evidence of one group without queries."""
    zeros = np.zeros((1, experts))
    return Evidence(np.zeros(1, np.int64), zeros.astype(np.int64), np.full((1, experts), NEVER), zeros,
                    np.full((1, experts), -np.inf, np.float32), zeros)


def observe(queries: np.ndarray, index: KeyIndex, copies: np.ndarray | None = None, *,
            num_centroids: int = 0, backend: str = "numpy") -> Evidence:
    """Compares queries with a library; each query is a group, R = Q.

    A query that is near to nothing (a zero row) has no vote. An expert and its copies share their keys:
    they have the same similarities, and the oldest has the votes.

    Args:
        queries: f32[Q, K], unit or zero rows.
        index: of E experts.
        copies: i64[E], position of the oldest expert that is equal to each; itself for one that has no equal.
        num_centroids: means that stand for an expert's keys; 0 for none.
        backend: one of `BEST`.
    """
    nearest = BEST[backend](queries, index).astype(np.float32)
    centroids = centroid_index(index, num_centroids) if num_centroids else None
    centroid = np.full_like(nearest, np.nan) if centroids is None else (
        nearest if centroids is index else BEST[backend](queries, centroids))
    if copies is not None:
        nearest, centroid = shared(nearest, copies), shared(centroid, copies)
    return evidence_of(nearest, centroid, queries.any(axis=1))


def evidence_of(nearest: np.ndarray, centroid: np.ndarray, voting: np.ndarray) -> Evidence:
    """Evidence of queries, a group each, from what they are compared with.

    Args:
        nearest: f32[Q, E], similarities with each expert's nearest key; copies have those of the oldest.
        centroid: f32[Q, E], likewise with its nearest centroid.
        voting: bool[Q], the queries that are near to something.
    """
    votes = np.zeros(nearest.shape, np.int64)
    voters = np.flatnonzero(voting)
    votes[voters, winners_of(nearest[voters])] = 1
    return Evidence(np.ones(len(nearest), np.int64), votes, np.where(votes > 0, 0, NEVER),
                    nearest.astype(np.float64), nearest, centroid.astype(np.float64))


def shared(similarities: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """f32[Q, E] with the largest of an expert and its copies for each of them."""
    largest = similarities.copy()
    for expert in np.flatnonzero(copies != np.arange(len(copies))):
        largest[:, copies[expert]] = np.maximum(largest[:, copies[expert]], similarities[:, expert])
    return largest[:, copies]


_CENTROIDS: "weakref.WeakKeyDictionary[KeyIndex, dict[int, KeyIndex]]" = weakref.WeakKeyDictionary()


def centroid_index(index: KeyIndex, count: int = 1) -> KeyIndex:
    """An index with at most `count` keys an expert: its mean, or means by spherical k-means; kept by index.

    An expert of no more keys than `count` keeps them.
    """
    made = _CENTROIDS.setdefault(index, {})
    if count not in made:
        if np.bincount(index.owners).max(initial=0) <= count:
            return index
        means = [centroids_of(keys, count) for keys in index.by_expert().values()]
        owners = np.repeat(np.arange(len(means), dtype=np.int32), [len(rows) for rows in means])
        made[count] = dataclasses.replace(index, keys=np.concatenate(means), owners=owners)
    return made[count]


def centroids_of(keys: np.ndarray, count: int) -> np.ndarray:
    """Unit means f32[n, K] of keys f32[S, K], n <= count: by spherical k-means with a fixed seed.

    Rows of zeros, which are near to nothing, do not count.
    """
    keys = keys[keys.any(axis=1)] if not keys.any(axis=1).all() else keys
    if len(keys) == 0:
        return np.zeros((1, keys.shape[1]), np.float32)
    if len(keys) <= count:
        return np.asarray(keys, np.float32)
    if count == 1:
        means = keys.mean(axis=0, dtype=np.float64, keepdims=True)
    else:
        from sklearn.cluster import KMeans  # late: a second of start-up

        # On unit rows k-means by distance assigns as by cosine; its means need only unit length again.
        means = KMeans(count, n_init=4, random_state=0).fit(keys.astype(np.float64)).cluster_centers_
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return (means / np.where(norms > 1e-9, norms, 1.0)).astype(np.float32)
