"""Our network inside of T5X's own model class, against T5X's own network with the same parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5_rows import rows

from elm_jax.models import AdapterConfig, T5Config, T5Network, shift_right
from elm_jax.models.decode import greedy
from elm_jax.models.t5x_module import T5XTransformer
from elm_jax.runtime import trees

CONFIG = T5Config(vocab_size=50, emb_dim=24, num_heads=3, head_dim=5, mlp_dim=40, num_encoder_layers=1,
                  num_decoder_layers=2)
CONFIGS = {"1.1": CONFIG,
           "1.0": dataclasses.replace(CONFIG, mlp_activations=("relu",), logits_via_embedding=True)}


@pytest.fixture(params=CONFIGS, name="config")
def _config(request) -> T5Config:
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def _t5x_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def model_of(module, **changes):
    """T5X's model around a module."""
    from t5x import decoding, models, optimizers

    class Words:
        eos_id = 1

    return models.EncoderDecoderModel(
        module=module, input_vocabulary=Words(), output_vocabulary=Words(), optimizer_def=optimizers.sgd(0.1),
        **{"decode_fn": decoding.temperature_sample, **changes})


def t5xs_network(config: T5Config):
    """T5X's "minimal T5" of the same dimensions."""
    from t5x.examples.t5 import network

    names = {field.name for field in dataclasses.fields(network.T5Config)}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    return network.Transformer(network.T5Config(**{**values, "dtype": jnp.float32}))


def params_of(config: T5Config) -> dict:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0.0, 0.1, leaf.shape).astype(np.float32),
                          T5Network(config).init(jax.random.key(0)))
    if config.logits_via_embedding:
        return params
    head = params["decoder"]["logits_dense"]
    head["kernel"] = head["kernel"].at[:, 1].mul(2.0)  # end tokens: texts of unlike lengths
    return params


def batch_of(packed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    inputs, targets = (rng.integers(2, 50, (6, length)).astype(np.int32) for length in (9, 7))
    inputs[:, 7:], targets[:, 5:] = 0, 0
    batch = {"encoder_input_tokens": inputs, "decoder_target_tokens": targets,
             "decoder_input_tokens": np.asarray(shift_right(targets)),
             "decoder_loss_weights": (targets > 0).astype(np.int32)}
    if not packed:
        return batch
    parts = {"encoder_segment_ids": [1, 1, 1, 2, 2, 2, 2, 0, 0],
             "encoder_positions": [0, 1, 2, 0, 1, 2, 3, 0, 0],
             "decoder_segment_ids": [1, 1, 2, 2, 2, 0, 0], "decoder_positions": [0, 1, 0, 1, 2, 0, 0]}
    return {**batch, **{name: np.tile(np.asarray(part, np.int32), (6, 1)) for name, part in parts.items()}}


def test_t5xs_network_has_the_same_parameters(config: T5Config) -> None:
    ones = jnp.ones((1, 2), jnp.int32)
    variables = t5xs_network(config).init(jax.random.key(0), ones, ones, ones, enable_dropout=False)
    assert trees.first_difference(variables["params"], T5Network(config).abstract_params()) is None
    own = T5XTransformer(config).init(jax.random.key(0), ones, ones, ones, enable_dropout=False)
    theirs, ours = (trees.flatten(tree["params_axes"]) for tree in (variables, own))
    assert {path: tuple(axes.names) for path, axes in ours.items()} == {
        path: tuple(axes.names) for path, axes in theirs.items()}


@pytest.mark.parametrize("packed", [False, True])
def test_loss_scores_and_gradient_are_those_of_t5xs_network(config: T5Config, packed: bool) -> None:
    params, batch = params_of(config), batch_of(packed)
    ours, theirs = model_of(T5XTransformer(config)), model_of(t5xs_network(config))
    np.testing.assert_allclose(ours.score_batch(params, batch), theirs.score_batch(params, batch), rtol=1e-5)
    (own_loss, _), own = jax.value_and_grad(ours.loss_fn, has_aux=True)(params, batch, None)
    (loss, _), expected = jax.value_and_grad(theirs.loss_fn, has_aux=True)(params, batch, None)
    np.testing.assert_allclose(own_loss, loss, rtol=1e-6)
    expected = trees.flatten(expected)
    for path, gradient in trees.flatten(own).items():
        scale = float(jnp.abs(expected[path]).max())
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-4, atol=1e-5 * scale, err_msg=path)


def test_greedy_decoding_is_ours_and_t5xs(config: T5Config) -> None:
    params, batch = params_of(config), batch_of(False)
    settings = {"decoder_params": {"temperature": 0.0}}
    own = model_of(T5XTransformer(config)).predict_batch_with_aux(params, batch, **settings)[0]
    settings = {"decoder_params": {"temperature": 0.0}}
    theirs = model_of(t5xs_network(config)).predict_batch_with_aux(params, batch, **settings)[0]
    np.testing.assert_array_equal(own, theirs)
    expected = greedy(T5Network(config), params, rows(batch["encoder_input_tokens"]), max_length=7)
    np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("adapters", [False, True])
def test_beams_follow_their_own_cache(config: T5Config, adapters: bool) -> None:
    from t5x import decoding

    batch = batch_of(False)
    if adapters:  # T5X's network has none: the beams' scores are those of the texts that they found
        config = config.with_adapter(AdapterConfig(7))
    params = params_of(config)
    settings = {"num_decodes": 3, "return_all_decodes": True}
    own = model_of(T5XTransformer(config), decode_fn=decoding.beam_search)
    texts, found = own.predict_batch_with_aux(params, batch, **settings, decoder_params={"alpha": 0.0})
    if not adapters:
        peer = model_of(t5xs_network(config), decode_fn=decoding.beam_search)
        expected = peer.predict_batch_with_aux(params, batch, **settings, decoder_params={"alpha": 0.0})
        np.testing.assert_array_equal(texts, expected[0])
        np.testing.assert_allclose(found["scores"], expected[1]["scores"], rtol=1e-5)
    ended = np.asarray((texts == 1).any(axis=-1))
    log_probs = T5Network(config).target_log_probs(params, rows(batch["encoder_input_tokens"]), rows(texts))
    np.testing.assert_allclose(np.asarray(log_probs.sum(-1))[ended], np.asarray(found["scores"])[ended],
                               rtol=1e-4, atol=1e-4)
    assert ended.any() or config.logits_via_embedding
