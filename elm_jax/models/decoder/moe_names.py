"""Names and configs of Hugging Face's sparse decoders: Mixtral, OLMoE, Qwen3-MoE.

Handles paths, names and dictionaries, no tensors. Their files hold a tensor for each expert; transformers 5
joins them when it loads a model, and parts them when it saves one. Source: MixtralForCausalLM and its like.
"""

from collections.abc import Mapping
from typing import Any

from elm_jax.errors import InputError, describe, in_short
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.layers.sparse_config import TOKEN, TOKENS, SparseConfig, steps_of
from elm_jax.models.network import HfParameter
from elm_jax.runtime.config_checks import check_dimension

MIXTRAL, OLMOE, QWEN3_MOE = SPARSE_TYPES = ("mixtral", "olmoe", "qwen3_moe")
ARCHITECTURES = {MIXTRAL: "MixtralForCausalLM", OLMOE: "OlmoeForCausalLM", QWEN3_MOE: "Qwen3MoeForCausalLM"}
DEFAULTS: dict[str, dict[str, Any]] = {
    MIXTRAL: {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
              "rope_theta": 1000000.0, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    OLMOE: {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 1,
            "num_experts_per_tok": 8, "norm_topk_prob": False},
    QWEN3_MOE: {"max_position_embeddings": 32768, "num_key_value_heads": 4, "num_experts_per_tok": 8,
                "norm_topk_prob": False, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
                "mlp_only_layers": None, "sliding_window": 4096},
}
"""What transformers takes where a config.json leaves a field out."""
FIXED: dict[str, dict[str, Any]] = {
    MIXTRAL: {}, OLMOE: {"attention_bias": False, "clip_qkv": None}, QWEN3_MOE: {"attention_bias": False}}
TOKEN_IDS = {MIXTRAL: 2, OLMOE: 50279, QWEN3_MOE: 151643}
"""EOS where neither file names one."""
COUNTS = ("num_local_experts", "num_experts")
"""Names of the number of experts; transformers writes Qwen3-MoE's under either."""
THEIR_WORDS = {"num_experts": "num_local_experts or num_experts", "experts_per_token": "num_experts_per_tok",
               "jitter": "router_jitter_noise", "normalize_gates": "norm_topk_prob"}
_COUNTS = {MIXTRAL: 8, OLMOE: 64, QWEN3_MOE: 128}
_MODULES = {MIXTRAL: "block_sparse_moe.", OLMOE: "mlp.", QWEN3_MOE: "mlp."}
_PROJECTIONS = {"wi_0": ("w1", "gate_proj"), "wi_1": ("w3", "up_proj"), "wo": ("w2", "down_proj")}


def sparse_layer(config: DecoderConfig, theirs: str, ours: str) -> list[HfParameter]:
    """Parameters of a layer's sparse feed-forward: the router, and a tensor for each expert.

    Args:
        config: of the network.
        theirs: what stands before their names, ``model.layers.0.``.
        ours: what stands before the paths, ``decoder/layers_0/``.
    """
    kind = sparse_type(config)
    place = f"{theirs}{_MODULES[kind]}"
    found = [HfParameter(f"{place}gate.weight", (f"{ours}mlp/router/router_weights/w/kernel",), True)]
    for name, words in _PROJECTIONS.items():
        word = words[kind != MIXTRAL]
        found += [HfParameter(f"{place}experts.{expert}.{word}.weight", (f"{ours}mlp/expert/{name}/kernel",),
                              True, expert=expert) for expert in range(config.sparse.num_experts)]
    return found


def sparse_fields(told: Mapping[str, Any]) -> dict[str, Any]:
    """The network's fields that a ``config.json`` says of its experts, from its values with defaults.

    Raises:
        InputError: no layer is sparse; dense layers that are wider or narrower than experts, or that are not
            at equal distances.
    """
    kind = told["model_type"]
    width = told["moe_intermediate_size" if kind == QWEN3_MOE else "intermediate_size"]
    count = next((told[name] for name in sorted(COUNTS, key=lambda name: name != count_name(kind))
                  if told.get(name) is not None), _COUNTS[kind])
    sparse = SparseConfig(
        num_experts=count, experts_per_token=told["num_experts_per_tok"],
        normalize_gates=kind == MIXTRAL or told["norm_topk_prob"], capacity_factor=None,
        jitter=told["router_jitter_noise"] if kind == MIXTRAL else 0.0,
        **(_steps(told, width) if kind == QWEN3_MOE else {"step": 1}))
    return {"mlp_dim": width, "sparse": sparse, "qk_norm": kind != MIXTRAL, "qk_norm_joined": kind == OLMOE}


def count_name(kind: str) -> str:
    """The name of the number of experts in the published files of a model type."""
    return COUNTS[kind != MIXTRAL]


def _steps(told: Mapping[str, Any], width: Any) -> dict[str, Any]:
    """Step and offset of the sparse layers among those that Qwen3-MoE leaves dense."""
    check_dimension("num_hidden_layers", told["num_hidden_layers"], 1024)
    check_dimension("decoder_sparse_step", told["decoder_sparse_step"], 1024)
    dense, layers = told["mlp_only_layers"] or [], told["num_hidden_layers"]
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise InputError(describe("The numbers of dense layers are wrong", where="mlp_only_layers",
                                  got=in_short(dense), expected="a list of numbers of layers"))
    found = [layer for layer in range(layers)
             if layer not in dense and (layer + 1) % told["decoder_sparse_step"] == 0]
    steps = steps_of(found, layers) if found else None
    if steps is None:
        raise InputError(describe(
            "The sparse layers are not at equal distances", where="decoder_sparse_step, mlp_only_layers",
            got=f"sparse layers {found}", expected="one of every so many layers"))
    if len(found) < layers and told["intermediate_size"] != width:
        raise InputError(describe(
            "Dense layers and experts of different widths are not what this network does",
            where="intermediate_size, moe_intermediate_size", got=f"{told['intermediate_size']} and {width}",
            expected="one width"))
    return steps


def sparse_type(config: DecoderConfig) -> str:
    """Hugging Face's model type that computes what a sparse network does.

    Raises:
        InputError: there is none; all that differs from the nearest one is named.
    """
    sparse = config.sparse
    kind = MIXTRAL if not config.qk_norm else OLMOE if config.qk_norm_joined else QWEN3_MOE
    dense = dense_layers(config)
    unlike = [f"{name}: {value!r}" for name, value, fits in (
        ("norm", config.norm, config.norm == "rms"),
        ("position", config.position, config.position == "rotary"),
        ("mlp_activations", config.mlp_activations, config.mlp_activations == ("silu", "linear")),
        ("dense_bias", config.dense_bias, not config.dense_bias),
        ("qkv_bias", config.qkv_bias, not config.qkv_bias),
        ("head_dim", config.head_dim,
         kind != OLMOE or config.head_dim * config.num_heads == config.emb_dim),
        ("choice", sparse.choice, sparse.choice == TOKENS), ("gate", sparse.gate, sparse.gate == TOKEN),
        ("dense_sublayer", sparse.dense_sublayer, not sparse.dense_sublayer),
        ("eval_capacity_factor", sparse.eval_capacity_factor, sparse.eval_capacity_factor is None),
        ("capacity", sparse.capacity, sparse.capacity is None),
        ("normalize_gates", sparse.normalize_gates, kind != MIXTRAL or sparse.normalize_gates),
        ("dense layers", dense, kind == QWEN3_MOE or not dense),
    ) if not fits]
    if unlike:
        raise InputError(describe(
            "Hugging Face has no such sparse decoder", got="; ".join(unlike),
            expected="Mixtral (gates of sum 1, all layers sparse), OLMoE (norms of all heads together, all "
            "layers sparse) or Qwen3-MoE (norms of each head), none of which drops tokens"))
    return kind


def dense_layers(config: DecoderConfig) -> list[int]:
    """Numbers of the layers of a sparse network that are not sparse."""
    return [layer for layer in range(config.num_layers) if not config.sparse.is_sparse(layer)]


def sparse_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` that say what the experts of a network are."""
    kind, sparse = sparse_type(config), config.sparse
    values = {count_name(kind): sparse.num_experts, "num_experts_per_tok": sparse.experts_per_token}
    if kind == MIXTRAL:
        return {**values, "router_jitter_noise": sparse.jitter, "sliding_window": None}
    values["norm_topk_prob"] = sparse.normalize_gates
    if kind == QWEN3_MOE:
        values |= {"moe_intermediate_size": config.mlp_dim, "decoder_sparse_step": 1,
                   "mlp_only_layers": dense_layers(config), "use_sliding_window": False}
    return values
