"""Small decoders of transformers with random parameters, none of them zero: a case for each model type."""

import functools

import numpy as np
import torch
import transformers

VOCAB_SIZE = 61
_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2,
          "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "max_position_embeddings": 64,
          "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1, "attn_implementation": "eager"}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 36, "n_head": 3, "n_layer": 2, "n_positions": 64,
         "eos_token_id": 3, "bos_token_id": 3, "attn_implementation": "eager"}
CASES = {
    "llama, grouped, tied": ("Llama", {**_SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
                                       "rope_theta": 100000.0}),
    "llama 3": ("Llama", {
        **_SIZES, "num_key_value_heads": 9, "eos_token_id": [2, 5], "rope_theta": 500.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}}),
    "llama, linear scaling": ("Llama", {**_SIZES, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": 48, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 8}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2, own head": ("GPT2", {**_GPT2, "n_inner": 50, "tie_word_embeddings": False}),
}
"""Name of the type in transformers' classes, and its config."""
_SPARSE = {**_SIZES, "num_experts": 5, "num_experts_per_tok": 2}
SPARSE_CASES = {
    "mixtral": ("Mixtral", {**_SIZES, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, tied": ("Mixtral", {**_SIZES, "num_local_experts": 3, "num_experts_per_tok": 1,
                                  "tie_word_embeddings": True, "rope_theta": 500.0}),
    "olmoe": ("Olmoe", {**_SPARSE, "num_experts_per_tok": 3}),
    "olmoe, gates of sum 1": ("Olmoe", {**_SPARSE, "norm_topk_prob": True, "num_key_value_heads": 9}),
    "qwen3 moe": ("Qwen3Moe", {**_SPARSE, "head_dim": 8, "moe_intermediate_size": 20,
                               "norm_topk_prob": True}),
    "qwen3 moe, dense layers": ("Qwen3Moe", {**_SPARSE, "head_dim": 8, "moe_intermediate_size": 40,
                                             "num_hidden_layers": 3, "decoder_sparse_step": 2}),
}
"""Likewise, of those with experts."""


@functools.cache
def model(name: str) -> torch.nn.Module:
    """The model of a case, whose norms and biases are random too."""
    kind, fields = (CASES | SPARSE_CASES)[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    found = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, parameter in found.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in path or ".ln_" in path:
                parameter.add_(1.0 if path.endswith("weight") else 0.0)
    return found.eval()


def logits(name: str, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
    """transformers' logits f32[B, L, V] of tokens i32[B, L]; `real` masks padding."""
    mask = None if real is None else torch.tensor(real).long()
    with torch.no_grad():
        return model(name)(input_ids=torch.tensor(tokens).long(), attention_mask=mask).logits.numpy()
