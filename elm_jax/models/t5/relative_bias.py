"""T5's relative position bias: a learned number for each head and bucket of distances."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.partitioning import param_with_axes

from elm_jax.types import Array


def distance_buckets(distances: np.ndarray, *, bidirectional: bool, num_buckets: int,
                     max_distance: int) -> np.ndarray:
    """Maps relative positions (key minus query) to buckets i32[...].

    Half of the buckets (of one direction) hold one distance each, the others grow logarithmically
    up to `max_distance`; all that is farther shares the last one. A causal bias has one direction
    only, and keys that lie ahead fall into bucket 0.

    Args:
        distances: int[...], key position minus query position.
        bidirectional: the encoder's rule: the upper half of the buckets is for keys ahead.
        num_buckets: of both directions together.
        max_distance: where the last bucket begins.

    Returns:
        i32[...] in ``[0, num_buckets)``.

    Source: https://arxiv.org/abs/1910.10683, section 2.1.
    """
    behind = -np.asarray(distances, np.int64)
    offset = np.zeros_like(behind)
    if bidirectional:
        num_buckets //= 2
        offset = np.where(behind < 0, num_buckets, 0)
        behind = np.abs(behind)
    behind = np.maximum(behind, 0)
    exact = num_buckets // 2
    growth = np.log(np.maximum(behind, exact) / exact) / np.log(max_distance / exact)
    # The tolerance keeps a distance on a border, 8 * 16 ** (3 / 4) say, on its upper side.
    far = exact + np.floor(growth * (num_buckets - exact) + 1e-6).astype(np.int64)
    bucket = np.where(behind < exact, behind, np.minimum(far, num_buckets - 1))
    return (offset + bucket).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Bias of attention logits by relative position, shared by all layers of one stack.

    Attributes:
        num_heads: heads H.
        num_buckets: buckets of `distance_buckets`.
        max_distance: as in `distance_buckets`.
        bidirectional: True in the encoder.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    def setup(self) -> None:
        """Creates the table f32[H, buckets]."""
        self.rel_embedding = param_with_axes(
            "rel_embedding", nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets), jnp.float32, axes=("heads", "relpos_buckets"),
        )

    def __call__(self, length: int, positions: Array | None = None) -> Array:
        """Computes the bias f32[1 or B, H, L, L] of a square of queries and keys.

        Args:
            length: L of queries and of keys.
            positions: i32[B, L]; None counts 0, 1, ... L-1, which is cheaper, and within the
                segments of a packed row gives the same.

        Returns:
            f32[1, H, L, L], or f32[B, H, L, L] with positions; queries before keys.
        """
        return self._from_index(length) if positions is None else self._from_positions(positions)

    def _from_index(self, length: int) -> Array:
        """Bias as a Toeplitz matrix f32[1, H, L, L], without gather: its gradient is a sum, not a scatter."""
        # Relative position m at index m, and -m at index 2L - m.
        distances = (np.arange(2 * length) + length) % (2 * length) - length
        diagonals = self._bias_at(distances)
        # Rows of 2L repeated and cut to rows of 2L - 1 move by one a row.
        tiled = jnp.tile(diagonals, (1, length))[:, : length * (2 * length - 1)]
        return tiled.reshape(1, self.num_heads, length, 2 * length - 1)[..., :length]

    def _from_positions(self, positions: Array) -> Array:
        reach = self.max_distance
        distance = jnp.expand_dims(positions, 1) - jnp.expand_dims(positions, 2)
        index = jnp.clip(distance, -reach, reach) + reach
        bias = jnp.take(self._bias_at(np.arange(-reach, reach + 1)), index, axis=1, mode="clip")
        return jnp.moveaxis(bias, 0, 1)

    def _bias_at(self, distances: np.ndarray) -> Array:
        """Bias f32[H, N] at relative positions int[N], by a small matrix product."""
        buckets = distance_buckets(
            distances, bidirectional=self.bidirectional, num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        one_hot = (np.arange(self.num_buckets)[:, None] == buckets[None, :]).astype(np.float32)
        return jnp.dot(self.rel_embedding, one_hot, precision=jax.lax.Precision.HIGHEST)
