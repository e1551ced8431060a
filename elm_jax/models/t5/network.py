"""T5 as functions of parameters: loss-side logits, log-probabilities of choices, cached decoding.

Everything above the network knows these functions only. Source of the network: Raffel et al.,
https://arxiv.org/abs/1910.10683, and for T5 1.1 Shazeer, https://arxiv.org/abs/2002.05202.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.blocks import layer_stack
from elm_jax.models.blocks.layer_stack import Layout
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.modules import Cache, Transformer
from elm_jax.runtime import sharding, trees
from elm_jax.types import Array, Batch, Params

__all__ = ["AdapterConfig", "Cache", "Layout", "T5Config", "T5Network", "shift_right"]

PADDING_ID = 0
PACKING_KEYS = (
    "encoder_segment_ids", "decoder_segment_ids", "encoder_positions", "decoder_positions"
)
_AXES_SUFFIX = "_axes"


def shift_right(targets: Array) -> Array:
    """Decoder inputs of targets, the start token 0 first: i32[..., T] -> i32[..., T]."""
    start = jnp.full((*targets.shape[:-1], 1), PADDING_ID, targets.dtype)
    return jnp.concatenate([start, targets[..., :-1]], axis=-1)


@dataclasses.dataclass(frozen=True)
class T5Network:
    """A T5 of one config. Holds no parameters; hashable, so a static argument of `jax.jit`.

    Attributes:
        config: dimensions, generation, adapters.
        layout: how it is computed: rematerialisation, layers one by one or as a scan.
    """

    config: T5Config
    layout: Layout = dataclasses.field(default_factory=Layout)

    @property
    def _module(self) -> Transformer:
        return Transformer(self.config, self.layout)

    def init(self, rng: Array) -> Params:
        """Fresh parameters in float32. Pure: jit it with `out_shardings` to create them split."""
        return self._init_variables(rng)["params"]

    def abstract_params(self) -> Params:
        """Tree of `jax.ShapeDtypeStruct` with the structure of `init`; nothing is allocated."""
        return jax.eval_shape(self._init_variables, jax.random.key(0))["params"]

    def logical_axes(self) -> Params:
        """Tree of `sharding.Axes` (logical axis names by dimension), structured as `init`."""
        return trees.unflatten(dict(_flat_axes(self.config)))

    def axes_of(self, path: str) -> sharding.Axes | None:
        """Logical axes of one leaf, also of a stacked one (``encoder/layers/...``); None if there is none."""
        axes = _flat_axes(self.config).get(layer_stack.first_layer(path))
        if axes is None or not layer_stack.is_stacked(path):
            return axes
        return sharding.Axes((layer_stack.STACKED, *axes))

    def logits(self, params: Params, batch: Batch, *, dropout_rng: Array | None = None) -> Array:
        """Logits of every decoder position.

        Args:
            params: as `init` makes them.
            batch: encoder_input_tokens i32[B, S], decoder_input_tokens i32[B, T]; packed rows also
                have encoder_segment_ids and decoder_segment_ids. encoder_positions and
                decoder_positions count from 0 in each segment; leaving them out gives the same,
                and is cheaper.
            dropout_rng: key of dropout; None switches dropout off.

        Returns:
            f32[B, T, V].

        Raises:
            InputError: segment ids are given for one side only.
        """
        if ("encoder_segment_ids" in batch) != ("decoder_segment_ids" in batch):
            raise InputError(
                describe("A packed batch needs segment ids of both sides", where="batch",
                         got=", ".join(sorted(batch)),
                         expected="encoder_segment_ids and decoder_segment_ids, or neither")
            )
        return self._module.apply(
            {"params": params},
            batch["encoder_input_tokens"], batch["decoder_input_tokens"],
            **{key: batch[key] for key in PACKING_KEYS if key in batch},
            deterministic=dropout_rng is None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def encode(self, params: Params, inputs: Array) -> Array:
        """Encoder states: i32[B, S] -> f[B, S, D] in the activation dtype, without dropout."""
        return self._module.apply({"params": params}, inputs, method="encode")

    def target_log_probs(self, params: Params, inputs: Array, targets: Array) -> Array:
        """Log-probability of each token of each choice.

        The encoder runs once an instance. All choices go through cross-attention as one query axis
        against that single encoding; its keys and values are computed once and never repeated.

        Args:
            params: as `init` makes them.
            inputs: i32[B, S], padded with 0.
            targets: i32[B, C, T], padded with 0; each choice ends with EOS.

        Returns:
            f32[B, C, T]; 0 at padding, so that a sum over T is the choice's score.
        """
        logits = self._module.apply(
            {"params": params}, inputs, shift_right(targets), method="choice_logits"
        )
        # The token's logit minus the normaliser: no second array of the size of the logits. The
        # logit is a masked sum, not a gather: that stays local where V is split over the mesh.
        hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 3) == targets[..., None]
        token_logits = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        log_probs = token_logits - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(targets != PADDING_ID, log_probs, 0.0)

    def init_cache(self, params: Params, encoded: Array, inputs: Array, max_length: int) -> Cache:
        """Cache for `decode_step`, cross-attention's keys and values computed.

        Args:
            params: as `init` makes them.
            encoded: f[B, S, D] of `encode`.
            inputs: i32[B, S], for the mask.
            max_length: positions that the cache holds; further steps would overwrite the last one.
        """
        return self._module.apply(
            {"params": params}, encoded, inputs, max_length, method="init_cache"
        )

    def decode_step(self, params: Params, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """One token further.

        Args:
            params: as `init` makes them.
            cache: of `init_cache` or the step before.
            token: i32[B]; 0 at the first step.

        Returns:
            Logits f32[B, V] of the token after it, and the next cache.
        """
        return self._module.apply({"params": params}, token, cache, method="decode_step")

    def _init_variables(self, rng: Array) -> Params:
        token = jnp.ones((1, 1), jnp.int32)
        return self._module.init({"params": rng}, token, token)


@functools.lru_cache(maxsize=64)
def _flat_axes(config: T5Config) -> dict[str, sharding.Axes]:
    """Logical axes by path. Remembered: tracing `init` of a network of 48 layers takes seconds."""
    variables = jax.eval_shape(T5Network(config)._init_variables, jax.random.key(0))
    return {
        path.removesuffix(_AXES_SUFFIX): sharding.Axes(metadata.names)
        for path, metadata in trees.flatten(variables["params_axes"]).items()
    }
