"""Overlays: the base itself as one of a stack of experts."""

import types

import family_rows
import numpy as np
import pytest
import weights

from elm_jax.experts.overlay import identity_overlay
from elm_jax.models import AdapterConfig, families
from elm_jax.models.adapters.config import KINDS
from elm_jax.models.network import BODY
from elm_jax.runtime import trees


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t5 1.1", "llama"])
def test_an_overlay_of_an_expert_s_shape_computes_what_the_base_does(name, kind):
    """Whatever the expert's own adapters and norms are."""
    config = family_rows.CONFIGS[name]
    own, plain = (families.network_of(config.with_adapter(adapter))
                  for adapter in (AdapterConfig(kind=kind), None))
    base = types.SimpleNamespace(params=weights.drawn(plain, 0))
    overlay, _ = trees.split(weights.drawn(own, 1), lambda path: own.role_of(path) != BODY)
    card = types.SimpleNamespace(network=own.config.to_dict())
    found = identity_overlay(base, types.SimpleNamespace(card=card, overlay=overlay))
    assert trees.first_difference(found, overlay) is None
    inputs, choices = family_rows.rows(config, (3,), 7), family_rows.choices(config, 3, 2, 4)
    expected = plain.target_log_probs(base.params, inputs, choices)
    np.testing.assert_allclose(own.target_log_probs(trees.merge(base.params, found), inputs, choices),
                               expected, atol=1e-6)
    other = own.target_log_probs(trees.merge(base.params, overlay), inputs, choices)
    assert np.abs(other - expected).max() > 1e-3, "the expert itself computes something else"
