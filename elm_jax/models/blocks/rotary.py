"""Rotary positions: pairs of a head's values are turned by angles that grow with the position.

Pairs are (k, k + K / 2), as Hugging Face's files have them. Source: Su et al.,
https://arxiv.org/abs/2104.09864; the scaling of Llama 3: https://arxiv.org/abs/2407.21783, and transformers'
``modeling_rope_utils``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.types import Array


class Rotation(NamedTuple):
    """Cosines and sines of the angles of positions.

    Attributes:
        cos: f32[B or 1, L, 1, K / 2].
        sin: likewise.
    """

    cos: Array
    sin: Array


def frequencies(head_dim: int, base: float) -> np.ndarray:
    """Angles a position, f32[K / 2]: ``base ** (-2 k / K)``."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float32(1.0) / np.float32(base) ** exponents).astype(np.float32)


def divided_low(angles: np.ndarray, factor: float, bounds: tuple[float, float], length: int) -> np.ndarray:
    """Llama 3's scaling: divides the low ones of the frequencies f32[K / 2].

    Args:
        angles: of `frequencies`.
        factor: of the division.
        bounds: turns within `length` positions: frequencies of fewer turns than the first are divided, those
            of more than the second are not, those between in part.
        length: context of the first training.
    """
    low, high = bounds
    turns = length * angles / np.float32(2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return (angles * (kept + (1 - kept) / np.float32(factor))).astype(np.float32)


def rotation(angles: np.ndarray, positions: Array) -> Rotation:
    """Rotation of positions i32[B or 1, L], in float32, by angles a position f32[K / 2]."""
    turned = positions.astype(jnp.float32)[..., None, None] * angles[None, None, None]
    if positions.shape[1] == 1:
        return Rotation(jnp.cos(turned), jnp.sin(turned))
    # A loop keeps its results: XLA's CPU backend would compute them again for each head of each layer.
    return Rotation(*jax.lax.map(lambda is_sine: jnp.where(is_sine, jnp.sin(turned), jnp.cos(turned)),
                                 jnp.arange(2) == 1))


def rotate(x: Array, by: Rotation) -> Array:
    """Turns f[B, L, H, K] in float32; returns f32[B, L, H, K]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
