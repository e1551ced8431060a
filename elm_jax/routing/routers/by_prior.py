"""Routers of priors: how an expert does on other data sets, alone and with how well it matches the task.

A prior is for tasks that the library does not know. Those that it knows are left to votes.
"""

import numpy as np

from elm_jax.routing.cases import RoutingCase
from elm_jax.routing.search import TIE

HOME = 10.0
"""Above every prior and match: the score of experts that have votes where the task is known begins here."""


def prior_scores(case: RoutingCase) -> np.ndarray:
    """Priors f64[R, E], the same for every group of queries."""
    return np.broadcast_to(case.prior, case.evidence.votes.shape)


def prior_and_nearest_scores(case: RoutingCase) -> np.ndarray:
    """Priors plus the logarithm of the share of experts whose nearest keys match no better, f64[R, E]."""
    weight = case.settings.match_weight
    return with_known(case, case.prior + weight * np.log(match_share(case, "mean_nearest")))


def prior_and_centroid_scores(case: RoutingCase) -> np.ndarray:
    """Priors plus the logarithm of the share of experts whose centroids match no better, f64[R, E]."""
    weight = case.settings.match_weight
    return with_known(case, case.prior + weight * np.log(match_share(case, "mean_centroid")))


def with_known(case: RoutingCase, scores: np.ndarray) -> np.ndarray:
    """Scores f64[R, E] in which experts with votes come first, by their share, where the task is known."""
    if case.known is None:
        return scores
    votes = case.evidence.votes
    shares = votes / np.maximum(case.evidence.num_queries, 1)[:, None]
    return np.where(case.known[:, None] & (votes > 0), HOME + shares, scores)


def match_share(case: RoutingCase, similarity: str) -> np.ndarray:
    """Shares f64[R, E] in (0, 1] of the experts that match a task no better than each one.

    The match is the standardised similarity of the queries plus that of the task's text, of what there is of
    the two; without either every share is 1. A similarity tells the experts that are far, not which of the
    near ones is best: the logarithm of the share takes little from the near ones and much from the far ones.

    Args:
        case: to score.
        similarity: ``mean_nearest`` or ``mean_centroid``.
    """
    match = np.zeros(case.evidence.votes.shape)
    if case.evidence.num_queries.any():
        match = match + case.standardised(getattr(case.evidence, similarity))
    if case.text is not None:
        match = match + case.standardised(getattr(case.text, similarity))
    own = np.sort(match[:, case.different], axis=1)
    places = [np.searchsorted(row, values + TIE, side="right")
              for row, values in zip(own, match, strict=True)]
    return np.maximum(places, 1) / own.shape[1]
