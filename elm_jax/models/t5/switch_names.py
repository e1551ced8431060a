"""Names and config of transformers' SwitchTransformers: T5 1.0 with sparse layers, one expert a token.

Handles names and dictionaries, no tensors. Source: transformers' SwitchTransformersForConditionalGeneration,
from version 5.18 on (older ones of version 5 drop no token whatever the capacity).
"""

from collections.abc import Mapping
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.sparse_config import POSITION, TOKEN, TOKENS, SparseConfig
from elm_jax.models.t5.config import T5Config
from elm_jax.runtime.config_checks import check_dimension

SWITCH = "switch_transformers"
AMPLE_CAPACITY = 1 << 20
"""Places of an expert in a sequence that no sequence fills: a config.json's way to say no dropping."""
DEFAULTS: dict[str, Any] = {
    "num_experts": 8, "expert_capacity": 64, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3,
    "router_jitter_noise": 0.01, "dense_act_fn": "relu"}
"""What transformers takes where a config.json leaves a field out."""
FIXED = {"router_bias": False, "router_dtype": "float32", "batch_prioritized_routing": False,
         "is_gated_act": False}
"""Values that the network assumes; a config may leave them out."""
THEIR_WORDS = {"num_experts": "num_experts", "jitter": "router_jitter_noise", "capacity": "expert_capacity",
               "step": "encoder_sparse_step", "decoder_step": "decoder_sparse_step"}
"""Names in a config.json of the fields of `SparseConfig`."""
_STEPS = {"encoder": "encoder_sparse_step", "decoder": "decoder_sparse_step"}


def name_in_mlp(parts: list[str]) -> str:
    """Name below the sub-layer of a path's parts from ``mlp`` on; an expert's has ``*`` as its number."""
    if parts[1] == "router":
        return "mlp.router.classifier.weight"
    if parts[1] == "expert":
        return f"mlp.experts.expert_*.{parts[2]}.weight"
    return f"mlp.{parts[1]}.weight"


def sparse_from_hf(values: Mapping[str, Any]) -> SparseConfig:
    """Builds the settings of sparse layers of a ``config.json``."""
    told = {**DEFAULTS, **values}
    steps = {}
    for stack, field in _STEPS.items():
        layers = told["num_layers"]
        if stack == "decoder" and told.get("num_decoder_layers") is not None:
            layers = told["num_decoder_layers"]
        sparse = told[f"num_sparse_{stack}_layers"]
        if field not in told:
            check_dimension("num_layers" if stack == "encoder" else "num_decoder_layers", layers)
            _check_count(f"num_sparse_{stack}_layers", sparse)
        # With none of them sparse, transformers still makes the second of several layers sparse.
        steps[stack] = told.get(field, layers // sparse if sparse else layers)
        _check_count(field, steps[stack])
    capacity = told["expert_capacity"]
    check_dimension("expert_capacity", capacity, 1 << 62)
    same = steps["decoder"] == steps["encoder"]
    return SparseConfig(
        num_experts=told["num_experts"], capacity_factor=None,
        capacity=None if capacity >= AMPLE_CAPACITY else capacity, jitter=told["router_jitter_noise"],
        step=steps["encoder"], offset="hf", decoder_step=None if same else steps["decoder"])


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= 1024:
        raise InputError(describe("A number of layers is wrong", where=name, got=repr(value)[:200],
                                  expected="a whole number from 0 to 1024"))


def sparse_to_hf(config: T5Config) -> dict[str, Any]:
    """The fields of a ``config.json`` that say which layers are sparse, and how.

    Raises:
        InputError: SwitchTransformers compute something else; all that differs is named.
    """
    sparse = config.sparse
    steps = {"encoder": (sparse.step, config.num_encoder_layers),
             "decoder": (sparse.step if sparse.decoder_step is None else sparse.decoder_step,
                         config.num_decoder_layers)}
    unlike = [f"{name}: {value!r}" for name, value, fits in (
        ("mlp_activations", config.mlp_activations, config.mlp_activations == ("relu",)),
        ("experts_per_token", sparse.experts_per_token, sparse.experts_per_token < 2),
        ("choice", sparse.choice, sparse.choice == TOKENS),
        ("normalize_gates", sparse.normalize_gates, not sparse.normalize_gates),
        ("gate", sparse.gate, sparse.gate == TOKEN),
        ("dense_sublayer", sparse.dense_sublayer, not sparse.dense_sublayer),
        ("eval_capacity_factor", sparse.eval_capacity_factor, sparse.eval_capacity_factor is None),
        ("group_rows", sparse.group_rows, sparse.capacity is None or sparse.group_rows == 1),
        ("order", sparse.order, sparse.capacity is None or sparse.order == POSITION),
        *((f"sparse layers of the {stack}", _layers(sparse, stack, layers),
           all(sparse.is_sparse(layer, stack == "decoder") == _is_sparse_there(layer, step)
               for layer in range(layers))) for stack, (step, layers) in steps.items()),
    ) if not fits]
    if unlike:
        raise InputError(describe(
            "Hugging Face's SwitchTransformers compute something else", got="; ".join(unlike),
            expected="relu; one expert a token, whose gate is its probability; no dense sub-layer; a fixed "
            "number of places in a sequence, or no dropping; layers 1, 1 + step, ... or all of them"))
    counts = {f"num_sparse_{stack}_layers": len(_layers(sparse, stack, layers))
              for stack, (_, layers) in steps.items()}
    return {"num_experts": sparse.num_experts, "expert_capacity": sparse.capacity or AMPLE_CAPACITY,
            "router_jitter_noise": sparse.jitter, **counts,
            **{_STEPS[stack]: step for stack, (step, _) in steps.items()},
            "router_bias": False, "router_dtype": "float32", "router_ignore_padding_tokens": False,
            "dense_act_fn": "relu"}


def _layers(sparse: SparseConfig, stack: str, layers: int) -> list[int]:
    return [layer for layer in range(layers) if sparse.is_sparse(layer, stack == "decoder")]


def _is_sparse_there(layer: int, step: int) -> bool:
    """Whether transformers makes a layer of a stack sparse."""
    return step > 0 and (step == 1 or layer % step == 1)
