"""T5 against transformers' T5, and the properties that no reference is needed for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import transformers
import weights
from hf_weights import (
    GENERATIONS,
    hf_config,
    hf_logits,
    padded_tokens,
    params_from_hf,
    peer,
    small_config,
)
from t5_rows import rows

from elm_jax import errors
from elm_jax.models import AdapterConfig, T5Config, T5Network, shift_right
from elm_jax.runtime import sharding, trees

logits_of = jax.jit(T5Network.logits, static_argnums=0)
init_of = jax.jit(T5Network.init, static_argnums=0)
log_probs_of = jax.jit(T5Network.target_log_probs, static_argnums=0)

XL = T5Config(
    vocab_size=32128, emb_dim=2048, num_heads=32, head_dim=64, mlp_dim=5120,
    num_encoder_layers=24, num_decoder_layers=24,
)
LENGTHS = (7, 3, 12, 1)
TARGET_LENGTHS = (2, 6, 1, 4)


def make_batch(vocab_size: int = 50, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = padded_tokens(rng, TARGET_LENGTHS, vocab_size)
    return {
        "encoder_input_tokens": padded_tokens(rng, LENGTHS, vocab_size),
        "decoder_input_tokens": np.asarray(shift_right(targets)),
        "decoder_target_tokens": targets,
    }


@pytest.fixture(scope="module")
def network() -> T5Network:
    return T5Network(small_config())


@pytest.fixture(scope="module")
def params(network: T5Network) -> dict:
    return peer(network.config)[1]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits_equal_transformers(generation: str) -> None:
    config = small_config(generation)
    model, params = peer(config)
    batch = make_batch()
    logits = logits_of(T5Network(config), params, batch)
    expected = hf_logits(model, batch["encoder_input_tokens"], batch["decoder_input_tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.std(expected) > 0.3  # logits near zero would agree for any weights


def test_long_inputs_equal_transformers(network: T5Network) -> None:
    """Distances beyond the last bucket's border (128), in both stacks."""
    model, params = peer(network.config)
    rng = np.random.default_rng(1)
    batch = {"encoder_input_tokens": padded_tokens(rng, (300, 170), 50),
             "decoder_input_tokens": padded_tokens(rng, (200, 160), 50)}
    expected = hf_logits(model, batch["encoder_input_tokens"], batch["decoder_input_tokens"])
    np.testing.assert_allclose(logits_of(network, params, batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("generation", ["t5_1_0_tied", "t5_1_1_untied"])
def test_gradients_equal_transformers(generation: str) -> None:
    """Every leaf: several layers have gradients written by hand."""
    config = small_config(generation)
    model, params = peer(config)
    batch = make_batch()
    targets = batch["decoder_target_tokens"]

    def loss(params: dict) -> jax.Array:
        log_probs = jax.nn.log_softmax(T5Network(config).logits(params, batch))
        hit = jax.nn.one_hot(targets, config.vocab_size) * (targets > 0)[..., None]
        return -(log_probs * hit).sum() / (targets > 0).sum()

    labels = torch.tensor(np.where(targets > 0, targets, -100)).long()
    inputs = torch.tensor(batch["encoder_input_tokens"]).long()
    model(input_ids=inputs, attention_mask=(inputs > 0).long(), labels=labels).loss.backward()
    state = {name: weight.grad for name, weight in model.named_parameters()}
    for name, weight in model.state_dict(keep_vars=True).items():
        weight.data = state.get(name, weight.grad)
    expected = trees.flatten(params_from_hf(model, config))
    for path, gradient in trees.flatten(jax.jit(jax.grad(loss))(params)).items():
        scale = np.abs(expected[path]).max()
        assert scale > 0.0, path
        np.testing.assert_allclose(
            gradient, expected[path], rtol=0, atol=2e-5 * max(scale, 1.0), err_msg=path
        )


def test_init_has_the_structure_of_the_peer_and_is_deterministic(network: T5Network,
                                                                 params: dict) -> None:
    fresh = init_of(network, jax.random.key(3))
    assert trees.first_difference(fresh, params) is None
    assert trees.first_difference(network.abstract_params(), params) is None
    assert trees.fingerprint(fresh) == trees.fingerprint(init_of(network, jax.random.key(3)))
    assert trees.fingerprint(fresh) != trees.fingerprint(init_of(network, jax.random.key(4)))


def test_whole_tree_of_a_tiny_network() -> None:
    config = T5Config(
        vocab_size=50, emb_dim=64, num_heads=3, head_dim=5, mlp_dim=40, num_encoder_layers=2,
        num_decoder_layers=1, adapter=AdapterConfig(),
    )
    attention = {"query/kernel": (64, 15), "key/kernel": (64, 15), "value/kernel": (64, 15),
                 "out/kernel": (15, 64)}
    mlp = {"wi_0/kernel": (64, 40), "wi_1/kernel": (64, 40), "wo/kernel": (40, 64)}
    adapter = {"down/kernel": (64, 2), "down/bias": (2,), "up/kernel": (2, 64), "up/bias": (64,)}
    norm = {"scale": (64,)}
    encoder_layer = {
        "pre_attention_layer_norm": norm, "attention": attention, "attention_adapter": adapter,
        "pre_mlp_layer_norm": norm, "mlp": mlp, "mlp_adapter": adapter,
    }
    decoder_layer = {
        "pre_self_attention_layer_norm": norm, "self_attention": attention,
        "self_attention_adapter": adapter, "pre_cross_attention_layer_norm": norm,
        "encoder_decoder_attention": attention, "pre_mlp_layer_norm": norm, "mlp": mlp,
        "mlp_adapter": adapter,
    }
    expected = trees.flatten({
        "token_embedder": {"embedding": (50, 64)},
        "encoder": {"relpos_bias": {"rel_embedding": (3, 32)}, "layers_0": encoder_layer,
                    "layers_1": encoder_layer, "encoder_norm": norm},
        "decoder": {"relpos_bias": {"rel_embedding": (3, 32)}, "layers_0": decoder_layer,
                    "decoder_norm": norm, "logits_dense": {"kernel": (64, 50)}},
    })
    found = trees.flatten(jax.eval_shape(T5Network(config).init, jax.random.key(0)))
    assert {path: leaf.shape for path, leaf in found.items()} == expected
    assert {str(leaf.dtype) for leaf in found.values()} == {"float32"}


def test_t5_1_0_has_one_wi_and_no_head() -> None:
    flat = trees.flatten(T5Network(small_config("t5_1_0_tied")).abstract_params())
    assert flat["encoder/layers_0/mlp/wi/kernel"].shape == (24, 40)
    assert not [path for path in flat if "logits_dense" in path or "wi_0" in path]


def test_logical_axes_by_leaf(network: T5Network) -> None:
    adapted = T5Network(network.config.with_adapter(AdapterConfig(2)))
    axes = trees.flatten(adapted.logical_axes())
    assert axes.keys() == trees.flatten(adapted.abstract_params()).keys()
    expected = {
        "/embedding": ("vocab", "embed"), "rel_embedding": ("heads", "relpos_buckets"),
        "scale": ("embed",), "query/kernel": ("embed", "joined_kv"),
        "key/kernel": ("embed", "joined_kv"), "value/kernel": ("embed", "joined_kv"),
        "out/kernel": ("joined_kv", "embed"), "wi_0/kernel": ("embed", "mlp"),
        "wi_1/kernel": ("embed", "mlp"), "wo/kernel": ("mlp", "embed"),
        "logits_dense/kernel": ("embed", "vocab"), "down/kernel": ("embed", "bottleneck"),
        "down/bias": ("bottleneck",), "up/kernel": ("bottleneck", "embed"), "up/bias": ("embed",),
    }
    for path, names in axes.items():
        matches = [value for suffix, value in expected.items() if path.endswith(suffix)]
        assert [tuple(names)] == matches, path
        assert isinstance(names, sharding.Axes)


def test_xl_has_the_published_number_of_parameters() -> None:
    """2.85 B. transformers ties the head; ours has its own V x D, as the published weights do."""
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(hf_config(XL))
    tied = sum(weight.numel() for weight in model.parameters())
    count = trees.count(T5Network(XL).abstract_params())
    assert count == tied + 32128 * 2048 == 2_849_757_184


def test_xl_prompt_expert_trains_25_618_432_parameters() -> None:
    adapted = T5Network(XL.with_adapter(AdapterConfig())).abstract_params()
    base_paths = trees.flatten(T5Network(XL).abstract_params()).keys()
    trained, _ = trees.split(
        adapted, lambda path: path.endswith("/scale") or path not in base_paths
    )
    assert trees.count(trained) == 25_618_432


def test_target_log_probs_equal_full_passes_per_choice(network: T5Network) -> None:
    model, params = peer(network.config)
    rng = np.random.default_rng(2)
    inputs = padded_tokens(rng, LENGTHS, 50)
    targets = padded_tokens(rng, (3, 5, 1, 2, 4, 5, 2, 2, 1, 1, 3, 4), 50).reshape(4, 3, 5)
    log_probs = log_probs_of(network, params, rows(inputs), rows(targets))
    assert log_probs.shape == (4, 3, 5)
    for choice in range(3):
        row = targets[:, choice]
        full = scipy.special.log_softmax(hf_logits(model, inputs, np.asarray(shift_right(row))), -1)
        expected = np.where(row > 0, np.take_along_axis(full, row[..., None], -1)[..., 0], 0.0)
        np.testing.assert_allclose(log_probs[:, choice], expected, rtol=0, atol=1e-4)


def test_target_log_probs_do_not_depend_on_order_or_padding(network: T5Network,
                                                            params: dict) -> None:
    rng = np.random.default_rng(3)
    inputs = padded_tokens(rng, LENGTHS, 50)
    targets = padded_tokens(rng, (3, 5, 1, 2) * 3, 50).reshape(4, 3, 5)
    log_probs = np.asarray(log_probs_of(network, params, rows(inputs), rows(targets)))
    order = np.array([2, 0, 1])
    permuted = log_probs_of(network, params, rows(inputs), rows(targets[:, order]))
    np.testing.assert_allclose(permuted, log_probs[:, order], rtol=0, atol=2e-6)
    wide_inputs = np.pad(inputs, ((0, 0), (0, 6)))
    wide_targets = np.pad(targets, ((0, 0), (0, 2), (0, 3)))
    padded = log_probs_of(network, params, rows(wide_inputs), rows(wide_targets))
    np.testing.assert_allclose(padded[:, :3, :5], log_probs, rtol=0, atol=2e-6)
    assert not np.any(padded[:, 3:]) and not np.any(padded[:, :, 5:])


def test_target_log_probs_repeat_no_encoding(network: T5Network, params: dict) -> None:
    """No value has a row for each choice (B * C = 10) and each source position (S = 13)."""
    shapes = value_shapes(jax.make_jaxpr(network.target_log_probs)(
        params, rows(np.ones((2, 13), np.int32)), rows(np.ones((2, 5, 7), np.int32))
    ).jaxpr)
    assert (2, 3, 35, 13) in shapes  # cross-attention: heads, one query axis C * T, source
    assert (10, 3, 7, 7) in shapes  # self-attention: a choice on its own
    assert not [shape for shape in shapes if 13 in shape and (10 in shape or 5 in shape[:2])]


def value_shapes(jaxpr: jax.extend.core.Jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values that a program computes, calls included."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {tuple(value.aval.shape) for value in equation.outvars}
        for parameter in equation.params.values():
            if hasattr(parameter, "jaxpr"):
                shapes |= value_shapes(parameter.jaxpr)
    return shapes


@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_row_equals_separate_rows(
    network: T5Network, params: dict, with_positions: bool
) -> None:
    rng = np.random.default_rng(4)
    sources = padded_tokens(rng, (5, 3), 50)
    targets = padded_tokens(rng, (4, 2), 50)
    starts = np.asarray(shift_right(targets))
    rows = {"encoder_input_tokens": sources, "decoder_input_tokens": starts}
    separate = np.asarray(logits_of(network, params, rows))
    batch = {
        "encoder_input_tokens": [*sources[0], *sources[1][:3], 0, 0],
        "encoder_segment_ids": [1] * 5 + [2] * 3 + [0] * 2,
        "encoder_positions": [0, 1, 2, 3, 4, 0, 1, 2, 0, 0],
        "decoder_input_tokens": [*starts[0], *starts[1][:2], 0],
        "decoder_segment_ids": [1] * 4 + [2] * 2 + [0],
        "decoder_positions": [0, 1, 2, 3, 0, 1, 0],
    }
    batch = {name: np.asarray([row], np.int32) for name, row in batch.items()}
    if not with_positions:
        batch = {name: row for name, row in batch.items() if not name.endswith("positions")}
    packed = np.asarray(logits_of(network, params, batch))
    np.testing.assert_allclose(packed[0, :4], separate[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(packed[0, 4:6], separate[1, :2], rtol=0, atol=2e-6)
    assert np.all(np.isfinite(packed))


def test_positions_move_the_relative_bias(network: T5Network, params: dict) -> None:
    batch = make_batch()
    count = np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12))
    plain = logits_of(network, params, batch)
    shifted = logits_of(network, params, {**batch, "encoder_positions": count + 40})
    stretched = logits_of(network, params, {**batch, "encoder_positions": count * 3})
    np.testing.assert_allclose(shifted, plain, rtol=0, atol=2e-6)
    assert np.max(np.abs(stretched - plain)) > 1e-2


def test_segment_ids_of_one_side_are_refused(network: T5Network, params: dict) -> None:
    batch = {**make_batch(), "encoder_segment_ids": np.ones((4, 12), np.int32)}
    with pytest.raises(errors.InputError, match="segment ids of both sides"):
        logits_of(network, params, batch)


def test_no_gradient_from_a_logit_to_later_tokens(network: T5Network, params: dict) -> None:
    """Every token stands once, so a row of the embedding's gradient belongs to one position."""
    batch = {"encoder_input_tokens": np.array([[30, 31, 32, 0]], np.int32),
             "decoder_input_tokens": np.array([[0, 10, 11, 12, 13]], np.int32)}

    def logit_sum(params: dict) -> jax.Array:
        return logits_of(network, params, batch)[0, 2].sum()

    gradient = np.abs(jax.grad(logit_sum)(params)["token_embedder"]["embedding"]).max(axis=1)
    assert gradient[12] == gradient[13] == 0.0
    assert min(gradient[token] for token in (10, 11, 30, 31, 32)) > 0.0


def test_bfloat16_activations_are_finite_and_close(params: dict) -> None:
    config = small_config()
    batch = make_batch()
    exact = logits_of(T5Network(config), params, batch)
    half = T5Network(T5Config.from_dict({**config.to_dict(), "dtype": "bfloat16"}))
    rounded = logits_of(half, params, batch)
    start = jax.jit(half.start, static_argnums=2)(params, rows(batch["encoder_input_tokens"]), 3)
    assert start.cache["layers"]["layers_0"]["cross_key"].dtype == jnp.bfloat16
    assert rounded.dtype == jnp.float32
    assert np.all(np.isfinite(rounded))
    error = np.sqrt(np.mean((rounded - exact) ** 2)) / np.std(exact)
    assert 1e-5 < error < 0.03


def test_a_row_of_padding_only_stays_finite(network: T5Network, params: dict) -> None:
    inputs = np.zeros((1, 4), np.int32)
    targets = np.array([[[3, 1], [0, 0]]], np.int32)
    assert np.all(np.isfinite(log_probs_of(network, params, rows(inputs), rows(targets))))


def test_dropout_only_with_a_key(params: dict) -> None:
    config = small_config()
    wet = T5Network(config.with_dropout(0.3))
    batch = make_batch()
    dry = logits_of(T5Network(config), params, batch)
    np.testing.assert_array_equal(logits_of(wet, params, batch), dry)
    first, again, other = (
        logits_of(wet, params, batch, dropout_rng=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 0.1


@pytest.mark.parametrize(("data", "model"), [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4),
                                             pytest.param(1, 8, marks=pytest.mark.slow)])
def test_split_parameters_give_the_same_logits(data: int, model: int) -> None:
    config = T5Config(
        vocab_size=64, emb_dim=32, num_heads=8, head_dim=4, mlp_dim=64, num_encoder_layers=1,
        num_decoder_layers=1, adapter=AdapterConfig(8),
    )
    network = T5Network(config)
    params = weights.drawn(network)
    batch = {name: np.concatenate([rows, rows]) for name, rows in make_batch().items()}
    mesh = sharding.make_mesh(data, model)
    shardings = sharding.tree_shardings(network.logical_axes(), network.abstract_params(), mesh)
    split = logits_of(network, sharding.put_tree(params, shardings),
                                    sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(split, logits_of(network, params, batch), rtol=0, atol=1e-5)
