"""Adapters: the formula, and their exact places, against transformers' T5 with hooks."""

import jax
import numpy as np
import torch
import transformers
from hf_weights import hf_logits, padded_tokens, peer, small_config

from elm_jax.models import AdapterConfig, T5Network
from elm_jax.runtime import trees

logits_of = jax.jit(T5Network.logits, static_argnums=0)

CONFIG = small_config().with_adapter(AdapterConfig(4))
RNG = np.random.default_rng(0)
BATCH = {"encoder_input_tokens": padded_tokens(RNG, (7, 3, 12), 50),
         "decoder_input_tokens": padded_tokens(RNG, (2, 6, 4), 50)}


def adapted_params(base: dict, seed: int = 0) -> dict:
    """The base's parameters and adapters far from the identity."""
    rng = np.random.default_rng(seed)
    fresh, _ = trees.split(T5Network(CONFIG).abstract_params(), lambda path: "_adapter/" in path)
    drawn = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), fresh
    )
    return trees.merge(base, drawn)


def hook_adapters(model: transformers.T5ForConditionalGeneration, params: dict) -> None:
    """Puts the adapters onto transformers' sub-layers by the formula, written anew in PyTorch."""
    for stack, attention, last in (
        ("encoder", "attention_adapter", 1), ("decoder", "self_attention_adapter", 2)
    ):
        for index, block in enumerate(getattr(model, stack).block):
            layer = params[stack][f"layers_{index}"]
            block.layer[0].SelfAttention.register_forward_hook(adapter_hook(layer[attention]))
            block.layer[last].DenseReluDense.register_forward_hook(
                adapter_hook(layer["mlp_adapter"])
            )


def adapter_hook(weights: dict) -> object:
    weights = jax.tree.map(torch.tensor, weights)

    def adapt(x: torch.Tensor) -> torch.Tensor:
        z = x @ weights["down"]["kernel"] + weights["down"]["bias"]
        z = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        return x + z @ weights["up"]["kernel"] + weights["up"]["bias"]

    def hook(module: object, args: object, output: object) -> object:
        del module, args  # the output is all that an adapter sees
        return (adapt(output[0]), *output[1:]) if isinstance(output, tuple) else adapt(output)

    return hook


def test_adapters_stand_at_the_exact_places() -> None:
    model, base = peer(CONFIG)
    params = adapted_params(base)
    inputs, decoder_inputs = BATCH["encoder_input_tokens"], BATCH["decoder_input_tokens"]
    plain = hf_logits(model, inputs, decoder_inputs)
    hook_adapters(model, params)
    expected = hf_logits(model, inputs, decoder_inputs)
    found = logits_of(T5Network(CONFIG), params, BATCH)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.max(np.abs(expected - plain)) > 0.1


def test_adapter_with_zero_up_weights_is_the_identity() -> None:
    _, base = peer(CONFIG)
    params = adapted_params(base)
    flat = trees.flatten(params)
    silent = trees.unflatten({
        path: np.zeros_like(leaf) if "_adapter/up/" in path else leaf
        for path, leaf in flat.items()
    })
    bare = logits_of(T5Network(CONFIG.with_adapter(None)), base, BATCH)
    np.testing.assert_array_equal(logits_of(T5Network(CONFIG), silent, BATCH), bare)


def test_fresh_adapters_follow_the_published_initialisation() -> None:
    network = T5Network(CONFIG.with_adapter(AdapterConfig(24)))
    flat = jax.jit(lambda key: {  # of these alone, since the compiler takes seconds for all leaves
        path: leaf for path, leaf in trees.flatten(network.init(key)).items() if "_adapter/" in path
    })(jax.random.key(0))
    values = {
        kind: np.concatenate([leaf.ravel() for path, leaf in flat.items() if path.endswith(kind)])
        for kind in ("kernel", "bias")
    }
    assert abs(values["kernel"].std() - 0.01) < 5e-4
    assert abs(values["kernel"].mean()) < 5e-4
    assert values["bias"].size == 8 * 48 and not values["bias"].any()


def test_no_adapter_after_cross_attention() -> None:
    paths = [path for path in trees.flatten(T5Network(CONFIG).abstract_params())
             if path.endswith("_adapter/down/bias")]
    assert len(paths) == 2 * (CONFIG.num_encoder_layers + CONFIG.num_decoder_layers)
    assert not [path for path in paths if "cross" in path or "encoder_decoder" in path]
