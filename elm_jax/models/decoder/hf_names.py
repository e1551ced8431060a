"""Converts leaf names and configs between this program and Hugging Face: Llama, Mistral, Qwen2, Qwen3, GPT-2.

Handles paths, names and dictionaries, no tensors; what sparse decoders have beside is in `moe_names`. Llama's
types store a Linear's weight as [out, in]; this program stores it as [in, out], as GPT-2's Conv1D does. The
names are those of transformers' LlamaForCausalLM and its like.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.models.decoder import moe_names
from elm_jax.models.decoder.config import DecoderConfig, RopeScaling
from elm_jax.models.decoder.moe_names import MIXTRAL, SPARSE_TYPES
from elm_jax.models.network import HfParameter
from elm_jax.runtime.config_checks import check_dimension, in_their_words

GPT2, LLAMA, MISTRAL, QWEN2, QWEN3 = _DENSE_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
MODEL_TYPES = (*_DENSE_TYPES, *SPARSE_TYPES)
EMBEDDING, POSITIONS, HEAD = "token_embedder/embedding", "position_embedder/embedding", "head/kernel"
HF_HEAD = "lm_head.weight"
_ARCHITECTURES = {GPT2: "GPT2LMHeadModel", LLAMA: "LlamaForCausalLM", MISTRAL: "MistralForCausalLM",
                  QWEN2: "Qwen2ForCausalLM", QWEN3: "Qwen3ForCausalLM", **moe_names.ARCHITECTURES}
_FIELDS = {"vocab_size": "vocab_size", "emb_dim": "hidden_size", "num_heads": "num_attention_heads",
           "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "mlp_dim": "intermediate_size",
           "num_layers": "num_hidden_layers", "max_length": "max_position_embeddings",
           "norm_epsilon": "rms_norm_eps", "dropout_rate": "attention_dropout"}
_GPT2_FIELDS = {"vocab_size": "vocab_size", "emb_dim": "n_embd", "num_heads": "n_head", "mlp_dim": "n_inner",
                "num_layers": "n_layer", "max_length": "n_positions", "norm_epsilon": "layer_norm_epsilon",
                "dropout_rate": "resid_pdrop"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    GPT2: {"n_inner": None, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1, "tie_word_embeddings": True,
           "activation_function": "gelu_new"},
    LLAMA: {"max_position_embeddings": 2048},
    MISTRAL: {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    QWEN2: {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    QWEN3: {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
            "head_dim": 128},
    **moe_names.DEFAULTS,
}
"""What transformers takes where a config.json leaves a field out."""
_COMMON = {"rms_norm_eps": 1e-6, "attention_dropout": 0.0, "hidden_act": "silu",
           "num_key_value_heads": None, "head_dim": None, "rope_theta": 10000.0,
           "tie_word_embeddings": False}
_FIXED: dict[str, dict[str, Any]] = {
    GPT2: {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
           "add_cross_attention": False},
    LLAMA: {"attention_bias": False, "mlp_bias": False}, MISTRAL: {}, QWEN2: {},
    QWEN3: {"attention_bias": False}, **moe_names.FIXED,
}
"""Values that the network assumes; a config may leave them out."""
_TOLD_IDS = {"eos_id": "eos_token_id", "extra_eos_ids": "eos_token_id, of generation_config.json too",
             "pad_id": "pad_token_id", "bos_id": "bos_token_id", "tied_head": "tie_word_embeddings"}
_SILU, _GELU_TANH = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh")
_TOKEN_IDS = {GPT2: 50256, LLAMA: 2, MISTRAL: 2, QWEN2: 151643, QWEN3: 151643, **moe_names.TOKEN_IDS}
"""EOS where neither file names one; Qwen's is ``<|endoftext|>``."""


def hf_parameters(config: DecoderConfig) -> list[HfParameter]:
    """Every tensor of Hugging Face's files of a network without adapters, in the order of its module tree."""
    if config.norm == "layer":
        return _gpt2_parameters(config)
    found = [HfParameter("model.embed_tokens.weight", (EMBEDDING,), tied=config.tied_head)]
    for number in range(config.num_layers):
        found += _llama_layer(config, number)
    found.append(HfParameter("model.norm.weight", ("decoder/final_norm/scale",)))
    return found if config.tied_head else [*found, HfParameter(HF_HEAD, (HEAD,), True)]


def _llama_layer(config: DecoderConfig, number: int) -> list[HfParameter]:
    theirs, ours, found = f"model.layers.{number}.", f"decoder/layers_{number}/", []
    for word, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        place = f"{theirs}self_attn.{word}_proj."
        found.append(HfParameter(f"{place}weight", (f"{ours}attention/{name}/kernel",), True))
        if config.dense_bias or (config.qkv_bias and name != "out"):
            found.append(HfParameter(f"{place}bias", (f"{ours}attention/{name}/bias",)))
    if config.qk_norm:
        found += [HfParameter(f"{theirs}self_attn.{name[0]}_norm.weight",
                              (f"{ours}attention/{name}_norm/scale",)) for name in ("query", "key")]
    if config.sparse is not None and config.sparse.is_sparse(number):
        found += moe_names.sparse_layer(config, theirs, ours)
    else:
        found += _dense_mlp(config, theirs, ours)
    return [*found, HfParameter(f"{theirs}input_layernorm.weight", (f"{ours}pre_attention_norm/scale",)),
            HfParameter(f"{theirs}post_attention_layernorm.weight", (f"{ours}pre_mlp_norm/scale",))]


def _dense_mlp(config: DecoderConfig, theirs: str, ours: str) -> list[HfParameter]:
    found = []
    for word, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
        place = f"{theirs}mlp.{word}_proj."
        found.append(HfParameter(f"{place}weight", (f"{ours}mlp/{name}/kernel",), True))
        if config.dense_bias:
            found.append(HfParameter(f"{place}bias", (f"{ours}mlp/{name}/bias",)))
    return found


def _gpt2_parameters(config: DecoderConfig) -> list[HfParameter]:
    found = [HfParameter("transformer.wte.weight", (EMBEDDING,), tied=config.tied_head),
             HfParameter("transformer.wpe.weight", (POSITIONS,))]
    for number in range(config.num_layers):
        theirs, ours = f"transformer.h.{number}.", f"decoder/layers_{number}/"
        found += _norm(f"{theirs}ln_1", f"{ours}pre_attention_norm")
        for module, names in (("attn.c_attn", ("attention/query", "attention/key", "attention/value")),
                              ("attn.c_proj", ("attention/out",))):
            found += [HfParameter(f"{theirs}{module}.{kind}", tuple(f"{ours}{name}/{leaf}" for name in names))
                      for kind, leaf in (("weight", "kernel"), ("bias", "bias"))]
        found += _norm(f"{theirs}ln_2", f"{ours}pre_mlp_norm")
        found += [HfParameter(f"{theirs}mlp.{module}.{kind}", (f"{ours}mlp/{name}/{leaf}",))
                  for module, name in (("c_fc", "wi"), ("c_proj", "wo"))
                  for kind, leaf in (("weight", "kernel"), ("bias", "bias"))]
    found += _norm("transformer.ln_f", "decoder/final_norm")
    return found if config.tied_head else [*found, HfParameter(HF_HEAD, (HEAD,), True)]


def _norm(theirs: str, ours: str) -> list[HfParameter]:
    return [HfParameter(f"{theirs}.{kind}", (f"{ours}/{leaf}",))
            for kind, leaf in (("weight", "scale"), ("bias", "bias"))]


def config_from_hf(values: Mapping[str, Any], where: Any = None, generation: Mapping[str, Any] | None = None,
                   bos_id: int | None = None) -> DecoderConfig:
    """Builds the network config of a ``config.json``.

    A sliding window that is smaller than the context limits `DecoderConfig.max_length` to it: within the
    window it changes nothing.

    Args:
        values: of ``config.json``.
        where: that file, for errors.
        generation: of ``generation_config.json``, which may name further EOS ids.
        bos_id: id that the tokenizer puts in front of texts, if any.

    Raises:
        InputError: another kind of model, fields that are missing (all are named), or settings that this
            network does not have (all are named).
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(describe("This is no decoder that this program reads", where=where,
                                  got=f"model_type {kind!r}", expected=" or ".join(map(repr, MODEL_TYPES))))
    told = {**({} if kind == GPT2 else _COMMON), **_DEFAULTS[kind], **values}
    names = _GPT2_FIELDS if kind == GPT2 else _FIELDS
    missing = [name for name in names.values() if name not in told]
    if missing:
        raise InputError(describe("The config lacks fields", where=where, got=f"no {', no '.join(missing)}",
                                  expected="the dimensions of a decoder"))
    unlike = [f"{name} {told[name]!r}" for name, wanted in _FIXED[kind].items()
              if told.get(name) is not None and told[name] != wanted]
    if unlike:
        raise InputError(describe(
            "The config asks for what this network does not do", where=where, got=", ".join(unlike),
            expected=", ".join(f"{name} {wanted!r}" for name, wanted in _FIXED[kind].items())))
    told_names = names | _TOLD_IDS | (moe_names.THEIR_WORDS if kind in SPARSE_TYPES else {})
    try:
        fields = {field: told[name] for field, name in names.items()}
        fields |= _gpt2_fields(told, where) if kind == GPT2 else _llama_fields(told, where)
        return DecoderConfig(**fields, tied_head=told["tie_word_embeddings"], bos_id=bos_id,
                             **_ids(kind, told, generation or {}))
    except InputError as error:  # it names the field, but does not know the file
        raise InputError(describe("The config is not a decoder's",
                                  where=f"{where}{in_their_words(error, told_names)}",
                                  got=str(error))) from error


def _gpt2_fields(told: Mapping[str, Any], where: Any) -> dict[str, Any]:
    _check_activation(told["activation_function"], _GELU_TANH, f"{where}: activation_function")
    for name in ("n_embd", "n_head"):
        check_dimension(name, told[name])
    return {"num_kv_heads": told["n_head"], "head_dim": told["n_embd"] // told["n_head"],
            "mlp_dim": told["n_inner"] or 4 * told["n_embd"], "mlp_activations": ("gelu_tanh",),
            "norm": "layer", "position": "learned", "dense_bias": True}


def _llama_fields(told: Mapping[str, Any], where: Any) -> dict[str, Any]:
    _check_activation(told["hidden_act"], _SILU, f"{where}: hidden_act")
    for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
        check_dimension(name, told[name])
    heads, kind = told["num_attention_heads"], told["model_type"]
    base, scaling = _rope(told, where)
    return {"num_kv_heads": heads if told["num_key_value_heads"] is None else told["num_key_value_heads"],
            "head_dim": told["hidden_size"] // heads if told["head_dim"] is None else told["head_dim"],
            "max_length": min(told["max_position_embeddings"], _window(told)),
            "rope_base": base, "rope_scaling": scaling, "qkv_bias": kind == QWEN2, "qk_norm": kind == QWEN3,
            **(moe_names.sparse_fields(told) if kind in SPARSE_TYPES else {})}


def _window(told: Mapping[str, Any]) -> int:
    """Keys that a token attends to."""
    window = told.get("sliding_window")
    is_used = told["model_type"] in (MISTRAL, MIXTRAL) or bool(told.get("use_sliding_window", False))
    if window is None or not is_used:
        return told["max_position_embeddings"]
    check_dimension("sliding_window", window)
    return window


def _check_activation(name: Any, known: tuple[str, ...], where: Any) -> None:
    if name not in known:
        raise unknown_name("activation", str(name), known, where)


def _rope(told: Mapping[str, Any], where: Any) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, from transformers 5's fields or the older ones."""
    values = told.get("rope_parameters") or told.get("rope_scaling") or {}
    if not isinstance(values, Mapping):
        raise InputError(describe("The rotary settings are wrong", where=where, got=repr(values)[:200],
                                  expected="an object"))
    base = values.get("rope_theta", told["rope_theta"])
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor", told.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise InputError(describe("The config asks for what this network does not do", where=where,
                                  got="a partial_rotary_factor other than 1"))
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", values.get("factor"))
    if kind != "llama3":
        raise unknown_name("kind of rotary scaling", str(kind), ("default", "linear", "llama3"), where)
    return base, RopeScaling("llama3", *(values.get(name) for name in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")))


def _ids(kind: str, told: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Special ids: a file may name several EOS, and no padding, which then is EOS."""
    named = []
    for values in (told, generation):
        found = values.get("eos_token_id")
        named += found if isinstance(found, list) else [] if found is None else [found]
    named = named or [_TOKEN_IDS[kind]]
    if not all(isinstance(number, int) for number in named):
        raise InputError(describe("An id of EOS is no number", got=in_short(named),
                                  where="eos_token_id, of config.json or generation_config.json"))
    padding = told.get("pad_token_id")
    unusable = padding is None or (type(padding) is int and padding < 0)  # Llama's first files have -1
    others = tuple(dict.fromkeys(number for number in named[1:] if number != named[0]))
    return {"eos_id": named[0], "extra_eos_ids": others, "pad_id": named[0] if unusable else padding}


def model_type(config: DecoderConfig) -> str:
    """Hugging Face's model type that computes what a network does.

    Raises:
        InputError: there is none.
    """
    if config.sparse is not None:
        return moe_names.sparse_type(config)
    is_gpt2 = config.norm == "layer"
    alike = {
        GPT2: is_gpt2 and config.position == "learned" and config.mlp_activations == ("gelu_tanh",)
        and config.dense_bias and config.num_kv_heads == config.num_heads
        and config.head_dim * config.num_heads == config.emb_dim,
    }
    plain = (not is_gpt2 and config.position == "rotary" and config.mlp_activations == ("silu", "linear")
             and not config.dense_bias and not config.qk_norm_joined)
    alike |= {LLAMA: plain and not config.qkv_bias and not config.qk_norm,
              QWEN2: plain and config.qkv_bias and not config.qk_norm,
              QWEN3: plain and config.qk_norm and not config.qkv_bias}
    for kind, holds in alike.items():
        if holds:
            return kind
    raise InputError(describe("Hugging Face has no such decoder", got=repr(config)[:600],
                              expected=f"what {', '.join(alike)} compute"))


def config_to_hf(config: DecoderConfig, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Builds the ``config.json`` of a network.

    Args:
        config: without adapters.
        kept: a ``config.json`` that the model came with. It stays as it is unless the network is another one
            now; then fields that this program does not use stay.

    Raises:
        InputError: Hugging Face has no such network.
    """
    if kept and _says(kept, config):
        return dict(kept)
    fresh = _fresh(config)
    if not kept or kept.get("model_type") != fresh["model_type"]:
        return fresh
    again = ("rope_parameters", "sliding_window", *moe_names.COUNTS)
    left = {name: value for name, value in kept.items() if name not in again}
    return {**left, **fresh}


def _says(values: Mapping[str, Any], config: DecoderConfig) -> bool:
    """Whether a ``config.json`` describes a network, apart from what other files tell."""
    found = config_from_hf(values)
    return dataclasses.replace(found, bos_id=config.bos_id, extra_eos_ids=config.extra_eos_ids,
                               dtype=config.dtype, adapter=config.adapter) == config


def _fresh(config: DecoderConfig) -> dict[str, Any]:
    kind = model_type(config)
    ends = [config.eos_id, *config.extra_eos_ids]
    values = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind,
              "bos_token_id": config.bos_id, "eos_token_id": ends if len(ends) > 1 else config.eos_id,
              "pad_token_id": config.pad_id, "tie_word_embeddings": config.tied_head, "use_cache": True}
    names = _GPT2_FIELDS if kind == GPT2 else _FIELDS
    values |= {name: getattr(config, field) for field, name in names.items()}
    if kind == GPT2:
        rates = dict.fromkeys(("attn_pdrop", "embd_pdrop"), config.dropout_rate)
        return {**values, **rates, **_FIXED[GPT2], "activation_function": "gelu_new"}
    scaling = config.rope_scaling
    numbers = None if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        numbers |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                    "original_max_position_embeddings": scaling.original_max_length}
    own = {"use_sliding_window": False} if kind in (QWEN2, QWEN3) else {}
    own |= moe_names.sparse_to_hf(config) if kind in SPARSE_TYPES else {}
    return {**values, **own, **_FIXED[kind], "hidden_act": "silu", "rope_theta": config.rope_base,
            "rope_scaling": numbers}
