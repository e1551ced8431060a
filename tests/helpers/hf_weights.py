"""The peer of the network's tests: transformers' T5 (PyTorch) with the same random weights."""

import numpy as np
import torch
import transformers

from elm_jax.models import T5Config
from elm_jax.runtime import trees
from elm_jax.types import Params

GENERATIONS = {
    "t5_1_0_tied": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "t5_1_1_untied": {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False},
    "t5_1_1_tied": {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": True},
    "t5_1_0_untied": {"mlp_activations": ("relu",), "logits_via_embedding": False},
}


def small_config(generation: str = "t5_1_1_untied", vocab_size: int = 50) -> T5Config:
    """A toy size in which no two dimensions are equal, so that a transposed weight cannot pass."""
    return T5Config(
        vocab_size=vocab_size, emb_dim=24, num_heads=3, head_dim=5, mlp_dim=40,
        num_encoder_layers=2, num_decoder_layers=2, **GENERATIONS[generation],
    )


def hf_config(config: T5Config) -> transformers.T5Config:
    """The same network in transformers' words."""
    gated = len(config.mlp_activations) == 2
    return transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.emb_dim, d_kv=config.head_dim,
        d_ff=config.mlp_dim, num_heads=config.num_heads, num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers, dropout_rate=config.dropout_rate,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=config.logits_via_embedding,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )


def peer(config: T5Config, seed: int = 0) -> tuple[transformers.T5ForConditionalGeneration, Params]:
    """transformers' model with random weights, and our parameters that hold the same.

    Norm scales and position biases, which transformers starts at 1 and near 0, are drawn too.
    """
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(hf_config(config)).eval()
    if not config.logits_via_embedding:
        untie(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.copy_(1.0 + 0.2 * torch.randn_like(weight))
            elif "relative_attention_bias" in name:
                weight.copy_(torch.randn_like(weight))
    return model, params_from_hf(model, config)


def untie(model: transformers.T5ForConditionalGeneration) -> None:
    """Gives the head its own weights: transformers 5 ties it whatever its config says."""
    shape = model.lm_head.weight.shape
    model.lm_head.weight = torch.nn.Parameter(torch.randn(shape) * shape[1] ** -0.5)


def params_from_hf(model: transformers.T5ForConditionalGeneration, config: T5Config) -> Params:
    """Our parameters from transformers' names; torch's Linear keeps [out, in], ours [in, out]."""
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    relative = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    flat = {"token_embedder/embedding": state["shared.weight"]}
    for stack in ("encoder", "decoder"):
        flat[f"{stack}/relpos_bias/rel_embedding"] = state[f"{stack}.{relative}"].T
        flat[f"{stack}/{stack}_norm/scale"] = state[f"{stack}.final_layer_norm.weight"]
    for index in range(config.num_encoder_layers):
        names = [("SelfAttention", "attention", "pre_attention_layer_norm")]
        flat |= _layer(state, "encoder", index, names, config)
    for index in range(config.num_decoder_layers):
        names = [
            ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
            ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ]
        flat |= _layer(state, "decoder", index, names, config)
    if not config.logits_via_embedding:
        flat["decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    return trees.unflatten({path: np.ascontiguousarray(leaf) for path, leaf in flat.items()})


def _layer(
    state: dict[str, np.ndarray], stack: str, index: int, attentions: list[tuple[str, str, str]],
    config: T5Config,
) -> dict[str, np.ndarray]:
    source, target = f"{stack}.block.{index}.layer", f"{stack}/layers_{index}"
    flat = {}
    for number, (theirs, ours, norm) in enumerate(attentions):
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            flat[f"{target}/{ours}/{name}/kernel"] = state[
                f"{source}.{number}.{theirs}.{letter}.weight"
            ].T
        flat[f"{target}/{norm}/scale"] = state[f"{source}.{number}.layer_norm.weight"]
    number = len(attentions)
    gated = len(config.mlp_activations) == 2
    for name in (("wi_0", "wi_1", "wo") if gated else ("wi", "wo")):
        flat[f"{target}/mlp/{name}/kernel"] = state[
            f"{source}.{number}.DenseReluDense.{name}.weight"
        ].T
    flat[f"{target}/pre_mlp_layer_norm/scale"] = state[f"{source}.{number}.layer_norm.weight"]
    return flat


def padded_tokens(
    rng: np.random.Generator, lengths: tuple[int, ...], vocab_size: int
) -> np.ndarray:
    """i32[B, max length]: rows of random tokens above EOS, each with its own length, then 0."""
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(2, vocab_size, length)
    return tokens


def hf_logits(
    model: transformers.T5ForConditionalGeneration, inputs: np.ndarray, decoder_inputs: np.ndarray
) -> np.ndarray:
    """f32[B, T, V] by transformers' full forward pass."""
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs > 0).long(),
            decoder_input_ids=torch.tensor(decoder_inputs, dtype=torch.long),
        ).logits.numpy()
