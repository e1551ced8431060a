"""Routers `prior` and `prior+centroid`: how an expert does on other data sets, and how near it is."""

import numpy as np

from elm_jax.routing.cases import RoutingCase


def prior_scores(case: RoutingCase) -> np.ndarray:
    """Priors f64[R, E], the same for every group of queries."""
    return np.broadcast_to(case.prior, case.evidence.votes.shape)


def prior_and_centroid_scores(case: RoutingCase) -> np.ndarray:
    """Priors plus weighted standardised similarities with centroids, f64[R, E]."""
    near = case.standardised(case.evidence.mean_centroid)
    return case.prior + case.settings.centroid_weight * near
