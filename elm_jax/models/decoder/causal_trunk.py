"""The frozen lower layers of a decoder-only network (`models.network.Trunk`)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.models.blocks.grouped_attention import Reach, causal
from elm_jax.models.blocks.sparse_sublayer import below_drops, below_first_sparse, routed_of
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.network import TASK_TABLE
from elm_jax.types import Array, Batch, Padded, Params

_LAYER = re.compile(r"decoder/layers_(\d+)/")


class CausalTrunk:
    """The trunk of a decoder-only network: a part of `network.DecoderNetwork`, which has the rest."""

    config: DecoderConfig
    _apply: Any
    _check_length: Any
    _choice_rows: Any

    @property
    def deepest_trunk(self) -> int:
        """All layers, or those below the first in which tokens compete outside of training."""
        return below_drops(self.config, self.config.num_layers)

    def depth_of(self, path: str) -> int:
        """Number of layers before a leaf is first used."""
        if path == TASK_TABLE:
            return below_first_sparse(self.config, self.config.num_layers)
        layer = _LAYER.match(path)
        if layer is not None:
            return int(layer[1])
        return self.config.num_layers if path.startswith(("decoder/final_norm/", "head/")) else 0

    def trunk_states(self, params: Params, tokens: Array, segment_ids: Array) -> Array:
        """Computes the states f[B, L, D] above the trunk of tokens and segment ids i32[B, L]."""
        self._check_length(tokens.shape[1])
        place = jnp.arange(tokens.shape[1])[None]
        starts = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
        positions = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
        return self._apply(params, tokens, positions, within(segment_ids),
                           routed_of(self.config, segment_ids > 0), method="states_above_trunk")

    def trunk_rows(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segment ids i32[B, L] of a training batch."""
        return np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])

    def trunk_of_choices(self, params: Params, inputs: Padded, targets: Padded) -> tuple[Array, Array]:
        """Computes the states f[B, S, D] of prompts and f[B, C, T - 1, D] of choices above the trunk."""
        rows, routed = self._choice_rows(inputs, targets)
        states = self._apply(params, *rows, routed, method="states_above_trunk")
        batch, choices, length = targets.tokens.shape
        width = rows[0].shape[1] - choices * (length - 1)
        return states[:, :width], states[:, width:].reshape(batch, choices, length - 1, -1)


def within(segment_ids: Array) -> Reach:
    """Each token of rows i32[B, L] attends to those before it in its own segment."""
    same = segment_ids[:, None, None, :, None] == segment_ids[:, None, None, None, :]
    return Reach(causal(segment_ids.shape[1]) & same)


def side_by_side(inputs: Padded, targets: Padded) -> Array | None:
    """States f[B, S + C * (T - 1), D] of prompts f[B, S, D] and choices f[B, C, T - 1, D]; None for none."""
    if inputs.states is None:
        return None
    own = targets.states.reshape(len(targets.states), -1, targets.states.shape[-1])
    return jnp.concatenate([inputs.states, own], axis=1)
