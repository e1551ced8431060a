"""Known tasks: whether the expert that votes put first was trained on what the queries are like."""

import weakref

import numpy as np

from elm_jax.routing.evidence import Evidence
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.ranking import firsts

FEWEST = 20
"""Keys below which an expert's own say too little of how near its task's inputs are."""


def margin_of(num_queries: np.ndarray) -> np.ndarray:
    """Deviations that a known task may be farther from an expert's keys than those from each other, f64[R].

    From a fifth of a deviation at one query up to a whole one at many, ``1 - 0.8 / sqrt(Q)``: a mean of many
    similarities scatters less, so that it may be farther and still be told from one of an unseen task. So 1
    to 2 percent of the unseen prompts of docs/routing.md are taken for known at any Q; no score chose it.
    """
    return 1 - 0.8 / np.sqrt(np.maximum(num_queries, 1))


_SPREADS: "weakref.WeakKeyDictionary[KeyIndex, dict[int, tuple[float, float]]]" = weakref.WeakKeyDictionary()


def key_spread(index: KeyIndex, expert: int) -> tuple[float, float]:
    """How near the keys of an expert are to each other; kept while the index lives.

    Keys near to nothing do not count.

    Returns:
        (mean similarity of a key with the nearest other key of the expert, deviation of these similarities);
        NaN for an expert of fewer than `FEWEST` keys.
    """
    made = _SPREADS.setdefault(index, {})
    if expert not in made:
        keys = index.keys[index.places_of(expert)]
        keys = keys[keys.any(axis=1)]
        made[expert] = np.nan, np.nan
        if len(keys) >= FEWEST:
            similarities = keys @ keys.T
            np.fill_diagonal(similarities, -np.inf)
            nearest = similarities.max(axis=1).astype(np.float64)
            made[expert] = float(nearest.mean()), float(nearest.std())
    return made[expert]


def are_known(evidence: Evidence, index: KeyIndex) -> np.ndarray:
    """Says for each group of queries whether the expert that votes put first knows the task, bool[R].

    It does if the queries are as near to its keys as those are to each other, within `margin_of`. A group
    without votes, and an expert of few keys, tell nothing: not known.
    """
    votes = evidence.votes
    first = firsts(votes, evidence, np.ones(votes.shape[1], bool))
    mean, deviation = np.array([key_spread(index, int(expert)) for expert in first]).reshape(-1, 2).T
    limit, groups = mean - margin_of(evidence.num_queries) * deviation, np.arange(len(votes))
    with np.errstate(invalid="ignore"):
        return (votes[groups, first] > 0) & (evidence.mean_nearest[groups, first] >= limit)
