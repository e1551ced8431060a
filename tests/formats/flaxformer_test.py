"""Networks with experts that flaxformer makes and Orbax saves, read by this program: the same logits.

Runs where flaxformer's sources are on the path (github.com/google/flaxformer, tested at 399ea3a).
"""

import dataclasses

import jax
import numpy as np
import pytest
import t5x_checkpoints as made

from elm_jax.formats.t5x import t5x_checkpoints
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.t5.network import T5Network, shift_right
from elm_jax.runtime import trees

try:
    import flaxformer_peer
except ImportError as error:
    pytest.skip(f"flaxformer cannot be imported ({error}); it is on no package index",
                allow_module_level=True)

pytestmark = pytest.mark.slow

CASES = {"switch": ("t5_1_0_tied", SparseConfig(6, capacity_counts_choices=False)),
         "st-moe": ("t5_1_1_untied", SparseConfig(6, experts_per_token=2, capacity_counts_choices=False,
                                                  order="choice", dense_sublayer=True))}


@pytest.fixture(autouse=True)
def flaxformer_promotes_ranks():
    """It adds arrays of different ranks, which this program's tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_logits_are_flaxformer_s(name, tmp_path):
    generation, sparse = CASES[name]
    config = dataclasses.replace(made.config(generation), sparse=sparse)
    peer, draw = flaxformer_peer.Peer(config), np.random.default_rng(0)
    inputs, targets = (draw.integers(2, 50, (3, length)).astype(np.int32) for length in (11, 7))
    inputs[0, 8:] = 0
    decoder_inputs = np.asarray(shift_right(targets))
    leaves = {path: np.asarray(leaf)
              for path, leaf in trees.flatten(dict(peer.init(1, inputs, decoder_inputs))).items()}
    for path, leaf in leaves.items():  # unlike norms, and experts that tokens are sure of
        noise = draw.normal(size=leaf.shape) / 5 if path.endswith("/scale") else 0.0
        leaves[path] = np.float32(leaf * (20.0 if "/router/" in path else 1.0) + noise)
    made.write_orbax(tmp_path, leaves)
    model = t5x_checkpoints.open_t5x(tmp_path, experts_per_token=sparse.experts_per_token)
    assert model.config == config
    made.assert_same(made.read_all(model), leaves)
    params = trees.unflatten(leaves)
    wanted = np.asarray(peer.logits(params, inputs, decoder_inputs))
    found = np.asarray(jax.jit(T5Network(config).logits)(params, {
        "encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}))
    print(f"{name}: logits differ by {np.abs(found - wanted).max():.1e} of {np.abs(wanted).max():.1f}")
    assert np.abs(found - wanted).max() < 1e-5 and wanted.std() > 0.1
