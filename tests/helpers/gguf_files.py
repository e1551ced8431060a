"""Small GGUF files of transformers' models, written with the package ``gguf`` as llama.cpp converts."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import modeling_rope_utils

from elm_jax.vocabularies.gguf_vocabulary import PREFIX

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""llama.cpp's architecture by transformers' model type."""
_NORMAL, _CONTROL = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL


def write_gguf(path: pathlib.Path, model: torch.nn.Module, *, quantisation: str = "F32",
               values: Mapping[str, Any] | None = None, tokenizer: Mapping[str, Any] | None = None,
               tensors: Mapping[str, np.ndarray | None] | None = None) -> pathlib.Path:
    """Writes a model as a file; returns its path.

    Args:
        path: of the file.
        model: of a type in `ARCHITECTURES`.
        quantisation: of matrices; vectors are F32.
        values: metadata that are added or, where None, left out.
        tokenizer: its metadata (`byte_level` or `sentencepiece`); None for a byte-level one.
        tensors: F32 tensors by their names in the file, added, put in place of others or, where None, left
            out.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    found = {**metadata(config, architecture), **(tokenizer or byte_level(config.vocab_size)),
             **(values or {})}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in found.items():
        if value is not None:
            add_value(writer, key, value)
    held = {**stored_tensors(model, architecture), **(tensors or {})}
    for name, array in held.items():
        if array is None:
            continue
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else quantisation]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a value of the type that Python has for it."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}[type(value)]
    add(key, value)


def metadata(config: Any, architecture: str) -> dict[str, Any]:
    """Sizes and numbers of a config, by llama.cpp's keys."""
    if architecture == "gpt2":
        found = {"context_length": config.n_positions, "embedding_length": config.n_embd,
                 "block_count": config.n_layer, "feed_forward_length": config.n_inner or 4 * config.n_embd,
                 "attention.head_count": config.n_head,
                 "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        rope = config.rope_parameters
        found = {"context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
                 "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
                 "attention.head_count": config.num_attention_heads,
                 "attention.head_count_kv": config.num_key_value_heads,
                 "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
                 "rope.freq_base": float(rope["rope_theta"])}
        size = getattr(config, "head_dim", None)
        if size is not None:
            found |= {"attention.key_length": size, "attention.value_length": size}
        if architecture == "llama":
            found |= {"vocab_size": config.vocab_size, "rope.dimension_count": size}
        if rope["rope_type"] == "linear":
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{architecture}.{key}": value for key, value in found.items()}


def stored_tensors(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """A model's tensors under llama.cpp's names, in its orders of rows."""
    config, found = model.config, {}
    layers = config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    for path, tensor in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.detach().float().numpy()
        if architecture == "gpt2" and path.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        if architecture == "llama" and ".q_proj." in path:
            array = in_pairs(array, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in path:
            array = in_pairs(array, config.num_key_value_heads)
        found[names.get_name(path, try_suffixes=(".weight", ".bias"))] = array
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_factors(config.head_dim, rope)
    return found


def in_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order: the two halves of each head take turns."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def llama3_factors(size: int, rope: Mapping[str, Any]) -> np.ndarray:
    """Divisors f32[K/2] of Llama 3's rotary frequencies: what transformers divides them by."""
    config = transformers.LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size,
                                      max_position_embeddings=64, rope_parameters=dict(rope))
    scaled, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size))
    return (plain / scaled).numpy()


def byte_level(size: int, pre: str = "gpt-2", merges: Sequence[tuple[str, str]] = (("!", "!"),)
               ) -> dict[str, Any]:
    """Metadata of a byte-level BPE of `size` ids: three special tokens, what merges make, bytes."""
    made = [left + right for left, right in merges]
    tokens = ["<|pad|>", "<|bos|>", "<|end|>", *made, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = tokens[:size] + [f"[unused{number}]" for number in range(size - len(tokens))]
    return _tokenizer("gpt2", tokens, {"pre": pre, "merges": [" ".join(merge) for merge in merges]})


def _tokenizer(model: str, tokens: list[str], more: Mapping[str, Any]) -> dict[str, Any]:
    types = [int(_CONTROL if number < 3 else _NORMAL) for number in range(len(tokens))]
    return {f"{PREFIX}{key}": value for key, value in {
        "model": model, "tokens": tokens, "token_type": types, "bos_token_id": 1, "eos_token_id": 2,
        "add_bos_token": False, **more}.items()}
