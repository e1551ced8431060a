"""The T5 network with T5X's calling convention, for `t5x.models.EncoderDecoderModel`.

Needs Flax only. Parameters, their names and their logical axes are `modules.Transformer`'s; T5X's
own decoding functions (beam search, temperature sampling) work on the cache that is kept here. Gin files of
exported folders name this module, and find the network's configs in it.
"""

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.modules import Cache, Packing, Transformer
from elm_jax.types import Array

__all__ = ["AdapterConfig", "T5Config", "T5XTransformer"]

CACHE = "cache"
INDEX = "cache_index"
"""T5X's decoding functions treat every leaf of the cache as one with a leading batch axis, except for
a leaf of this name."""
KEPT = ("self_key", "self_value")
"""Entries of a layer's cache that change from step to step, f[B, T, H, K] each."""


class T5XTransformer(nn.Module):
    """Encoder-decoder module with the methods that T5X's models call.

    Attributes:
        config: the network, with adapters or without.
    """

    config: T5Config

    def setup(self) -> None:
        """Creates the network in this module's own scope, so that leaf paths get no prefix."""
        if self.config.sparse is not None:
            raise InputError(describe(
                "This module does not run sparse networks under T5X", where="T5Config.sparse",
                got=f"{self.config.sparse.num_experts} experts", expected="a dense network",
                cure="train it with elm train, or run T5X's own network"))
        self.network = Transformer(self.config)
        nn.share_scope(self, self.network)

    def __call__(
        self, encoder_input_tokens: Array, decoder_input_tokens: Array,
        decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None, encoder_positions: Array | None = None,
        decoder_positions: Array | None = None, *, enable_dropout: bool = True, decode: bool = False,
    ) -> Array:
        """Logits f32[B, T, V] of encoder tokens i32[B, S] and decoder tokens i32[B, T].

        Args:
            encoder_input_tokens: i32[B, S], padded with 0.
            decoder_input_tokens: i32[B, T].
            decoder_target_tokens: not used: a padded target has no loss, and no real one attends to it.
            encoder_segment_ids: i32[B, S] of packed rows.
            decoder_segment_ids: i32[B, T] of packed rows.
            encoder_positions: not used: within a segment relative positions are those of the row.
            decoder_positions: not used, as above.
            enable_dropout: whether to draw dropout.
            decode: whether to make an empty cache of T positions beside the logits.
        """
        del encoder_positions, decoder_positions
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        return self.decode(
            encoded, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
            encoder_segment_ids, decoder_segment_ids, enable_dropout=enable_dropout, decode=decode)

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None,
        enable_dropout: bool = True,
    ) -> Array:
        """Encodes tokens i32[B, S] -> f[B, S, D]."""
        tokens = encoder_input_tokens.astype(jnp.int32)  # T5X makes its first variables of floats
        return self.network.encode(tokens, self._real(tokens), Packing(encoder_segment_ids),
                                   deterministic=not enable_dropout)

    def decode(
        self, encoded: Array, encoder_input_tokens: Array, decoder_input_tokens: Array,
        decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None, decoder_positions: Array | None = None,
        enable_dropout: bool = True, decode: bool = False, max_decode_length: int | None = None,
    ) -> Array:
        """Logits f32[B, T, V] of all positions at once, or f32[B, 1, V] of one with the cache.

        Args:
            encoded: f[B, S, D] of `encode`.
            encoder_input_tokens: i32[B, S], for the mask.
            decoder_input_tokens: i32[B, T]; i32[B, 1] if there is a cache.
            decoder_target_tokens: not used.
            encoder_segment_ids: i32[B, S] of packed rows.
            decoder_segment_ids: i32[B, T] of packed rows.
            decoder_positions: not used.
            enable_dropout: whether to draw dropout; never with a cache.
            decode: whether to use the cache, and to make an empty one where there is none.
            max_decode_length: positions that the cache holds.
        """
        del decoder_target_tokens, decoder_positions
        real = self._real(encoder_input_tokens.astype(jnp.int32))
        tokens = decoder_input_tokens.astype(jnp.int32)
        if decode and self.has_variable(CACHE, INDEX):
            return self._step(encoded, real, tokens[:, 0], max_decode_length or 1)
        if decode:
            self._keep(self.network.init_cache(encoded, real, tokens.shape[1]))
        return self.network.decode(encoded, real, tokens, Packing(encoder_segment_ids, decoder_segment_ids),
                                   deterministic=not enable_dropout)

    def _real(self, tokens: Array) -> Array:
        """Token mask from ids: T5X's batches have no lengths, and its padding is no real token."""
        return tokens != self.config.pad_id

    def _step(self, encoded: Array, real: Array, token: Array, length: int) -> Array:
        """Decodes one token with the cache: i32[B] -> logits f32[B, 1, V]."""
        # Computes cross-attention's keys and values at every step, unless XLA hoists that out of T5X's loop.
        cache = self.network.init_cache(encoded, real, length)
        kept = self.get_variable(CACHE, "layers")
        cache["index"] = self.get_variable(CACHE, INDEX)
        cache["layers"] = {name: {**layer, **kept[name]} for name, layer in cache["layers"].items()}
        logits, cache = self.network.decode_step(token, cache)
        self._keep(cache)
        return logits[:, None, :]

    def _keep(self, cache: Cache) -> None:
        layers = {name: {key: layer[key] for key in KEPT} for name, layer in cache["layers"].items()}
        self.put_variable(CACHE, INDEX, cache["index"])
        self.put_variable(CACHE, "layers", layers)
