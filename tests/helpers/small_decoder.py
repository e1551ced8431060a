"""A second family of networks: a small decoder, as unlike T5 as possible, shows that the door is wide enough.

Batches are joined, id 0 is a real token, EOS is 2 and padding 3; norms are LayerNorms with biases; positions
are learned; the head is its own. `with_family` puts its row into `FAMILIES`, as a file of the package would.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes
from tokenizers import pre_tokenizers

from elm_jax.errors import InputError, describe
from elm_jax.models import families
from elm_jax.models.adapters.config import adapter_of, attach
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.blocks.attention import Attention
from elm_jax.models.blocks.feed_forward import Mlp
from elm_jax.models.blocks.layer_stack import Layout
from elm_jax.models.layers.dense import LOGITS_PRECISION, MASKED, Dense, Dropout, Embed
from elm_jax.models.losses import PLAIN, token_cross_entropy
from elm_jax.models.network import ADAPTER, BODY, JOINED, NORM, Start, StepAccount
from elm_jax.runtime import sharding, trees
from elm_jax.types import Padded

MOST_POSITIONS = 256


@dataclasses.dataclass(frozen=True)
class SmallDecoderConfig:
    """Dimensions of a small decoder."""

    vocab_size: int
    emb_dim: int = 16
    num_heads: int = 2
    head_dim: int = 8
    mlp_dim: int = 32
    num_layers: int = 2
    dropout_rate: float = 0.0
    dtype: str = "float32"
    adapter: Any = None

    family: ClassVar[str] = "small_decoder"
    pad_id: ClassVar[int] = 3
    eos_id: ClassVar[int] = 2
    start_id: ClassVar[None] = None
    sparse: ClassVar[None] = None

    @property
    def activation_dtype(self):
        return jnp.dtype(self.dtype)

    def with_adapter(self, adapter):
        return dataclasses.replace(self, adapter=adapter)

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "family": self.family,
                "adapter": None if self.adapter is None else self.adapter.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Any = None) -> "SmallDecoderConfig":
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(describe("The network's config is wrong", where=where, got=sorted(unknown)))
        return cls(**{**values, "adapter": adapter_of(values)})


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + 1e-5) * scale + bias`` in float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        size = (x.shape[-1],)
        scale = param_with_axes("scale", nn.initializers.ones, size, jnp.float32, axes=("embed",))
        bias = param_with_axes("bias", nn.initializers.zeros, size, jnp.float32, axes=("embed",))
        x = x.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
        last = tuple(range(x.ndim - 1))
        return (x * jnp.expand_dims(scale, last) + jnp.expand_dims(bias, last)).astype(self.dtype)


class Layer(nn.Module):
    config: SmallDecoderConfig

    def setup(self):
        config = self.config
        dtype = config.activation_dtype
        self.pre_attention_norm, self.pre_mlp_norm = LayerNorm(dtype), LayerNorm(dtype)
        self.attention = Attention(config.emb_dim, config.num_heads, config.head_dim, config.dropout_rate,
                                   dtype, config.adapter)
        self.mlp = Mlp(config.emb_dim, config.mlp_dim, ("gelu",), config.dropout_rate, dtype)
        self.dropout = Dropout(config.dropout_rate)
        self.attention_adapter = attach(config.adapter, "attention", dtype)
        self.mlp_adapter = attach(config.adapter, "mlp", dtype)

    def __call__(self, x, bias, deterministic=True, put=lambda kept: kept):
        """f[B, L, D] -> f[B, L, D] and keys and values; `put` says where these go in a cache."""
        normed = self.pre_attention_norm(x)
        keys_values = put(self.attention.keys_values(normed))
        y = self.attention(normed, keys_values, (bias,), deterministic)
        x = x + self.dropout(self.attention_adapter(y, normed), deterministic)
        normed = self.pre_mlp_norm(x)
        y = self.mlp(normed, deterministic)
        return x + self.dropout(self.mlp_adapter(y, normed), deterministic), keys_values


class Stack(nn.Module):
    config: SmallDecoderConfig

    def setup(self):
        self.layers = [Layer(self.config) for _ in range(self.config.num_layers)]
        self.final_norm = LayerNorm(self.config.activation_dtype)

    def __call__(self, x, bias, deterministic=True, puts=None):
        kept = []
        for number, layer in enumerate(self.layers):
            put = {} if puts is None else {"put": puts[number]}
            x, keys_values = layer(x, bias, deterministic, **put)
            kept.append(keys_values)
        return self.final_norm(x), kept


class SmallDecoder(nn.Module):
    config: SmallDecoderConfig

    def setup(self):
        config = self.config
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, config.activation_dtype)
        self.position_embedder = Embed(MOST_POSITIONS, config.emb_dim, config.activation_dtype)
        self.decoder = Stack(config)
        self.head = Dense(config.vocab_size, ("embed", "vocab"), jnp.dtype("float32"),
                          precision=LOGITS_PRECISION)

    def __call__(self, tokens, positions, allowed, deterministic=True, puts=None):
        """i32[B, L], i32[B, L], bool[B, 1, L, S] -> f32[B, L, V], and each layer's keys and values."""
        bias = jnp.where(allowed, 0.0, MASKED).astype(jnp.float32)
        x = self.token_embedder(tokens) + self.position_embedder(positions)
        y, kept = self.decoder(x, bias, deterministic, puts)
        return self.head(y), kept


def causal(length):
    index = jnp.arange(length)
    return (index[:, None] >= index[None, :])[None, None]


@dataclasses.dataclass(frozen=True)
class SmallDecoderNetwork:
    """See `models.network.Network`."""

    config: SmallDecoderConfig
    layout: Layout = dataclasses.field(default_factory=Layout)
    batches: ClassVar[str] = JOINED

    def _apply(self, params, *arguments, rng=None, **more):
        rngs = None if rng is None else {"dropout": rng}
        return SmallDecoder(self.config).apply({"params": params}, *arguments, rngs=rngs, **more)

    def _variables(self, rng):
        token = jnp.zeros((1, 1), jnp.int32)
        return SmallDecoder(self.config).init({"params": rng}, token, token, jnp.ones((1, 1, 1, 1), bool))

    def init(self, rng):
        return self._variables(rng)["params"]

    def abstract_params(self):
        return jax.eval_shape(self._variables, jax.random.key(0))["params"]

    def logical_axes(self):
        return trees.unflatten(dict(_axes(self.config)))

    def axes_of(self, path):
        return _axes(self.config).get(path)

    def role_of(self, path):
        if is_adapter_leaf(path):
            return ADAPTER
        return NORM if "_norm/" in path else BODY

    def loss(self, params, batch, rng=None, settings=PLAIN):
        segments = batch["segment_ids"]
        allowed = causal(segments.shape[1]) & (segments[:, None, :, None] == segments[:, None, None, :])
        logits, _ = self._apply(params, batch["tokens"], batch["positions"], allowed, rng is None, rng=rng)
        return token_cross_entropy(logits, batch["target_tokens"], batch["loss_weights"], settings)

    def target_log_probs(self, params, inputs, targets):
        """A full pass for each choice: prompt and choice joined in one row."""
        batch, choices, length = targets.tokens.shape
        prompts = Padded(*(jnp.repeat(jnp.asarray(each), choices, axis=0) for each in inputs[:2]))
        ends = jnp.asarray(targets.lengths).reshape(-1)
        own = jnp.asarray(targets.tokens).reshape(-1, length)
        width = prompts.tokens.shape[1] + length
        place = jnp.broadcast_to(jnp.arange(width)[None], (len(own), width))
        start = prompts.lengths[:, None]
        first = jnp.pad(prompts.tokens, ((0, 0), (0, length)))
        second = jnp.take_along_axis(own, jnp.clip(place - start, 0, length - 1), axis=1)
        tokens = jnp.where(place < start, first, second)
        logits, _ = self._apply(params, tokens, place, causal(width))
        # The position before a token predicts it; an empty prompt would have none for the first.
        before = jnp.clip(start - 1 + jnp.arange(length)[None], 0, width - 1)
        log_probs = jax.nn.log_softmax(jnp.take_along_axis(logits, before[..., None], axis=1))
        found = jnp.take_along_axis(log_probs, own[..., None], axis=-1)[..., 0]
        found = jnp.where(jnp.arange(length)[None] < ends[:, None], found, 0.0)
        return found.reshape(batch, choices, length)

    def start(self, params, inputs, max_length):
        """Keys and values of the prompt; its last token is what the first step takes."""
        tokens, lengths = jnp.asarray(inputs.tokens), jnp.asarray(inputs.lengths)
        width = tokens.shape[1]
        place = jnp.broadcast_to(jnp.arange(width)[None], tokens.shape)
        _, kept = self._apply(params, tokens, place, causal(width))
        room = ((0, 0), (0, max_length), (0, 0), (0, 0))
        layers = {f"layers_{number}": {"key": jnp.pad(keys, room), "value": jnp.pad(values, room)}
                  for number, (keys, values) in enumerate(kept)}
        last = jnp.clip(lengths - 1, 0, width - 1)
        token = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
        return Start({"place": last, "layers": layers}, token)

    def step(self, params, cache, token):
        place = cache["place"]
        layers = [cache["layers"][f"layers_{number}"] for number in range(self.config.num_layers)]
        width = layers[0]["key"].shape[1]
        here = (jnp.arange(width)[None] == place[:, None])[..., None, None]

        def put(kept, new):
            return tuple(jnp.where(here, one, kept[name])
                         for name, one in zip(("key", "value"), new, strict=True))

        allowed = (jnp.arange(width)[None] <= place[:, None])[:, None, None, :]
        logits, kept = self._apply(params, token[:, None], place[:, None], allowed,
                                   puts=tuple(functools.partial(put, layer) for layer in layers))
        layers = {f"layers_{number}": dict(zip(("key", "value"), each, strict=True))
                  for number, each in enumerate(kept)}
        return logits[:, 0], {"place": place + 1, "layers": layers}

    def cache_axes(self, own):
        return {"place": 0, "layers": 0}

    def account(self, source, target):
        config, tokens = self.config, source + target
        return StepAccount(
            width=config.emb_dim, heads=config.num_heads * config.head_dim, mlp=config.mlp_dim,
            attention_outputs=config.num_layers * tokens, attention_inputs=0,
            mlp_outputs=config.num_layers * tokens, embedded=tokens, predicted=tokens,
            table="token_embedder/embedding", head="head/kernel")


@functools.cache
def _axes(config):
    variables = jax.eval_shape(SmallDecoderNetwork(config)._variables, jax.random.key(0))
    return {path.removesuffix("_axes"): sharding.Axes(metadata.names)
            for path, metadata in trees.flatten(variables["params_axes"]).items()}


@contextlib.contextmanager
def with_family() -> Iterator[None]:
    """The family's row is in the table within the block."""
    families.FAMILIES[SmallDecoderConfig.family] = families.Family(SmallDecoderConfig, SmallDecoderNetwork)
    try:
        yield
    finally:
        del families.FAMILIES[SmallDecoderConfig.family]


def tokenizer() -> bytes:
    """A ``tokenizer.json`` of one token a byte: ``e`` is 0, ``t`` 1, EOS 2, padding 3."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"e", "t"})
    names = ["e", "t", "</s>", "<pad>", *letters]
    special = [{"id": number, "content": names[number], "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True} for number in (2, 3)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {name: number for number, name in enumerate(names)}, "merges": []},
    }).encode()
