"""Converts leaf names and configs between this program and Hugging Face: T5 1.0, T5 1.1, mT5, Switch.

Handles paths, names and dictionaries, no tensors. Hugging Face stores a Linear's weight as [out, in], this
program as [in, out]. Source of the names: transformers' T5ForConditionalGeneration and, for sparse networks,
its SwitchTransformersForConditionalGeneration.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.hf_versions import by_transformers_5
from elm_jax.models.layers.dense import RMS_EPSILON
from elm_jax.models.network import HfParameter
from elm_jax.models.t5 import switch_names
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network
from elm_jax.models.t5.switch_names import SWITCH
from elm_jax.runtime import trees
from elm_jax.runtime.config_checks import in_their_words

EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"
HF_EMBEDDING = "shared.weight"
HF_HEAD = "lm_head.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of copies of the embedding, which may be there beside or instead of `HF_EMBEDDING`."""
LEFTOVERS = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
"""Unused tensors of the first T5 checkpoints: cross-attention has no position bias."""
MODEL_TYPES = ("t5", "mt5", SWITCH)
MT5_VOCAB_SIZE = 250112

_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    SWITCH: {"tie_word_embeddings": True},
}
_OPTIONAL = {"num_decoder_layers": None, "dropout_rate": 0.1, "relative_attention_num_buckets": 32,
             "relative_attention_max_distance": 128}
_FIELDS = {
    "vocab_size": "vocab_size", "emb_dim": "d_model", "head_dim": "d_kv", "mlp_dim": "d_ff",
    "num_heads": "num_heads", "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers", "dropout_rate": "dropout_rate",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
}
_ACTIVATIONS = {
    "relu": ("relu",), "gelu_new": ("gelu",), "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"), "gated-relu": ("relu", "linear"),
}
_SWITCHES = ("tie_word_embeddings", "scale_decoder_outputs")
FIXED_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_FIXED = {"layer_norm_epsilon": RMS_EPSILON, **FIXED_IDS, "is_encoder_decoder": True}
"""Values that the network assumes; a config may leave them out."""

_ATTENTIONS = {"attention": (0, "SelfAttention"), "self_attention": (0, "SelfAttention"),
               "encoder_decoder_attention": (1, "EncDecAttention")}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_NORMS = {"pre_attention_layer_norm": 0, "pre_self_attention_layer_norm": 0,
          "pre_cross_attention_layer_norm": 1}
_ADAPTERS = {"attention_adapter": 0, "self_attention_adapter": 0}
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")


class HfName(NamedTuple):
    """A leaf's name in Hugging Face's files, and whether its two dimensions are swapped."""

    name: str
    transposed: bool = False


def hf_name(path: str, switch: bool = False) -> HfName:
    """Returns the Hugging Face name of a leaf.

    ``encoder/layers_3/mlp/wi_0/kernel`` -> ``encoder.block.3.layer.1.DenseReluDense.wi_0.weight``,
    transposed. Adapters, which Hugging Face's T5 has none of, get names in its manner:
    ``encoder/layers_3/mlp_adapter/down/kernel`` -> ``encoder.block.3.layer.1.adapter.down.weight``. A leaf of
    all experts, each of which has a tensor there, gets a name with ``*`` for the expert's number.

    Args:
        path: of the leaf.
        switch: whether the network is a SwitchTransformers there.

    Raises:
        KeyError: no leaf of a T5 has this path.
    """
    if path in _TOP:
        return _TOP[path]
    match = _LAYER.fullmatch(path)
    if match is None:
        raise KeyError(path)
    stack, number, rest = match.groups()
    sublayer, name, transposed = _in_layer(stack, rest.split("/"), switch)
    return HfName(f"{stack}.block.{number}.layer.{sublayer}.{name}", transposed)


def _in_layer(stack: str, parts: list[str], switch: bool) -> tuple[int, str, bool]:
    """(number of the sub-layer, name inside it, transposed) of a path's parts below ``layers_N``."""
    last = 1 if stack == "encoder" else 2
    if parts[0] in _ATTENTIONS:
        sublayer, module = _ATTENTIONS[parts[0]]
        return sublayer, f"{module}.{_PROJECTIONS[parts[1]]}.weight", True
    if parts[0] == "mlp":
        return last, switch_names.name_in_mlp(parts) if switch else f"DenseReluDense.{parts[1]}.weight", True
    if parts[0].endswith("_adapter"):
        kernel = parts[2] == "kernel"
        kind = "weight" if kernel else "bias"
        return _ADAPTERS.get(parts[0], last), f"adapter.{parts[1]}.{kind}", kernel
    return (last if parts[0] == "pre_mlp_layer_norm" else _NORMS[parts[0]]), "layer_norm.weight", False


_TOP = {
    EMBEDDING: HfName(HF_EMBEDDING),
    HEAD: HfName(HF_HEAD, True),
    **{f"{stack}/relpos_bias/rel_embedding": HfName(
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True)
       for stack in ("encoder", "decoder")},
    **{f"{stack}/{stack}_norm/scale": HfName(f"{stack}.final_layer_norm.weight")
       for stack in ("encoder", "decoder")},
}


def hf_parameters(config: T5Config) -> list[HfParameter]:
    """Every parameter of Hugging Face's T5 without adapters; all its stacks use the one embedding."""
    found, switch = [], config.sparse is not None
    for path in hf_order(trees.flatten(T5Network(config).abstract_params())):
        name, transposed = hf_name(path, switch)
        if "*" in name:
            found += [HfParameter(name.replace("*", str(expert)), (path,), transposed, expert=expert)
                      for expert in range(config.sparse.num_experts)]
        else:
            found.append(HfParameter(name, (path,), transposed, tied=path == EMBEDDING))
    return found


def embedding_copies(config: T5Config) -> list[HfParameter]:
    """Copies of the embedding that a file must hold beside it.

    transformers 5 parts the embeddings of a SwitchTransformers' stacks whose head is a matrix of its own.
    """
    if config.sparse is None or config.logits_via_embedding:
        return []
    return [HfParameter(name, (EMBEDDING,)) for name in EMBEDDING_COPIES]


def hf_order(paths: Iterable[str]) -> list[str]:
    """Leaf paths in the order of Hugging Face's module tree; all experts of a leaf stand together."""

    def key(path: str) -> tuple[Any, ...]:
        if path in (EMBEDDING, HEAD):
            return (0 if path == EMBEDDING else 3,)
        words = hf_name(path, switch="/router/" in path or "/expert/" in path).name.split(".")
        return (1 if words[0] == "encoder" else 2, *(
            (0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words))

    return sorted(paths, key=key)


def config_from_hf(values: Mapping[str, Any], where: Any = None) -> T5Config:
    """Builds the network config of a ``config.json``.

    Raises:
        InputError: another kind of model, fields that are missing (all are named), or settings that
            this network does not have (all are named).
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(describe("This is no T5", where=where, got=f"model_type {kind!r}",
                                  expected=" or ".join(map(repr, MODEL_TYPES))))
    missing = [name for name in _FIELDS.values() if name not in values and name not in _OPTIONAL]
    if missing:
        raise InputError(describe("The config lacks fields", where=where, got=f"no {', no '.join(missing)}",
                                  expected="the dimensions of a T5"))
    fixed = _FIXED | switch_names.FIXED if kind == SWITCH else _FIXED
    unlike = [f"{name} {values[name]!r}" for name, wanted in fixed.items()
              if values.get(name) is not None and values[name] != wanted]
    if unlike:
        raise InputError(describe(
            "The config asks for what this network does not do", where=where, got=", ".join(unlike),
            expected=", ".join(f"{name} {wanted!r}" for name, wanted in fixed.items())))
    wrong = [f"{name} {values[name]!r}"[:200] for name in _SWITCHES
             if not isinstance(values.get(name), bool | None)]
    if wrong:
        raise InputError(describe("Fields of the config are wrong", where=where, got=", ".join(wrong),
                                  expected="true or false"))
    more = switch_names.THEIR_WORDS if kind == SWITCH else {}
    try:
        return T5Config(**{field: _value(values, name) for field, name in _FIELDS.items()},
                        mlp_activations=_activations(values, where),
                        logits_via_embedding=scales_logits(values),
                        sparse=switch_names.sparse_from_hf(values) if kind == SWITCH else None)
    except InputError as error:  # it names the field, but does not know the file
        raise InputError(describe("The config is not a T5's", got=str(error),
                                  where=f"{where}{in_their_words(error, _FIELDS | more)}")) from error


def _value(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name, _OPTIONAL.get(name))
    return values["num_layers"] if name == "num_decoder_layers" and value is None else value


def _activations(values: Mapping[str, Any], where: Any) -> tuple[str, ...]:
    if values["model_type"] == SWITCH:
        word = values.get("dense_act_fn", switch_names.DEFAULTS["dense_act_fn"])
        if word != "relu":
            raise unknown_name("dense_act_fn", str(word), ("relu",), where)
        return _ACTIVATIONS[word]
    word = values.get("feed_forward_proj", _DEFAULTS[values["model_type"]]["feed_forward_proj"])
    if not isinstance(word, str) or word not in _ACTIVATIONS:
        raise unknown_name("feed_forward_proj", str(word), _ACTIVATIONS, where)
    return _ACTIVATIONS[word]


def scales_logits(values: Mapping[str, Any]) -> bool:
    """Whether logits are scaled by ``D ** -0.5``, as those of the tied head of T5 1.0 are.

    transformers 5 writes ``tie_word_embeddings: true`` whatever the model: it then says in
    ``scale_decoder_outputs`` what T5 does, and never scales for mT5.
    """
    tied = says_tied(values)
    if values["model_type"] == "t5":
        return bool(values.get("scale_decoder_outputs", tied))
    return tied and (values["model_type"] == SWITCH or not by_transformers_5(values))


def says_tied(values: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the embedding; before version 5, transformers makes it so."""
    tied = values.get("tie_word_embeddings")
    default = _DEFAULTS[values["model_type"]]["tie_word_embeddings"]
    return default if tied is None else tied is not False


def may_share_head(values: Mapping[str, Any]) -> bool:
    """Whether a file without a head may use the embedding as its head, unscaled, as transformers 5 writes.

    In an older file the head is then missing. SwitchTransformers scale whenever the two are one.
    """
    return values["model_type"] != SWITCH and by_transformers_5(values) and not scales_logits(values)


def config_to_hf(config: T5Config, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Builds the ``config.json`` of a network.

    Args:
        config: without adapters, which Hugging Face's T5 has none of.
        kept: a ``config.json`` that the model came with. Its fields stay as they are unless the network
            is another one now, so that a config survives the way there and back unchanged.

    Raises:
        InputError: an activation that Hugging Face's T5 does not have, or sparse layers that its
            SwitchTransformers do not have.
    """
    is_switch = config.sparse is not None
    sparse = switch_names.sparse_to_hf(config) if is_switch else {}
    same_kind = kept and (kept.get("model_type") == SWITCH) == is_switch
    values = dict(kept) if same_kind else _fresh(config)
    if is_switch and not (same_kind and switch_names.sparse_from_hf(values) == config.sparse):
        values |= sparse
    for field, name in _FIELDS.items():
        if (name not in values and name not in _OPTIONAL) or _value(values, name) != getattr(config, field):
            values[name] = getattr(config, field)
    if not is_switch and _activations(values, None) != config.mlp_activations:
        values["feed_forward_proj"] = _feed_forward_proj(config)
        for derived in ("dense_act_fn", "is_gated_act"):
            values.pop(derived, None)
    if scales_logits(values) != config.logits_via_embedding:
        values["tie_word_embeddings"] = config.logits_via_embedding
        values.pop("scale_decoder_outputs", None)
    return values


def _fresh(config: T5Config) -> dict[str, Any]:
    untied_mt5 = config.vocab_size == MT5_VOCAB_SIZE and not config.logits_via_embedding
    kind = SWITCH if config.sparse is not None else "mt5" if untied_mt5 else "t5"
    name = "SwitchTransformers" if kind == SWITCH else kind.upper()
    own = {} if kind == SWITCH else {"feed_forward_proj": _feed_forward_proj(config)}
    return {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": kind,
        **{name: getattr(config, field) for field, name in _FIELDS.items()}, **own,
        "initializer_factor": 1.0, "tie_word_embeddings": config.logits_via_embedding, "use_cache": True,
        **_FIXED,
    }


def _feed_forward_proj(config: T5Config) -> str:
    for word, activations in _ACTIVATIONS.items():
        if activations == config.mlp_activations:
            return word
    raise InputError(describe("Hugging Face's T5 has no such activation", got=config.mlp_activations,
                              expected=sorted(set(_ACTIVATIONS.values()))))
