"""Known tasks: whether the expert that votes put first was trained on what the queries are like."""

import dataclasses
import weakref

import numpy as np

from elm_jax.routing.evidence import Evidence
from elm_jax.routing.index import KeyIndex

FEWEST = 20
"""Keys below which an expert's own say too little of how near its task's inputs are."""


def margin_of(num_queries: np.ndarray) -> np.ndarray:
    """Deviations that a known task may be farther from an expert's keys than those from each other, f64[R].

    From a fifth of a deviation at one query up to a whole one at many, ``1 - 0.8 / sqrt(Q)``: a mean of many
    similarities scatters less, so that it may be farther and still be told from one of an unseen task. So 1
    to 2 percent of the unseen prompts of docs/routing.md are taken for known at any Q; no score chose it.
    """
    return 1 - 0.8 / np.sqrt(np.maximum(num_queries, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class KeySpread:
    """How near the keys of each expert are to each other.

    Attributes:
        mean: f64[E], mean similarity of a key with the nearest other key of its expert; NaN for an expert of
            less than `FEWEST`.
        deviation: f64[E], of these similarities.
    """

    mean: np.ndarray
    deviation: np.ndarray


_SPREADS: "weakref.WeakKeyDictionary[KeyIndex, KeySpread]" = weakref.WeakKeyDictionary()


def key_spread(index: KeyIndex) -> KeySpread:
    """The spread of each expert's keys; kept while the index lives. Keys near to nothing do not count."""
    if index not in _SPREADS:
        facts = np.full((2, len(index.experts)), np.nan)
        for expert, keys in enumerate(index.by_expert().values()):
            keys = keys[keys.any(axis=1)]
            if len(keys) >= FEWEST:
                similarities = keys @ keys.T
                np.fill_diagonal(similarities, -np.inf)
                nearest = similarities.max(axis=1).astype(np.float64)
                facts[:, expert] = nearest.mean(), nearest.std()
        _SPREADS[index] = KeySpread(*facts)
    return _SPREADS[index]


def are_known(evidence: Evidence, index: KeyIndex) -> np.ndarray:
    """Says for each group of queries whether the expert that votes put first knows the task, bool[R].

    It does if the queries are as near to its keys as those are to each other, within `margin_of`. A group
    without votes, and an expert of few keys, tell nothing: not known.
    """
    votes = evidence.votes
    most = votes == votes.max(axis=1, keepdims=True)
    first = np.where(most, -evidence.first_won.astype(np.float64), -np.inf).argmax(axis=1)
    spread, groups = key_spread(index), np.arange(len(votes))
    limit = spread.mean[first] - margin_of(evidence.num_queries) * spread.deviation[first]
    with np.errstate(invalid="ignore"):
        return (votes[groups, first] > 0) & (evidence.mean_nearest[groups, first] >= limit)
