"""Converts leaf names and configs of decoders from GGUF files: architectures llama, qwen2, qwen3, gpt2.

Handles paths, names, metadata and orders of rows, no tensors. A GGUF file holds a matrix as [out, in], this
program as [in, out]. Two layouts are llama.cpp's own:

- Of architecture ``llama``, and of no other, each head's rows of queries and keys lie pair by pair: the
  rotary pair (j, j + K/2) in rows 2j and 2j + 1.
- GPT-2's queries, keys and values are one matrix.

Source: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and src/llama-model.cpp
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.decoder.config import DecoderConfig, RopeScaling

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
ARCHITECTURE = "general.architecture"
EMBEDDING, POSITIONS, HEAD = "token_embd.weight", "position_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors f32[K/2] of the rotary frequencies: how llama.cpp keeps Llama 3's scaling."""
_SAME = 1e-4
"""Relative difference at which factors count as those of a scaling; they were computed in float32."""
_NO_SCALING = ("none", "")

_DIMENSIONS = {"num_layers": "block_count", "max_length": "context_length", "emb_dim": "embedding_length",
               "mlp_dim": "feed_forward_length", "num_heads": "attention.head_count"}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")
_LLAMA = ("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
          "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
          "rope.scale_linear")
_GPT2 = ("attention.layer_norm_epsilon",)
_WITHOUT_EFFECT = {"expert_count": "0", "expert_used_count": "0", "attention.causal": "True"}
"""Keys that are read if their value is written so: it changes nothing."""

_PARTS = {"query": 0, "key": 1, "value": 2}
NUM_PARTS = len(_PARTS)
"""Leaves that share one tensor in GPT-2's layout."""
_LAYER = re.compile(r"decoder/layers_(\d+)/(.+)/(kernel|bias|scale)")
_TOP = {"token_embedder/embedding": (EMBEDDING, False), "position_embedder/embedding": (POSITIONS, False),
        "decoder/final_norm/scale": ("output_norm.weight", False),
        "decoder/final_norm/bias": ("output_norm.bias", False), "head/kernel": (HEAD, True)}
_MODULES = {
    "pre_attention_norm": "attn_norm", "pre_mlp_norm": "ffn_norm", "attention/query": "attn_q",
    "attention/key": "attn_k", "attention/value": "attn_v", "attention/out": "attn_output",
    "attention/query_norm": "attn_q_norm", "attention/key_norm": "attn_k_norm",
    "mlp/wi_0": "ffn_gate", "mlp/wi_1": "ffn_up", "mlp/wi": "ffn_up", "mlp/wo": "ffn_down",
}


class GgufName(NamedTuple):
    """A leaf's place in a GGUF file.

    Attributes:
        name: of the tensor.
        transposed: whether its two dimensions are swapped against this program's.
        part: number of the leaf among those that share the tensor's rows; None if they are its own.
        pairs: whether the rows of each head lie pair by pair.
    """

    name: str
    transposed: bool = False
    part: int | None = None
    pairs: bool = False


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Special ids of a file's tokenizer, for the config."""

    pad_id: int
    eos_id: int
    extra_eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None


def gguf_name(path: str, architecture: str) -> GgufName:
    """Returns the place of a leaf in a file of an architecture.

    ``decoder/layers_3/attention/query/kernel`` of llama -> ``blk.3.attn_q.weight``, transposed, in pairs.

    Raises:
        KeyError: no leaf of a decoder has this path.
    """
    if path in _TOP:
        return GgufName(*_TOP[path])
    match = _LAYER.fullmatch(path)
    if match is None:
        raise KeyError(path)
    layer, module, leaf = match.groups()
    kind, kernel = ("bias" if leaf == "bias" else "weight"), leaf == "kernel"
    own = module.removeprefix("attention/")
    if architecture == "gpt2" and own in _PARTS:
        return GgufName(f"blk.{layer}.attn_qkv.{kind}", kernel, _PARTS[own])
    pairs = architecture == "llama" and own in ("query", "key")
    return GgufName(f"blk.{layer}.{_MODULES[module]}.{kind}", kernel, None, pairs)


def row_order(name: GgufName, config: DecoderConfig, size: int) -> np.ndarray | None:
    """Says which rows of its tensor a leaf takes, and in which order.

    Args:
        name: of the leaf.
        config: of the network.
        size: the leaf's number of outputs.

    Returns:
        i64[size], the tensor's row for each output; None for the tensor as it lies.
    """
    if name.part is not None:
        return np.arange(size) + name.part * size
    if not name.pairs:
        return None
    pairs = np.arange(size).reshape(-1, config.head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]],
                     special: SpecialTokens, factors: np.ndarray | None, where: Any) -> DecoderConfig:
    """Builds the network config of a file.

    Args:
        metadata: values by key.
        shapes: of the tensors by name, rows first.
        special: ids of the tokenizer.
        factors: contents of `ROPE_FACTORS`; None if there are none.
        where: the file, for errors.

    Raises:
        InputError: another architecture; values that are missing, damaged, or that this network does not have
            (all are named); factors that are those of no known scaling.
    """
    architecture = metadata.get(ARCHITECTURE)
    if architecture not in ARCHITECTURES:
        raise unknown_name("architecture", str(architecture), ARCHITECTURES, where)
    values = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()
              if key.startswith(f"{architecture}.")}
    _check_keys(values, architecture, where)
    sizes = {field: _size(values, key, architecture, where) for field, key in _DIMENSIONS.items()}
    if EMBEDDING not in shapes:
        raise InputError(describe("The GGUF file lacks a tensor", where=where, got=f"no {EMBEDDING}"))
    heads = sizes["num_heads"]
    epsilon = _GPT2[0] if architecture == "gpt2" else _LLAMA[0]
    fields = {
        **sizes, "vocab_size": int(shapes[EMBEDDING][0]), "num_kv_heads": heads,
        "head_dim": sizes["emb_dim"] // max(1, heads), "tied_head": HEAD not in shapes,
        "norm_epsilon": _number(values, epsilon, architecture, where),
        **dataclasses.asdict(special)}
    for field, key in (("num_kv_heads", "attention.head_count_kv"), ("head_dim", "attention.key_length")):
        if key in values:
            fields[field] = _size(values, key, architecture, where)
    _check_equal(values, fields, where)
    if architecture == "gpt2":
        fields |= {"norm": "layer", "position": "learned", "dense_bias": True,
                   "mlp_activations": ("gelu_tanh",)}
    else:
        base = _number(values, "rope.freq_base", architecture, where, 10000.0)
        fields |= {"rope_base": base, "qk_norm": architecture == "qwen3",
                   "qkv_bias": "blk.0.attn_q.bias" in shapes,
                   "rope_scaling": _scaling(values, factors, fields["head_dim"], base, where)}
    try:
        return DecoderConfig(**fields)
    except InputError as error:  # it names the field, but does not know the file
        raise InputError(describe("The file's metadata are wrong", where=where, got=str(error))) from error


def with_tied_head(config: DecoderConfig) -> DecoderConfig:
    """The config of the same network when its head has turned out to be the embedding."""
    return dataclasses.replace(config, tied_head=True)


def _check_keys(values: Mapping[str, Any], architecture: str, where: Any) -> None:
    """Raises InputError for a key of the architecture that nothing here reads."""
    known = {*_DIMENSIONS.values(), *_OPTIONAL, *(_GPT2 if architecture == "gpt2" else _LLAMA)}
    unknown = [f"{architecture}.{key} {value!r}"[:100] for key, value in values.items()
               if key not in known and _WITHOUT_EFFECT.get(key) != repr(value)]
    if unknown:
        raise InputError(describe("The file asks for what this network does not do", where=where,
                                  got=", ".join(unknown), expected=", ".join(sorted(known))))


def _size(values: Mapping[str, Any], key: str, architecture: str, where: Any) -> int:
    """A dimension; an array, which has a value for each layer, must repeat one value."""
    found = values.get(key)
    if isinstance(found, np.ndarray) and len(set(found.tolist())) == 1:
        found = int(found[0])
    if type(found) is not int or found < 1:
        raise InputError(describe("A dimension in the file's metadata is wrong", where=where,
                                  got=f"{architecture}.{key} {found!r}"[:200], expected="a number from 1"))
    return found


def _number(values: Mapping[str, Any], key: str, architecture: str, where: Any,
            default: float | None = None) -> float:
    """A number, with the digits that its float32 has (1e-5, not 9.99999974e-06)."""
    found = values.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InputError(describe("A number in the file's metadata is wrong", where=where,
                                  got=f"{architecture}.{key} {found!r}"[:200], expected="a number"))
    with np.errstate(over="ignore"):  # infinity, which the config refuses
        return float(str(np.float32(found)))


def _check_equal(values: Mapping[str, Any], fields: Mapping[str, Any], where: Any) -> None:
    """Raises InputError for sizes that this network has no second value for."""
    pairs = {"attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
             "vocab_size": "vocab_size"}
    wrong = [f"{key} {values[key]!r} against {fields[field]}" for key, field in pairs.items()
             if key in values and values[key] != fields[field]]
    if wrong:
        raise InputError(describe("Sizes in the file's metadata differ", where=where, got=", ".join(wrong),
                                  expected="one size of heads, all of it rotary; as many tokens as rows"))


def _scaling(values: Mapping[str, Any], factors: np.ndarray | None, head_dim: int, base: float, where: Any
             ) -> RopeScaling | None:
    """The scaling of rotary frequencies that metadata or factors ask for."""
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    trained = values.get("rope.scaling.original_context_length")
    found = None if factors is None else scaling_of(factors, head_dim, base, trained, where)
    linear = None
    if kind == "linear":
        linear = RopeScaling("linear", float(factor)) if factor != 1.0 else None
    elif kind not in _NO_SCALING:
        raise InputError(describe("The file asks for a scaling of rotary positions that is not read",
                                  where=where, got=f"rope.scaling.type {kind!r}",
                                  expected="none, linear, or Llama 3's factors in rope_freqs.weight"))
    if found is not None and linear is not None:
        raise InputError(describe("The file asks for two scalings of rotary positions", where=where,
                                  got=f"linear by {factor}, and {ROPE_FACTORS}", expected="one of them"))
    return linear or found


def scaling_of(factors: np.ndarray, head_dim: int, base: float, trained: int | None, where: Any
               ) -> RopeScaling | None:
    """Finds Llama 3's scaling from its factors.

    Of a wavelength w, ``1 / factor`` is a straight line in 1/w between two limits, 1 below and
    ``1 / largest`` above. The factors tell only the limits' wavelengths, so low_freq_factor is taken as 1.

    Args:
        factors: f[K/2], divisors of the frequencies.
        head_dim: K.
        base: of the frequencies.
        trained: context of the first training, where the file tells it.
        where: the file, for the error.

    Returns:
        The scaling, whose own factors equal these; None if all are 1.

    Raises:
        InputError: the factors are those of no such scaling.
    """
    factors = np.asarray(factors, np.float64).reshape(-1)
    whole = len(factors) == head_dim // 2 and np.all(np.isfinite(factors)) and np.all(factors > 0)
    if whole and np.allclose(factors, 1.0, rtol=_SAME, atol=0):
        return None
    if whole and factors.max() > 1:
        tried = [RopeScaling("llama3", _rounded(factors.max()), 1.0, 4.0, int(trained or 8192))]
        for scaling in [*tried, *_fitted(factors, head_dim, base)]:
            if np.allclose(llama3_factors(scaling, head_dim, base), factors, rtol=_SAME, atol=0):
                return scaling
    raise InputError(describe(
        "The factors of rotary frequencies are those of no known scaling", where=f"{where}, {ROPE_FACTORS}",
        got=f"{len(factors)} factors from {factors.min():.4g} to {factors.max():.4g}",
        expected=f"{head_dim // 2} factors as Llama 3 scales"))


def llama3_factors(scaling: RopeScaling, head_dim: int, base: float) -> np.ndarray:
    """Computes the divisors f64[K/2] of the rotary frequencies of Llama 3's scaling."""
    lengths = scaling.original_max_length * _frequencies(head_dim, base) / (2 * np.pi)  # limit / wavelength
    share = (lengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0.0, 1.0)
    return 1.0 / ((1.0 - share) / scaling.factor + share)


def _frequencies(head_dim: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def _fitted(factors: np.ndarray, head_dim: int, base: float) -> Collection[RopeScaling]:
    """Scalings with a low_freq_factor of 1 whose line goes through the factors between the limits.

    First with Llama 3's high_freq_factor of 4, then, where two factors or more tell it, with their own.
    """
    largest = factors.max()
    between = (factors > 1 + _SAME) & (factors < largest * (1 - _SAME))
    if not between.any():
        return []
    share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    inverse = _frequencies(head_dim, base)[between] / (2 * np.pi)  # of the wavelengths
    found = [(4.0, float(np.mean((3.0 * share + 1.0) / inverse)))]
    if between.sum() > 1:
        slope, start = np.polyfit(inverse, share, 1)
        if start < 0 < slope:
            found.append((round(1.0 - 1.0 / start, 3), slope / -start))
    return [RopeScaling("llama3", _rounded(largest), 1.0, high, round(length)) for high, length in found
            if high > 1 and round(length) >= 1]


def _rounded(value: float) -> float:
    """A factor with the digits that float32 computes."""
    return float(f"{value:.5g}")
