"""Router `centroid`: the expert whose keys' mean is nearest to the queries, or to the text without them."""

import numpy as np

from elm_jax.routing.cases import RoutingCase


def centroid_scores(case: RoutingCase) -> np.ndarray:
    """Mean similarities f64[R, E] with each expert's nearest centroid, of queries or else the text."""
    if case.text is not None and not case.evidence.num_queries.any():
        return case.text.mean_centroid
    return case.evidence.mean_centroid
