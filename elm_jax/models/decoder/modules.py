"""Decoder-only networks as Flax modules: Llama type and GPT-2, by the config's choices.

Other code uses them through `network.DecoderNetwork`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.models.adapters.carriers import layer_configs
from elm_jax.models.adapters.config import attach
from elm_jax.models.blocks.grouped_attention import GroupedAttention, HeadKeysValues, Reach, cached
from elm_jax.models.blocks.layer_stack import run_stack
from elm_jax.models.blocks.rotary import Rotation, divided_low, frequencies, rotation
from elm_jax.models.blocks.sparse_sublayer import (
    Routed,
    SubLayer,
    add_feed_forwards,
    dense_of,
    feed_forward_of,
    has_dense_sublayer,
)
from elm_jax.models.blocks.task_table import table_of
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.layers.dense import LOGITS_PRECISION, Dense, Dropout, Embed, RMSNorm
from elm_jax.models.layers.layer_norm import LayerNorm
from elm_jax.models.network import Layout
from elm_jax.runtime.sharding import constrain
from elm_jax.types import Array

INIT_STDDEV = 0.02
"""Of fresh embeddings, whose rows are also the head of a tied network."""
DecoderCache = dict[str, Any]


def _norm(config: DecoderConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.activation_dtype, config.norm_epsilon)


def rotation_of(config: DecoderConfig, positions: Array) -> Rotation | None:
    """The rotation of positions i32[B or 1, L]; None for a network of learned positions."""
    if config.position != "rotary":
        return None
    angles, scaling = frequencies(config.head_dim, config.rope_base), config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        angles = (angles / scaling.factor).astype(angles.dtype)
    elif scaling is not None:
        bounds = (scaling.low_freq_factor, scaling.high_freq_factor)
        angles = divided_low(angles, scaling.factor, bounds, scaling.original_max_length)
    return rotation(angles, positions)


class CausalLayer(nn.Module):
    """Layer: causal attention and feed-forward, each with norm, adapter, dropout and residual sum."""

    config: DecoderConfig

    def setup(self) -> None:
        """Creates the sub-layers."""
        config = self.config
        dtype, dense_bias = config.activation_dtype, config.dense_bias
        self.pre_attention_norm = _norm(config)
        self.attention = GroupedAttention(
            config.emb_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.dropout_rate,
            dtype, config.adapter, (config.qkv_bias or dense_bias, dense_bias),
            config.norm_epsilon if config.qk_norm else None, config.qk_norm_joined)
        self.pre_mlp_norm = _norm(config)
        self.mlp = feed_forward_of(config, dense_bias)
        self.dropout = Dropout(config.dropout_rate)
        self.attention_adapter = attach(config.adapter, "attention", dtype)
        self.mlp_adapter = attach(config.adapter, "mlp", dtype)
        if has_dense_sublayer(config):
            self.pre_extra_mlp_norm = _norm(config)
            self.extra_mlp = dense_of(config, dense_bias)
            self.extra_mlp_adapter = attach(config.adapter, "mlp", dtype)

    def __call__(self, x: Array, by: Rotation | None, reach: Reach, routed: Routed | None,
                 deterministic: bool) -> Array:
        """Applies the layer to rows f[B, L, D]; returns f[B, L, D]."""
        return self.prefill(x, by, reach, routed, deterministic)[0]

    def prefill(self, x: Array, by: Rotation | None, reach: Reach, routed: Routed | None,
                deterministic: bool) -> tuple[Array, HeadKeysValues]:
        """Applies the layer to rows f[B, L, D]; returns f[B, L, D], and the tokens' keys and values."""
        normed = self.pre_attention_norm(x)
        y, keys_values = self.attention(normed, by, reach, deterministic)
        x = self._add(x, y, normed, deterministic)
        return self._feed_forward(x, routed, deterministic), keys_values

    def step(self, x: Array, by: Rotation | None, cache: DecoderCache, index: Array, real: Array,
             routed: Routed | None = None) -> tuple[Array, DecoderCache]:
        """Decodes one token of each row: x f[B, 1, D] -> f[B, 1, D], and the layer's next cache."""
        normed = self.pre_attention_norm(x)
        y, (keys, values) = self.attention.step(
            normed, by, HeadKeysValues(cache["prompt_key"], cache["prompt_value"]),
            HeadKeysValues(cache["key"], cache["value"]), index, real)
        x = self._feed_forward(self._add(x, y, normed, True), routed, True)
        return x, {**cache, "key": keys, "value": values}

    def _add(self, x: Array, y: Array, normed: Array, deterministic: bool) -> Array:
        return x + self.dropout(self.attention_adapter(y, normed), deterministic)

    def _feed_forward(self, x: Array, routed: Routed | None, deterministic: bool) -> Array:
        parts = [SubLayer(self.pre_mlp_norm, self.mlp, self.mlp_adapter)]
        if has_dense_sublayer(self.config):
            parts.append(SubLayer(self.pre_extra_mlp_norm, self.extra_mlp, self.extra_mlp_adapter))
        return add_feed_forwards(x, parts, self.dropout, routed, deterministic)


class CausalStack(nn.Module):
    """Stack of causal layers and the last norm; the lowest `trunk` layers run without dropout."""

    config: DecoderConfig
    layout: Layout = Layout()
    trunk: int = 0

    def setup(self) -> None:
        """Creates the layers ``layers_0`` and so on."""
        configs = layer_configs(self.config, 0, self.config.num_layers)
        self.layers = [CausalLayer(config) for config in configs]
        self.final_norm = _norm(self.config)

    def __call__(self, x: Array, by: Rotation | None, reach: Reach, routed: Routed | None,
                 deterministic: bool) -> Array:
        """Applies the layers above the trunk, and the last norm, to f[B, L, D]; returns f[B, L, D]."""
        x = run_stack(self, CausalLayer(self.config, parent=None), x, (by, reach, routed), deterministic,
                      (self.trunk, len(self.layers)))
        return self.final_norm(x)

    def below(self, x: Array, by: Rotation | None, reach: Reach, routed: Routed | None) -> Array:
        """Applies the trunk's layers to f[B, L, D], without dropout; returns f[B, L, D]."""
        layer = CausalLayer(self.config, parent=None)
        return run_stack(self, layer, x, (by, reach, routed), True, (0, self.trunk))

    def prefill(self, x: Array, by: Rotation | None, reach: Reach, routed: Routed | None, steps: int
                ) -> DecoderCache:
        """Makes the layers' caches of prompts f[B, S, D], with room for further tokens."""
        layers = {}
        for number, layer in enumerate(self.layers):
            x, tokens = layer.prefill(x, by, reach, routed, True)
            room = cached(HeadKeysValues(*(jnp.zeros((len(each), steps, *each.shape[2:]), each.dtype)
                                           for each in tokens)))
            keys, values = cached(tokens)
            layers[f"layers_{number}"] = {"prompt_key": keys, "prompt_value": values, "key": room.keys,
                                          "value": room.values}
        return layers

    def step(self, x: Array, by: Rotation | None, layers: DecoderCache, index: Array, real: Array,
             routed: Routed | None = None) -> tuple[Array, DecoderCache]:
        """Decodes one token of each row: f[B, 1, D] -> f[B, 1, D], and the next caches."""
        following = {}
        for number, layer in enumerate(self.layers):
            name = f"layers_{number}"
            x, following[name] = layer.step(x, by, layers[name], index, real, routed)
        return self.final_norm(x), following


class CausalTransformer(nn.Module):
    """The whole network: embedding, positions, layers, head."""

    config: DecoderConfig
    layout: Layout = Layout()
    trunk: int = 0

    def setup(self) -> None:
        """Creates embeddings, layers and, if it is untied, the head."""
        config = self.config
        dtype = config.activation_dtype
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, dtype, INIT_STDDEV)
        if config.position == "learned":
            self.position_embedder = Embed(config.max_length, config.emb_dim, dtype, INIT_STDDEV, "length")
        self.dropout = Dropout(config.dropout_rate)
        self.decoder = CausalStack(config, self.layout, self.trunk)
        self.task_embedder = table_of(config)
        if not config.tied_head:
            self.head = Dense(config.vocab_size, ("embed", "vocab"), jnp.dtype("float32"),
                              precision=LOGITS_PRECISION)

    def __call__(self, tokens: Array, positions: Array, reach: Reach, deterministic: bool = True,
                 trunk_states: Array | None = None, routed: Routed | None = None) -> Array:
        """Logits f32[B, L, V] of tokens i32[B, L] at positions i32[B or 1, L]; see `states`."""
        return self.logits(self.states(tokens, positions, reach, deterministic, trunk_states, routed))

    def states(self, tokens: Array, positions: Array, reach: Reach, deterministic: bool = True,
               trunk_states: Array | None = None, routed: Routed | None = None) -> Array:
        """Last states f[B, L, D], normalised, of tokens i32[B, L], or of their states above the trunk.

        `routed` says which of them are padding, for sparse layers, and which task they are of.
        """
        x = trunk_states
        if x is None and self.trunk:
            x = self.states_above_trunk(tokens, positions, reach, routed)
        elif x is None:
            x = self.dropout(self._embed(tokens, positions), deterministic)
        routed = self._with_tasks(routed)
        return self.decoder(x, rotation_of(self.config, positions), reach, routed, deterministic)

    def states_above_trunk(self, tokens: Array, positions: Array, reach: Reach,
                           routed: Routed | None = None) -> Array:
        """States f[B, L, D] above the trunk of tokens i32[B, L] at positions i32[B or 1, L]."""
        by = rotation_of(self.config, positions)
        return self.decoder.below(self._embed(tokens, positions), by, reach, routed)

    def logits(self, y: Array) -> Array:
        """Applies the tied or untied head: f[B, L, D] -> f32[B, L, V]."""
        logits = self.token_embedder.unscaled(y) if self.config.tied_head else self.head(y)
        return constrain(logits, "batch", None, "vocab")

    def prefill(self, tokens: Array, positions: Array, reach: Reach, steps: int,
                routed: Routed | None = None) -> DecoderCache:
        """Makes the layers' caches of prompts i32[B, S]."""
        by = rotation_of(self.config, positions)
        routed = self._with_tasks(routed)
        return self.decoder.prefill(self._embed(tokens, positions), by, reach, routed, steps)

    def step(self, token: Array, positions: Array, layers: DecoderCache, index: Array, real: Array,
             routed: Routed | None = None) -> tuple[Array, DecoderCache]:
        """Decodes tokens i32[B, 1] at positions i32[B, 1] -> f32[B, V], and the layers' next caches."""
        x, by = self._embed(token, positions), rotation_of(self.config, positions)
        y, layers = self.decoder.step(x, by, layers, index, real, self._with_tasks(routed))
        return self.logits(y)[:, 0], layers

    def _with_tasks(self, routed: Routed | None) -> Routed | None:
        return routed if self.task_embedder is None else self.task_embedder.on(routed)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        x = self.token_embedder(tokens)
        return x + self.position_embedder(positions) if self.config.position == "learned" else x
