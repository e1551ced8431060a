"""Router `vote`: each query votes for its nearest key's expert.

Source: Jang et al., https://arxiv.org/abs/2302.03202, section 3.2 (Retrieval of Experts).
"""

import numpy as np

from elm_jax.routing.cases import RoutingCase


def vote_scores(case: RoutingCase) -> np.ndarray:
    """Shares f64[R, E] of the queries that vote for each expert; -inf for one without votes."""
    votes = case.evidence.votes
    return np.where(votes > 0, votes / np.maximum(case.evidence.num_queries, 1)[:, None], -np.inf)
