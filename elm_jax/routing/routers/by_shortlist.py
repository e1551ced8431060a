"""Router `shortlist`: the most voted experts, ranked by their priors; and who is worth scoring on rows."""

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.routing.cases import RoutingCase
from elm_jax.routing.ranking import ranked_by_votes, ranking
from elm_jax.routing.routers.by_prior import prior_and_nearest_scores


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


def candidates(case: RoutingCase) -> np.ndarray:
    """Positions i64[n] of the experts of a task that are worth scoring on rows, the likeliest first.

    They are the best by prior and similarity, or by votes without priors; copies are not among them.

    Raises:
        InputError: there are neither priors nor queries nor a text to choose them by.
    """
    evidence = case.evidence
    if case.prior is not None:
        order = ranking(prior_and_nearest_scores(case)[0], evidence, case.different)
    elif evidence.num_queries.any() or case.text is not None:
        order = ranked_by_votes(evidence if evidence.num_queries.any() else case.text)
    else:
        raise InputError(describe("Nothing says which experts to score on rows",
                                  got="no priors, no queries and no text",
                                  cure="give queries, or run `elm library calibrate`"))
    return np.array([e for e in order if case.different[e]][: case.settings.candidates], np.int64)
