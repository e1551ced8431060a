"""Router `shortlist`: the most voted experts, ranked by their priors."""

import numpy as np

from elm_jax.routing.cases import RoutingCase
from elm_jax.routing.ranking import ranked_by_votes


def shortlists(case: RoutingCase) -> np.ndarray:
    """Positions i64[R, n] of the most voted experts of each group, copies not among them."""
    count = min(case.settings.shortlist, int(case.different.sum()))
    return np.array([[expert for expert in ranked_by_votes(case.evidence, group) if case.different[expert]]
                     [:count] for group in range(len(case.evidence))], np.int64)


def shortlist_scores(case: RoutingCase) -> np.ndarray:
    """Priors f64[R, E] of the shortlist; -inf for the others."""
    scores = np.full(case.evidence.votes.shape, -np.inf)
    chosen = shortlists(case)
    np.put_along_axis(scores, chosen, case.prior[chosen], axis=1)
    return scores
