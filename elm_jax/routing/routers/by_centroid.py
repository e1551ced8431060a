"""Router `centroid`: the expert whose keys' mean is nearest to the queries."""

import numpy as np

from elm_jax.routing.cases import RoutingCase


def centroid_scores(case: RoutingCase) -> np.ndarray:
    """Mean similarities f64[R, E] of the queries with each expert's nearest centroid."""
    return case.evidence.mean_centroid
