"""The network under T5X's calling convention, driven as T5X's models drive it; tests/t5x has T5X itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from elm_jax.models import AdapterConfig, T5Config, T5Network, shift_right
from elm_jax.models.t5x_module import T5XTransformer
from elm_jax.runtime import trees

CONFIG = T5Config(vocab_size=50, emb_dim=24, num_heads=3, head_dim=5, mlp_dim=40, num_encoder_layers=1,
                  num_decoder_layers=2, adapter=AdapterConfig(7))
CONFIGS = {"adapters": CONFIG, "plain": CONFIG.with_adapter(None),
           "tied": T5Config.from_dict({**CONFIG.to_dict(), "logits_via_embedding": True})}
logits_of = jax.jit(T5Network.logits, static_argnums=0)


@pytest.fixture(params=CONFIGS, name="config")
def _config(request) -> T5Config:
    return CONFIGS[request.param]


def params_of(config: T5Config) -> dict:
    """Parameters far enough from their initial values that every leaf matters."""
    return weights.drawn(T5Network(config))


def packed_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(2, 50, (4, 9)), rng.integers(2, 50, (4, 6))
    inputs[:, 7:], targets[:, 5:] = 0, 0
    inputs, targets = inputs.astype(np.int32), targets.astype(np.int32)
    segments = np.tile([1, 1, 1, 2, 2, 2, 2, 0, 0], (4, 1))
    positions = np.tile([0, 1, 2, 0, 1, 2, 3, 0, 0], (4, 1))
    return {
        "encoder_input_tokens": inputs, "decoder_target_tokens": targets,
        "decoder_input_tokens": np.asarray(shift_right(targets)),
        "encoder_segment_ids": segments.astype(np.int32), "encoder_positions": positions.astype(np.int32),
        "decoder_segment_ids": np.tile([1, 1, 2, 2, 2, 0], (4, 1)).astype(np.int32),
        "decoder_positions": np.tile([0, 1, 0, 1, 2, 0], (4, 1)).astype(np.int32),
    }


def call(config: T5Config, params: dict, batch: dict, **changes) -> jax.Array:
    """As `EncoderDecoderModel._compute_logits` calls it."""
    batch = dict(batch)
    tokens = [batch.pop(f"{name}_tokens") for name in ("encoder_input", "decoder_input", "decoder_target")]
    settings = {"decode": False, "enable_dropout": False, **changes}
    rngs = settings.pop("rngs", None)

    @jax.jit
    def compiled(params, tokens, batch, rngs):
        return T5XTransformer(config).apply({"params": params}, *tokens, rngs=rngs, **batch, **settings)

    return compiled(params, tokens, batch, rngs)


def test_the_parameters_are_the_networks(config: T5Config) -> None:
    ones = jnp.ones((2, 3), jnp.float32)  # T5X makes them of floats
    variables = jax.eval_shape(lambda key: T5XTransformer(config).init(
        key, ones, ones, ones, enable_dropout=False), jax.random.key(0))
    network = T5Network(config)
    assert trees.first_difference(variables["params"], network.abstract_params()) is None
    axes = trees.flatten(nn.unbox(variables["params_axes"]))
    expected = trees.flatten(network.logical_axes())
    assert {path.removesuffix("_axes"): tuple(names.names) for path, names in axes.items()} == {
        path: tuple(names) for path, names in expected.items()}


def test_logits_of_packed_rows_are_the_networks(config: T5Config) -> None:
    params, batch = params_of(config), packed_batch()
    expected = np.asarray(logits_of(T5Network(config), params, batch))
    real = batch["decoder_segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(call(config, params, batch))[real], expected[real],
                               rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_where_it_is_asked_for() -> None:
    config = CONFIG.with_dropout(0.5)
    params, batch = params_of(config), packed_batch()
    plain = call(config, params, batch)
    one, other = (call(config, params, batch, enable_dropout=True, rngs={"dropout": jax.random.key(seed)})
                  for seed in (0, 1))
    assert float(jnp.abs(one - other).max()) > 0.1
    assert float(jnp.abs(one - plain).max()) > 0.1
    np.testing.assert_array_equal(call(CONFIG, params, batch), plain)


def test_one_token_after_the_other_gives_the_same_logits(config: T5Config) -> None:
    params, batch = params_of(config), packed_batch()
    inputs, tokens = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    expected = logits_of(
        T5Network(config), params, {"encoder_input_tokens": inputs, "decoder_input_tokens": tokens})
    module = T5XTransformer(config)
    encoded = jax.jit(lambda params: module.apply(
        {"params": params}, inputs, enable_dropout=False, method=module.encode))(params)
    ones = np.ones_like(tokens)
    _, variables = jax.jit(lambda params: module.apply(
        {"params": params}, encoder_input_tokens=np.ones_like(inputs), decoder_input_tokens=ones,
        decoder_target_tokens=ones, mutable=["cache"], decode=True, enable_dropout=False))(params)
    cache = variables["cache"]
    assert all(leaf.shape[:1] == inputs.shape[:1] for path, leaf in trees.flatten(cache).items()
               if path != "cache_index")  # what T5X's beams are made of

    @jax.jit
    def step(cache: dict, token: np.ndarray) -> tuple[jax.Array, dict]:
        return module.apply(
            {"params": params, "cache": cache}, encoded, inputs, token, token, enable_dropout=False,
            decode=True, max_decode_length=tokens.shape[1], mutable=["cache"], method=module.decode)

    for place in range(tokens.shape[1]):
        logits, changed = step(cache, tokens[:, place : place + 1])
        cache = changed["cache"]
        np.testing.assert_allclose(logits[:, 0], expected[:, place], rtol=1e-5, atol=1e-5)
    assert int(cache["cache_index"]) == tokens.shape[1]
