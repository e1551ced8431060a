"""Classification by rank: the answer choice of the largest log-probability.

The sum over a choice's tokens INCLUDING the end token, without length normalisation. Source: Sanh et
al. 2022, https://arxiv.org/abs/2110.08207, section 5; Jang et al. 2023,
https://arxiv.org/abs/2302.03202, section 4.
"""

import functools

import jax
import numpy as np

from elm_jax.models.t5 import T5Network
from elm_jax.types import Array, Params

TIE = 1e-5
"""Scores so near to each other, relative to the best, are equal: what float32 cannot tell apart."""


@functools.partial(jax.jit, static_argnames=("network",))
def score_choices(network: T5Network, params: Params, inputs: Array, choices: Array) -> Array:
    """Log-probability of every choice; the encoder runs once an instance.

    Args:
        network: static; networks of equal config share one program for each shape.
        params: of that network, on any mesh.
        inputs: i32[B, S], padded with 0.
        choices: i32[B, C, T], EOS included, padded with 0.

    Returns:
        f32[B, C]; 0 for a choice that is all padding, which `predict` never takes.
    """
    return network.target_log_probs(params, inputs, choices).sum(axis=-1)


def predict(scores: np.ndarray, num_choices: np.ndarray) -> np.ndarray:
    """Position of the best choice, i32[B]; of equal ones the first.

    Two choices of the same tokens score the same up to float32's last digits, which depend on the
    batch; `TIE` keeps the answer from depending on them too.

    Args:
        scores: f32[B, C].
        num_choices: i32[B], each at least 1; what lies behind is padding.
    """
    scores = np.asarray(scores, np.float64)
    real = np.arange(scores.shape[1])[None, :] < np.asarray(num_choices)[:, None]
    scores = np.where(real, scores, -np.inf)
    best = scores.max(axis=1, keepdims=True)
    return (scores >= best - TIE * np.maximum(1.0, np.abs(best))).argmax(axis=1).astype(np.int32)
