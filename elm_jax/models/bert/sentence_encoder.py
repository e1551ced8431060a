"""A BERT-type sentence encoder in Flax: mean of the last hidden states, at unit length.

Reads the folder layout of sentence-transformers by shape and name; everything is float32.
Source: Devlin et al., https://arxiv.org/abs/1810.04805; Reimers and Gurevych,
https://arxiv.org/abs/1908.10084; https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from elm_jax.errors import InputError, describe
from elm_jax.runtime import records, storage, trees
from elm_jax.runtime.config_checks import LARGEST_DIMENSION, check_dimension
from elm_jax.types import Array, FlatParams, Params

CONFIG_FILE = "config.json"
LENGTH_FILE = "sentence_bert_config.json"
POOLING_FILE = "1_Pooling/config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
MODULES_FILE = "modules.json"
OPTIONAL = (TOKENIZER_CONFIG_FILE, PROMPTS_FILE)
"""Files that a folder may lack."""
MODULES = ("Pooling", "Normalize")
"""Modules behind the network that are computed here; without the last, too, embeddings have unit length."""
WEIGHTS_FILE = "model.safetensors"
UNUSED_TENSORS = ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight")
"""Tensors that the file may hold unused: BERT's pooler, and stored positions 0, 1, 2 ..."""
SUPPORTED = {
    CONFIG_FILE: {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    },
    POOLING_FILE: {
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "pooling_mode": "mean",
    },
    PROMPTS_FILE: {"truncate_dim": None},
}
"""Config values of the one kind of encoder that is computed here. A key may be left out."""
MASKED = -1e10
"""Attention logit of a padding key. Finite, so that a row without any token stays finite."""
HIGHEST = jax.lax.Precision.HIGHEST
"""Accelerators would multiply in bfloat16 or TF32; routing is float32."""


@dataclasses.dataclass(frozen=True)
class SentenceEncoderConfig:
    """Sizes of a sentence encoder, named as in the folder's configs (hashable, a static argument).

    Attributes:
        vocab_size: V.
        hidden_size: D, also the size of an embedding.
        num_hidden_layers: L.
        num_attention_heads: H, divides D.
        intermediate_size: F.
        max_position_embeddings: rows of the position table.
        type_vocab_size: rows of the segment table, of which the first is used.
        layer_norm_eps: of every layer norm.
        max_seq_length: longest text in tokens, its two special ones included.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    max_seq_length: int

    def __post_init__(self) -> None:
        """Raises InputError for sizes that no such network can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = 1 if field.type is float else math.inf
            if type(value) is not field.type or not 0 < value <= most:
                raise InputError(
                    describe(
                        "Sentence encoder config value is out of range",
                        where=field.name,
                        got=repr(value),
                        expected=f"a positive {field.type.__name__}" + (", at most 1" if most == 1 else ""),
                    )
                )
            if field.type is int:
                check_dimension(field.name, value, 1000 if field.name == "num_hidden_layers"
                                else LARGEST_DIMENSION)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                describe(
                    "The encoder's heads do not divide its hidden size",
                    where="hidden_size",
                    got=self.hidden_size,
                    expected=f"a multiple of {self.num_attention_heads}",
                )
            )
        if not 2 <= self.max_seq_length <= self.max_position_embeddings:
            raise InputError(
                describe(
                    "The encoder's longest text does not fit its position table",
                    where="max_seq_length",
                    got=self.max_seq_length,
                    expected=f"2 to {self.max_position_embeddings}",
                )
            )


class SentenceEncoder(nn.Module):
    """Sentence encoder: token ids i32[B, S], mask [B, S] (1 token, 0 padding) -> unit vectors f32[B, D].

    A row without any token is a row of zeros.
    """

    config: SentenceEncoderConfig

    def __call__(self, tokens: Array, mask: Array, pooled: Array | None = None) -> Array:
        """Encodes padded rows i32[B, S] to f32[B, D]; tokens where the mask is 0 have no effect.

        Only tokens where the mask `pooled` [B, S] is 1 count in the mean; None takes the mask itself.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = self.hidden_states(tokens, mask, positions)
        return unit_means(hidden, mask if pooled is None else pooled, 1)[:, 0]

    @nn.compact
    def hidden_states(self, tokens: Array, numbers: Array, positions: Array) -> Array:
        """The last layer's states f32[B, S, D] of rows that hold several texts, none of which sees another.

        Args:
            tokens: i32[B, S].
            numbers: i32[B, S], each token's text in its row, 1, 2 ...; 0 for padding.
            positions: i32[B, S], each token's place in its text.
        """
        config = self.config
        embed = functools.partial(nn.Embed, features=config.hidden_size)
        x = embed(config.vocab_size, name="word_embeddings")(tokens)
        x = x + embed(config.max_position_embeddings, name="position_embeddings")(positions)
        x = x + embed(config.type_vocab_size, name="token_type_embeddings")(jnp.zeros_like(tokens))
        # One row a token: a processor multiplies matrices faster so, and compiles half as long.
        x = _norm(config, "embeddings_norm")(x.reshape(-1, config.hidden_size))
        visible = numbers[:, None, :, None] == numbers[:, None, None, :]
        for number in range(config.num_hidden_layers):
            x = BertLayer(config, name=f"layers_{number}")(x, visible)
        return x.reshape(*tokens.shape, config.hidden_size)


def unit_means(hidden: Array, numbers: Array, texts: int) -> Array:
    """Means of texts' states at unit length: f32[B, S, D] and each token's text [B, S] -> f32[B, texts, D].

    Texts count from 1; one without any token is a row of zeros.
    """
    own = (numbers[:, None] == jnp.arange(1, texts + 1)[None, :, None]).astype(jnp.float32)
    mean = jnp.einsum("bts,bsd->btd", own, hidden, precision=HIGHEST)
    mean = mean / jnp.maximum(own.sum(axis=-1, keepdims=True), 1e-9)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by its residual sum and layer norm."""

    config: SentenceEncoderConfig

    @nn.compact
    def __call__(self, x: Array, visible: Array) -> Array:
        """Applies the layer: f32[B S, D] and bool[B, 1, S, S], who sees whom -> f32[B S, D]."""
        config = self.config
        rows, _, length, _ = visible.shape
        heads = (rows, length, config.num_attention_heads, -1)

        def split_heads(name: str) -> Array:
            return _dense(config.hidden_size, name)(x).reshape(heads).transpose(0, 2, 1, 3)

        query, key, value = (split_heads(name) for name in ("query", "key", "value"))
        query = query * query.shape[-1] ** -0.5
        logits = jnp.einsum("bhqk,bhsk->bhqs", query, key, precision=HIGHEST)
        logits = jnp.where(visible, logits, MASKED)
        # Softmax, divided last: there are fewer attended values than weights.
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        attended = jnp.einsum("bhqs,bhsk->bhqk", weights, value, precision=HIGHEST)
        attended = attended / weights.sum(axis=-1, keepdims=True)
        attended = attended.transpose(0, 2, 1, 3).reshape(x.shape)
        x = _norm(config, "attention_norm")(x + _dense(config.hidden_size, "attention_output")(attended))
        hidden = _dense(config.intermediate_size, "intermediate")(x)
        hidden = _dense(config.hidden_size, "output")(jax.nn.gelu(hidden, approximate=False))
        return _norm(config, "output_norm")(x + hidden)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, name=name, precision=HIGHEST)


def _norm(config: SentenceEncoderConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name=name)


@functools.partial(jax.jit, static_argnums=0)
def encode(config: SentenceEncoderConfig, params: Params, tokens: Array, mask: Array,
           pooled: Array | None = None) -> Array:
    """Runs a `SentenceEncoder` under jit, one program a shape: i32[B, S], masks [B, S] -> f32[B, D]."""
    return SentenceEncoder(config).apply({"params": params}, tokens, mask, pooled)


@functools.partial(jax.jit, static_argnums=0)
def encode_packed(config: SentenceEncoderConfig, params: Params, tokens: Array, numbers: Array,
                  positions: Array, unpooled: int) -> Array:
    """Encodes rows that hold several texts each: f32[B, S, D], of which [b, n - 1] is row b's text n.

    Args:
        config: sizes of the encoder.
        params: its parameters.
        tokens: i32[B, S].
        numbers: i32[B, S], each token's text in its row, 1, 2 ...; 0 for padding.
        positions: i32[B, S], each token's place in its text.
        unpooled: number of tokens at a text's front that do not count in its mean.
    """
    hidden = SentenceEncoder(config).apply({"params": params}, tokens, numbers, positions,
                                           method=SentenceEncoder.hidden_states)
    return unit_means(hidden, jnp.where(positions < unpooled, 0, numbers), tokens.shape[1])


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What sentence-transformers puts in front of every text by default.

    Attributes:
        text: the empty one for none.
        is_pooled: whether its tokens count in the mean of a text.
    """

    text: str = ""
    is_pooled: bool = True


def read_prompt(folder: storage.PathLike) -> Prompt:
    """Reads the default prompt of a sentence-transformers folder.

    Raises:
        InputError: a file is no JSON object, or names a prompt that it does not hold.
    """
    folder = storage.as_path(folder)
    path = folder / PROMPTS_FILE
    values = _read_json(path) if path.exists() else {}
    name, prompts = values.get("default_prompt_name"), values.get("prompts") or {}
    if name is None:
        return Prompt()
    text = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(text, str):
        raise InputError(
            describe(
                "The encoder's default prompt is none of its prompts",
                where=f"{path}: default_prompt_name",
                got=repr(name)[:100],
                expected=f"one of prompts: {', '.join(prompts) or 'none'}"[:200]
                if isinstance(prompts, dict)
                else "a name, and prompts, an object with the text of each name",
            )
        )
    is_pooled = _read_json(folder / POOLING_FILE).get("include_prompt", True)
    if not isinstance(is_pooled, bool):
        raise InputError(
            describe(
                "The encoder's pooling config is wrong",
                where=f"{folder / POOLING_FILE}: include_prompt",
                got=repr(is_pooled)[:100],
                expected="true or false",
            )
        )
    return Prompt(text, is_pooled)


def load_sentence_encoder(folder: storage.PathLike) -> tuple[SentenceEncoderConfig, Params]:
    """Reads the config and the weights of a sentence-transformers folder.

    Raises:
        InputError: a file is missing or unreadable, the encoder is of another kind, or tensors are
            missing, unexpected or misshaped (all are listed).
    """
    folder = storage.as_path(folder)
    files = {name: _read_json(folder / name) for name in (CONFIG_FILE, LENGTH_FILE, POOLING_FILE)}
    files |= {name: _read_json(folder / name) if (folder / name).exists() else {} for name in OPTIONAL}
    _check_modules(folder / MODULES_FILE)
    config = _config(files, folder)
    path = folder / WEIGHTS_FILE
    content = storage.read_bytes(path)
    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            describe("The encoder's weights cannot be read", where=path, got=str(error))
        ) from error
    return config, params_from_tensors(tensors, config, path)


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], config: SentenceEncoderConfig, where: Any
) -> Params:
    """Converts BERT's tensors, by their names in the file, to parameters of `SentenceEncoder`.

    Args:
        tensors: float32 arrays; linear weights are [outputs, inputs] in the file.
        config: sizes of the encoder.
        where: the file, for errors.

    Raises:
        InputError: lists every tensor that is missing, unexpected, misshaped or not float32.
    """
    names = tensor_names(config)
    shapes = _shapes(config)
    known = {*names.values(), *UNUSED_TENSORS}
    faults = [f"unexpected {name}" for name in sorted(tensors.keys() - known)]
    flat: FlatParams = {}
    for leaf, name in names.items():
        if name not in tensors:
            faults.append(f"missing {name}")
            continue
        turned = leaf.endswith("/kernel")
        flat[leaf] = tensors[name].T if turned else tensors[name]
        if flat[leaf].shape != shapes[leaf] or flat[leaf].dtype != np.float32:
            expected = list(shapes[leaf][::-1] if turned else shapes[leaf])
            got = f"{tensors[name].dtype}{list(tensors[name].shape)}"
            faults.append(f"misshaped {name}: {got}, expected float32{expected}")
    if faults:
        raise InputError(
            describe(
                "The encoder's weights do not fit its config",
                where=where,
                got="\n    ".join([f"{len(faults)} faults", *faults]),
            )
        )
    return trees.unflatten(flat)


def _shapes(config: SentenceEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each leaf by path, as `SentenceEncoder` initialises it; all layers are like the first."""
    one = SentenceEncoder(dataclasses.replace(config, num_hidden_layers=1))
    row = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shaped = jax.eval_shape(lambda tokens: one.init(jax.random.key(0), tokens, tokens), row)
    flat = trees.flatten(shaped["params"])
    return {path: flat[re.sub(r"^layers_\d+", "layers_0", path)].shape for path in tensor_names(config)}


def tensor_names(config: SentenceEncoderConfig) -> dict[str, str]:
    """Name of each leaf's tensor in the file, by leaf path."""
    names = {
        f"{name}/embedding": f"embeddings.{name}.weight"
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    }
    norms = {"embeddings_norm": "embeddings.LayerNorm"}
    layers = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    }
    for number in range(config.num_hidden_layers):
        ours, theirs = f"layers_{number}", f"encoder.layer.{number}"
        for name, tensor in layers.items():
            names[f"{ours}/{name}/kernel"] = f"{theirs}.{tensor}.weight"
            names[f"{ours}/{name}/bias"] = f"{theirs}.{tensor}.bias"
        norms[f"{ours}/attention_norm"] = f"{theirs}.attention.output.LayerNorm"
        norms[f"{ours}/output_norm"] = f"{theirs}.output.LayerNorm"
    for ours, theirs in norms.items():
        names[f"{ours}/scale"], names[f"{ours}/bias"] = f"{theirs}.weight", f"{theirs}.bias"
    return names


def _config(files: Mapping[str, dict[str, Any]], folder: Any) -> SentenceEncoderConfig:
    """Reads the config from the folder's JSON files and checks that the encoder is of this kind."""
    for name, wanted in SUPPORTED.items():
        for key, value in wanted.items():
            if files[name].get(key, value) != value:
                raise InputError(
                    describe(
                        "The sentence encoder is of a kind that is not supported",
                        where=f"{folder}/{name}: {key}",
                        got=files[name][key],
                        expected=value,
                        cure="use all-MiniLM-L6-v2",
                    )
                )
    values = {**files[CONFIG_FILE], **files[LENGTH_FILE]}
    if values.get("max_seq_length") is None:  # where sentence-transformers 6 keeps it
        longest = files[TOKENIZER_CONFIG_FILE].get("model_max_length")
        places = values.get("max_position_embeddings")
        values |= {"max_seq_length": min(longest, places)} if type(longest) is type(places) is int else {}
    fields = [field.name for field in dataclasses.fields(SentenceEncoderConfig)]
    missing = [name for name in fields if name not in values]
    if missing:
        raise InputError(
            describe(
                "The encoder's config lacks values",
                where=f"{folder}: {CONFIG_FILE}, {LENGTH_FILE}",
                got=f"no {', '.join(missing)}",
            )
        )
    return records.build(
        SentenceEncoderConfig, {name: values[name] for name in fields},
        f"{folder}: {CONFIG_FILE}, or for max_seq_length {LENGTH_FILE} or {TOKENIZER_CONFIG_FILE}")


def _check_modules(path: Any) -> None:
    """Raises InputError if a folder's list of modules names others than are computed here."""
    if not path.exists():
        return
    modules = storage.parse_json(storage.read_text(path), "encoder's list of modules", path)
    names = [str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else str(module)
             for module in (modules if isinstance(modules, list) else [modules])]
    if tuple(names[1:]) not in (MODULES, MODULES[:1]):
        raise InputError(
            describe(
                "The sentence encoder has modules that are not supported",
                where=f"{path}: type",
                got=", ".join(names)[:200],
                expected=f"the network, {', '.join(MODULES)}",
                cure="use all-MiniLM-L6-v2",
            )
        )


def _read_json(path: storage.PathLike) -> dict[str, Any]:
    """Reads a JSON object of another program, which has no schema version."""
    return storage.read_json(path, kind="encoder's config", schema_version=None)
