"""The T5 encoder-decoder as Flax modules, with the parameter tree of T5X's minimal T5.

Other code uses it through `network.T5Network`. Attention biases (relative positions, masks) are computed once
for each stack and shared by its layers.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.models.adapters.carriers import layer_configs
from elm_jax.models.adapters.config import Hook, attach
from elm_jax.models.blocks.attention import Attention, KeysValues
from elm_jax.models.blocks.layer_stack import run_stack
from elm_jax.models.blocks.sparse_sublayer import (
    Routed,
    SubLayer,
    add_feed_forwards,
    dense_of,
    feed_forward_of,
    has_dense_sublayer,
    routed_of,
)
from elm_jax.models.blocks.task_table import table_of
from elm_jax.models.layers.dense import LOGITS_PRECISION, MASKED, Dense, Dropout, Embed, RMSNorm
from elm_jax.models.network import Layout
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.relative_bias import RelativePositionBias
from elm_jax.runtime.sharding import constrain
from elm_jax.types import Array

Cache = dict[str, Any]
Biases = tuple[Array, ...]


class Packing(NamedTuple):
    """What stands beside the tokens of a batch: the encoder's with [B, S], the decoder's with [B, T].

    Attributes:
        encoder_segment_ids, decoder_segment_ids: i32[B, ...] of packed rows; None for others.
        encoder_positions, decoder_positions: i32[B, ...]; None: those of the row.
        encoder_task_ids, decoder_task_ids: i32[B], or i32[B, ...] of packed rows, numbers of tasks; None if
            nothing needs them.
    """

    encoder_segment_ids: Array | None = None
    decoder_segment_ids: Array | None = None
    encoder_positions: Array | None = None
    decoder_positions: Array | None = None
    encoder_task_ids: Array | None = None
    decoder_task_ids: Array | None = None


UNPACKED = Packing()
"""Rows of one text each, of no task."""


def mask_bias(allowed: Array) -> Array:
    """Turns a mask bool[...] into a bias f32[...]: 0 where a key may be attended, else a large negative."""
    return jnp.where(allowed, jnp.float32(0.0), jnp.float32(MASKED))


def key_mask(real: Array, query_segments: Array | None, key_segments: Array | None) -> Array:
    """Mask of the keys that are not padding and, in packed rows, are in the query's own segment.

    Args:
        real: bool[B, S], which keys are tokens.
        query_segments: i32[B, L], or None.
        key_segments: i32[B, S], or None.

    Returns:
        bool[B, 1, 1, S], or bool[B, 1, L, S] when packed.
    """
    allowed = real[:, None, None, :]
    if query_segments is None or key_segments is None:
        return allowed
    return allowed & same_segment(query_segments, key_segments)


def same_segment(query_segments: Array, key_segments: Array) -> Array:
    """Mask of equal segments: i32[B, L], i32[B, S] -> bool[B, 1, L, S]."""
    return query_segments[:, None, :, None] == key_segments[:, None, None, :]


def causal_mask(length: int) -> Array:
    """Causal mask bool[1, 1, L, L], axes (query, key): no query attends to a later key."""
    index = jnp.arange(length)
    return (index[:, None] >= index[None, :])[None, None]


def real_inputs(tokens: Array, pad_id: int) -> Array:
    """Mask bool[B, S] of inputs i32[B, S] without lengths: all up to the last token that is not padding."""
    index = jnp.arange(1, tokens.shape[1] + 1)[None]
    return index <= jnp.max(jnp.where(tokens != pad_id, index, 0), axis=1, keepdims=True)


def _decoder_tokens(inputs: Array, segment_ids: Array | None, pad_id: int) -> Array:
    """Token mask bool[B, T] of a decoder's rows: from segment ids, or else from the inputs."""
    if segment_ids is not None:
        return segment_ids > 0
    return real_inputs(inputs, pad_id) | (jnp.arange(inputs.shape[1]) == 0)[None]


def _norm(config: T5Config) -> RMSNorm:
    return RMSNorm(config.activation_dtype)


def _attention(config: T5Config) -> Attention:
    return Attention(
        config.emb_dim, config.num_heads, config.head_dim, config.dropout_rate,
        config.activation_dtype, config.adapter,
    )


def _adapter(config: T5Config, place: str) -> Hook:
    return attach(config.adapter, place, config.activation_dtype)


def _relative_bias(config: T5Config, bidirectional: bool) -> RelativePositionBias:
    return RelativePositionBias(
        config.num_heads, config.relative_attention_num_buckets,
        config.relative_attention_max_distance, bidirectional,
    )


class _FeedForward(nn.Module):
    """The part that both kinds of layers share: a feed-forward, dense or sparse, and what follows it."""

    config: T5Config

    def _setup_feed_forward(self) -> None:
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = feed_forward_of(self.config)
        self.dropout = Dropout(self.config.dropout_rate)
        self.mlp_adapter = _adapter(self.config, "mlp")
        if has_dense_sublayer(self.config):
            self.pre_extra_mlp_layer_norm = _norm(self.config)
            self.extra_mlp = dense_of(self.config)
            self.extra_mlp_adapter = _adapter(self.config, "mlp")

    def _feed_forward(self, x: Array, routed: Routed | None, deterministic: bool) -> Array:
        parts = [SubLayer(self.pre_mlp_layer_norm, self.mlp, self.mlp_adapter)]
        if has_dense_sublayer(self.config):
            norm = self.pre_extra_mlp_layer_norm
            parts.append(SubLayer(norm, self.extra_mlp, self.extra_mlp_adapter))
        return add_feed_forwards(x, parts, self.dropout, routed, deterministic)


class EncoderLayer(_FeedForward):
    """Encoder layer: self-attention and feed-forward, each with norm, adapter, dropout and residual sum."""

    def setup(self) -> None:
        """Creates the sub-layers under T5X's names."""
        self.pre_attention_layer_norm = _norm(self.config)
        self.attention = _attention(self.config)
        self._setup_feed_forward()
        self.attention_adapter = _adapter(self.config, "attention")

    def __call__(self, x: Array, biases: Biases, routed: Routed | None, deterministic: bool) -> Array:
        """Applies the layer: f[B, S, D] -> f[B, S, D]."""
        normed = self.pre_attention_layer_norm(x)
        y = self.attention(normed, self.attention.keys_values(normed), biases, deterministic)
        x = x + self.dropout(self.attention_adapter(y, normed), deterministic)
        return self._feed_forward(x, routed, deterministic)


class DecoderLayer(_FeedForward):
    """Decoder layer: causal self-attention, cross-attention and feed-forward, each with its adapter."""

    def setup(self) -> None:
        """Creates the sub-layers under T5X's names."""
        self.pre_self_attention_layer_norm = _norm(self.config)
        self.self_attention = _attention(self.config)
        self.pre_cross_attention_layer_norm = _norm(self.config)
        self.encoder_decoder_attention = _attention(self.config)
        self._setup_feed_forward()
        self.self_attention_adapter = _adapter(self.config, "attention")
        self.encoder_decoder_attention_adapter = _adapter(self.config, "cross_attention")

    def __call__(
        self, x: Array, encoded: Array, self_biases: Biases, cross_biases: Biases,
        routed: Routed | None, deterministic: bool,
    ) -> Array:
        """Applies the layer: x f[N, T, D], encoded f[B, S, D] -> f[N, T, D]; N is B, or B * C (C choices)."""
        normed = self.pre_self_attention_layer_norm(x)
        keys_values = self.self_attention.keys_values(normed)
        cross_keys_values = self.cross_keys_values(encoded)
        x = self._attentions(
            x, normed, keys_values, cross_keys_values, self_biases, cross_biases, deterministic
        )
        return self._feed_forward(x, routed, deterministic)

    def cross_keys_values(self, encoded: Array) -> KeysValues:
        """Projects f[B, S, D] to keys and values of cross-attention, f[B, S, H, K] each."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def step(
        self, x: Array, cache: Cache, index: Array, self_biases: Biases, cross_biases: Biases,
        routed: Routed | None = None,
    ) -> tuple[Array, Cache]:
        """Decodes one position: x f[B, 1, D] at `index` -> f[B, 1, D], and the layer's next cache."""
        normed = self.pre_self_attention_layer_norm(x)
        keys, values = self.self_attention.keys_values(normed)
        keys = jax.lax.dynamic_update_slice_in_dim(cache["self_key"], keys, index, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(cache["self_value"], values, index, axis=1)
        cross = (cache["cross_key"], cache["cross_value"])
        x = self._attentions(x, normed, (keys, values), cross, self_biases, cross_biases, True)
        return self._feed_forward(x, routed, True), {**cache, "self_key": keys, "self_value": values}

    def _attentions(
        self, x: Array, normed: Array, keys_values: KeysValues, cross_keys_values: KeysValues,
        self_biases: Biases, cross_biases: Biases, deterministic: bool,
    ) -> Array:
        y = self.self_attention(normed, keys_values, self_biases, deterministic)
        x = x + self.dropout(self.self_attention_adapter(y, normed), deterministic)
        normed = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(normed, cross_keys_values, cross_biases, deterministic)
        return x + self.dropout(self.encoder_decoder_attention_adapter(y, normed), deterministic)


class Encoder(nn.Module):
    """Stack of encoder layers with one shared position bias; the lowest `trunk` layers have no dropout."""

    config: T5Config
    layout: Layout = Layout()
    trunk: int = 0

    def setup(self) -> None:
        """Creates the layers ``layers_0`` and so on."""
        self.relpos_bias = _relative_bias(self.config, bidirectional=True)
        configs = layer_configs(self.config, 0, self.config.num_encoder_layers)
        self.layers = [EncoderLayer(config) for config in configs]
        self.encoder_norm = _norm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(
        self, x: Array, allowed: Array, positions: Array | None, deterministic: bool, above: bool = False,
        routed: Routed | None = None,
    ) -> Array:
        """Encodes embedded f[B, S, D], or states above the trunk, with key mask bool[B, 1, 1 or S, S]."""
        biases = self._biases(x, allowed, positions)
        if not above and self.trunk:
            x = self._below(x, biases, routed)
        elif not above:
            x = self.dropout(x, deterministic)
        x = run_stack(self, EncoderLayer(self.config, parent=None), x, (biases, routed), deterministic,
                      (self.trunk, len(self.layers)))
        return self.dropout(self.encoder_norm(x), deterministic)

    def below(self, x: Array, allowed: Array, routed: Routed | None = None) -> Array:
        """States f[B, S, D] above the trunk, of embedded f[B, S, D] with key mask bool[B, 1, S, S]."""
        return self._below(x, self._biases(x, allowed, None), routed)

    def _biases(self, x: Array, allowed: Array, positions: Array | None) -> Biases:
        return self.relpos_bias(x.shape[1], positions), mask_bias(allowed)

    def _below(self, x: Array, biases: Biases, routed: Routed | None) -> Array:
        layer = EncoderLayer(self.config, parent=None)
        return run_stack(self, layer, x, (biases, routed), True, (0, self.trunk))


class Decoder(nn.Module):
    """Stack of decoder layers with one shared relative position bias, and the untied head."""

    config: T5Config
    layout: Layout = Layout()

    def setup(self) -> None:
        """Creates the layers ``layers_0`` and so on."""
        self.relpos_bias = _relative_bias(self.config, bidirectional=False)
        config = self.config
        configs = layer_configs(config, config.num_encoder_layers, config.num_decoder_layers, decoder=True)
        self.layers = [DecoderLayer(config) for config in configs]
        self.decoder_norm = _norm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)
        if not self.config.logits_via_embedding:
            self.logits_dense = Dense(
                self.config.vocab_size, ("embed", "vocab"), jnp.dtype("float32"),
                precision=LOGITS_PRECISION,
            )

    def __call__(
        self, x: Array, encoded: Array, self_allowed: Array, cross_allowed: Array,
        positions: Array | None, deterministic: bool, routed: Routed | None = None,
    ) -> Array:
        """Decodes embedded f[N, T, D] -> f[N, T, D], without the head; N is B, or B * C for C choices."""
        self_biases = (self.relpos_bias(x.shape[1], positions), mask_bias(self_allowed))
        cross_biases = (mask_bias(cross_allowed),)
        x = self.dropout(x, deterministic)
        x = run_stack(self, DecoderLayer(self.config, parent=None), x,
                      (encoded, self_biases, cross_biases, routed), deterministic)
        return self.dropout(self.decoder_norm(x), deterministic)

    def head(self, x: Array) -> Array:
        """Applies the untied head: f[..., D] -> f32[..., V]."""
        return self.logits_dense(x)

    def init_cache(self, encoded: Array, cross_allowed: Array, max_length: int) -> Cache:
        """Makes the cache of `step` for encoded f[B, S, D]: empty self-attention, and all constant parts."""
        config = self.config
        shape = (encoded.shape[0], max_length, config.num_heads, config.head_dim)
        layers = {}
        for index, layer in enumerate(self.layers):
            cross_key, cross_value = layer.cross_keys_values(encoded)
            layers[f"layers_{index}"] = {
                "self_key": jnp.zeros(shape, config.activation_dtype),
                "self_value": jnp.zeros(shape, config.activation_dtype),
                "cross_key": cross_key,
                "cross_value": cross_value,
            }
        return {
            "index": jnp.zeros((), jnp.int32),
            "self_bias": self.relpos_bias(max_length) + mask_bias(causal_mask(max_length)),
            "cross_bias": mask_bias(cross_allowed),
            "layers": layers,
        }

    def step(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        """Decodes one position: embedded f[B, 1, D] at ``cache['index']`` -> f[B, 1, D], and the cache."""
        index, routed = cache["index"], Routed(task=cache.get("task"))
        row = jax.lax.dynamic_slice_in_dim(cache["self_bias"], index, 1, axis=2)
        layers = {}
        for number, layer in enumerate(self.layers):
            name = f"layers_{number}"
            x, layers[name] = layer.step(
                x, cache["layers"][name], index, (row,), (cache["cross_bias"],), routed
            )
        return self.decoder_norm(x), {**cache, "index": index + 1, "layers": layers}


class Transformer(nn.Module):
    """The whole T5 encoder-decoder: embedding, encoder, decoder, head."""

    config: T5Config
    layout: Layout = Layout()
    trunk: int = 0

    def setup(self) -> None:
        """Creates embedding, encoder and decoder."""
        config = self.config
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, config.activation_dtype)
        self.encoder = Encoder(config, self.layout, self.trunk)
        self.decoder = Decoder(config, self.layout)
        self.task_embedder = table_of(config)

    def __call__(self, encoder_input_tokens: Array, decoder_input_tokens: Array,
                 packing: Packing = UNPACKED, deterministic: bool = True) -> Array:
        """Logits f32[B, T, V] of batches without lengths: i32[B, S], i32[B, T].

        A row of inputs ends behind its last token that is not padding; id 0 before it is a token like others.
        """
        real = real_inputs(encoder_input_tokens, self.config.pad_id)
        encoded = self.encode(encoder_input_tokens, real, packing, deterministic)
        return self.decode(encoded, real, decoder_input_tokens, packing, deterministic)

    def decode(self, encoded: Array, real: Array, decoder_input_tokens: Array,
               packing: Packing = UNPACKED, deterministic: bool = True) -> Array:
        """Logits f32[B, T, V] of decoder inputs i32[B, T]; encoded f[B, S, D] has token mask bool[B, S].

        Sparse layers take as tokens what is in a segment; without segments the start token and all up to the
        last one that is not padding.
        """
        segment_ids = packing.decoder_segment_ids
        self_allowed = causal_mask(decoder_input_tokens.shape[1])
        if segment_ids is not None:
            self_allowed = self_allowed & same_segment(segment_ids, segment_ids)
        routed = None
        if self.config.sparse is not None:
            routed = self._routed(_decoder_tokens(decoder_input_tokens, segment_ids, self.config.pad_id),
                                  packing.decoder_task_ids)
        y = self.decoder(
            self.token_embedder(decoder_input_tokens), encoded, self_allowed,
            key_mask(real, segment_ids, packing.encoder_segment_ids),
            packing.decoder_positions, deterministic, routed,
        )
        return self.head(y)

    def encode(self, tokens: Array, real: Array, packing: Packing = UNPACKED, deterministic: bool = True,
               states: Array | None = None) -> Array:
        """Encodes tokens i32[B, S], or their states above the trunk, with token mask bool[B, S]."""
        segment_ids, positions = packing.encoder_segment_ids, packing.encoder_positions
        allowed = key_mask(real, segment_ids, segment_ids)
        routed = self._routed(real if segment_ids is None else segment_ids > 0, packing.encoder_task_ids)
        if states is not None:
            return self.encoder(states, allowed, positions, deterministic, True, routed)
        return self.encoder(self.token_embedder(tokens), allowed, positions, deterministic, False, routed)

    def states_above_trunk(self, tokens: Array, segment_ids: Array) -> Array:
        """States f[B, S, D] above the trunk of inputs and segment ids i32[B, S]; padding has segment 0."""
        allowed = key_mask(segment_ids > 0, segment_ids, segment_ids)
        return self.encoder.below(
            self.token_embedder(tokens), allowed, routed_of(self.config, segment_ids > 0))

    def choice_logits(self, inputs: Array, real: Array, choice_tokens: Array, choice_real: Array,
                      states: Array | None = None, task_ids: Array | None = None) -> Array:
        """Logits f32[B, C, T, V] of choices i32[B, C, T]; inputs i32[B, S] with token mask bool[B, S].

        `choice_real` bool[B, C, T] says which of the choices' places are tokens, `task_ids` i32[B] of which
        task a row is.
        """
        batch, choices, length = choice_tokens.shape
        encoded = self.encode(inputs, real, Packing(encoder_task_ids=task_ids), states=states)
        y = self.decoder(
            self.token_embedder(choice_tokens.reshape(batch * choices, length)), encoded,
            causal_mask(length), key_mask(real, None, None), None, True,
            self._routed(choice_real.reshape(batch * choices, length),
                         None if task_ids is None else jnp.repeat(task_ids, choices)),
        )
        return self.head(y).reshape(batch, choices, length, self.config.vocab_size)

    def head(self, y: Array) -> Array:
        """Applies the tied or untied head: f[B, L, D] -> f32[B, L, V]."""
        tied = self.config.logits_via_embedding
        logits = self.token_embedder.attend(y) if tied else self.decoder.head(y)
        return constrain(logits, "batch", None, "vocab")

    def init_cache(self, encoded: Array, real: Array, max_length: int, task_ids: Array | None = None
                   ) -> Cache:
        """Makes the cache of `decode_step` for encoded f[B, S, D] with token mask bool[B, S].

        Where gates read the tasks i32[B] of the rows, it holds their vectors.
        """
        cache = self.decoder.init_cache(encoded, key_mask(real, None, None), max_length)
        routed = self._routed(real, task_ids)
        return cache if self.task_embedder is None else {**cache, "task": routed.task}

    def _routed(self, real: Array, task_ids: Array | None) -> Routed | None:
        routed = routed_of(self.config, real, task_ids)
        return routed if self.task_embedder is None else self.task_embedder.on(routed)

    def decode_step(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """Decodes one token: i32[B] -> logits f32[B, V] of the next token, and the next cache."""
        y, cache = self.decoder.step(self.token_embedder(token[:, None]), cache)
        return self.head(y)[:, 0], cache
