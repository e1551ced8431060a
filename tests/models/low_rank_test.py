"""LoRA: what a rank of update does to the projections, and that a fresh one does nothing."""

import functools

import jax
import numpy as np
import pytest
import weights

from elm_jax.errors import InputError
from elm_jax.models import AdapterConfig, T5Config, T5Network
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.runtime import trees

CONFIG = T5Config(vocab_size=64, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=1,
                  num_decoder_layers=1)
LORA = AdapterConfig(kind="lora", rank=3, alpha=6.0)
PLACES = ("encoder/layers_0/attention", "decoder/layers_0/self_attention",
          "decoder/layers_0/encoder_decoder_attention")


@functools.cache
def parameters() -> dict:
    """Of the network with LoRA, by path; all leaves random."""
    rng = np.random.default_rng(0)
    flat = trees.flatten(T5Network(CONFIG.with_adapter(LORA)).abstract_params())
    return {path: (rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape)).astype(np.float32) for path, leaf
            in flat.items()}


logits_of = jax.jit(T5Network.logits, static_argnums=0)


def logits(config: T5Config, flat: dict) -> np.ndarray:
    rng = np.random.default_rng(1)
    batch = {"encoder_input_tokens": rng.integers(2, 64, (2, 6)).astype(np.int32),
             "decoder_input_tokens": rng.integers(2, 64, (2, 5)).astype(np.int32)}
    return np.asarray(logits_of(T5Network(config), trees.unflatten(flat), batch))


def test_leaves_are_pairs_at_queries_and_values():
    adapters = {path: leaf.shape for path, leaf in parameters().items() if is_adapter_leaf(path)}
    assert adapters == {f"{place}/{which}_adapter/{side}/kernel": shape for place in PLACES
                        for which in ("query", "value")
                        for side, shape in (("down", (32, 3)), ("up", (3, 32)))}


def test_an_update_is_a_change_of_the_projections_weights():
    """In float64 numpy the update is folded into the kernel; a network without LoRA then says the same."""
    flat = parameters()
    folded = {path: leaf for path, leaf in flat.items() if not is_adapter_leaf(path)}
    for place in PLACES:
        for which in ("query", "value"):
            down, up = (flat[f"{place}/{which}_adapter/{side}/kernel"].astype(np.float64)
                        for side in ("down", "up"))
            kernel = folded[f"{place}/{which}/kernel"] + 6.0 / 3 * down @ up
            folded[f"{place}/{which}/kernel"] = kernel.astype(np.float32)
    found, bare = logits(CONFIG.with_adapter(LORA), flat), logits(CONFIG, folded)
    np.testing.assert_allclose(found, bare, atol=2e-5)
    other = logits(CONFIG, {path: leaf for path, leaf in flat.items() if not is_adapter_leaf(path)})
    assert np.abs(found - other).max() > 1e-2


def test_projections_have_ranks_and_scales_of_their_own():
    """Folded into the kernels in float64 numpy, as above; of 'all' a network takes what it has."""
    adapter = AdapterConfig(kind="lora", rank=3, alpha=6.0, targets="all", ranks={"wo": 2, "key": 1},
                            alphas={"wo": 5.0})
    rng, config = np.random.default_rng(2), CONFIG.with_adapter(adapter)
    flat = {path: rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape).astype(np.float32)
            for path, leaf in trees.flatten(T5Network(config).abstract_params()).items()}
    folded = {path: leaf for path, leaf in flat.items() if not is_adapter_leaf(path)}
    ranks = {}
    for path in [path for path in flat if path.endswith("_adapter/down/kernel")]:
        prefix = path.removesuffix("_adapter/down/kernel")
        place = prefix.split("/")[-1]
        down, up = (flat[f"{prefix}_adapter/{side}/kernel"].astype(np.float64) for side in ("down", "up"))
        ranks[place] = down.shape[1]
        scale = {"wo": 5 / 2, "key": 6 / 1}.get(place, 6 / 3)
        folded[f"{prefix}/kernel"] = (folded[f"{prefix}/kernel"] + scale * down @ up).astype(np.float32)
    assert ranks == {"query": 3, "key": 1, "value": 3, "out": 3, "wi_0": 3, "wi_1": 3, "wo": 2}
    np.testing.assert_allclose(logits(config, flat), logits(CONFIG, folded), atol=2e-4)
    assert T5Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("settings", "message"), [
    ({"targets": ["quary"]}, r"AdapterConfig\.targets(?s:.*)nearest: query"), ({"targets": ()}, "targets"),
    ({"ranks": {"wo": 2}}, r"Unknown target 'wo'"), ({"ranks": {"query": 0}}, "ranks, query"),
    ({"alphas": {"value": -1}}, "alphas, value"), ({"ranks": 3}, "a dictionary"),
])
def test_settings_of_projections_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        AdapterConfig(kind="lora", **settings)


def test_a_target_that_the_network_lacks_is_refused():
    network = T5Network(CONFIG.with_adapter(AdapterConfig(kind="lora", targets=["query", "wi"])))
    with pytest.raises(InputError, match=r"no such projection(?s:.*)got: wi\n(?s:.*)wi_0, wi_1"):
        network.config.adapter.check_used(trees.flatten(network.abstract_params()))


def test_a_fresh_update_changes_nothing():
    network = T5Network(CONFIG.with_adapter(LORA))
    made = jax.jit(lambda key: {  # of these alone, since the compiler takes long for all leaves
        path: leaf for path, leaf in trees.flatten(network.init(key)).items() if is_adapter_leaf(path)})
    bare = trees.flatten(weights.drawn(T5Network(CONFIG)))
    fresh = {**bare, **made(jax.random.key(0))}
    np.testing.assert_array_equal(logits(network.config, fresh), logits(CONFIG, bare))
    assert all(np.any(leaf) == ("down" in path) for path, leaf in fresh.items() if is_adapter_leaf(path))


def test_config_survives_json_and_names_its_faults():
    config = CONFIG.with_adapter(LORA)
    assert T5Config.from_dict(config.to_dict()) == config
    assert CONFIG.with_adapter(AdapterConfig(4)).to_dict()["adapter"] == {"bottleneck": 4}
    with pytest.raises(InputError, match="no bottleneck adapters"):
        _ = config.bottleneck
    for wrong in ({"kind": "lara"}, {"rank": 0}, {"alpha": -1.0}):
        with pytest.raises(InputError, match=f"AdapterConfig.{next(iter(wrong))}"):
            AdapterConfig(**{"kind": "lora", **wrong})
