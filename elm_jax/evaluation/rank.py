"""Rank classification: the predicted answer is the choice of the largest log-probability.

A choice's score is the sum over its tokens INCLUDING the end token, without length normalisation, or, where
a setting says so, the mean over the same tokens. Source of the sum:
Sanh et al. 2022, https://arxiv.org/abs/2110.08207, section 5; Jang et al. 2023,
https://arxiv.org/abs/2302.03202, section 4.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from elm_jax.models.network import Network
from elm_jax.types import Array, Padded, Params

TOKEN_ERROR = 1e-5
"""What float32 leaves uncertain of one token's log-probability, relative to its size where that is above 1;
measured are up to 4e-6, the same tokens in other batches and paddings. Errors of tokens are independent."""
ROUNDING = 2.0**-24
"""Relative error of one rounding in float32, of which the sum over T tokens has about log2(T)."""


@functools.partial(jax.jit, static_argnames=("network",))
def score_choices(network: Network, params: Params, inputs: Padded, choices: Padded) -> Array:
    """Log-probability f32[B, C] of every choice; each input is encoded once.

    Args:
        network: static; networks of equal config share one program for each shape.
        params: of that network, on any mesh.
        inputs: tokens i32[B, S], lengths i32[B].
        choices: tokens i32[B, C, T], EOS included, lengths i32[B, C].

    Returns:
        f32[B, C]; 0 for a choice of length 0, which `predict` never takes.
    """
    return network.target_log_probs(params, inputs, choices).sum(axis=-1)


def padded_lengths(lengths: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Lengths of each row's choices as i64[B, C]; 1 for an empty choice, and behind a row's last one."""
    table = np.ones((len(lengths), width), np.int64)
    for row, own in zip(table, lengths, strict=True):
        row[:len(own)] = np.maximum(own, 1)
    return table


def score_errors(scores: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """Error f64[B, C] that float32 may have made in sums f32[B, C] of log-probabilities.

    Args:
        scores: sums over a choice's tokens.
        lengths: i32[B, C], numbers of tokens, each at least 1; None takes a token for each unit of the score.
    """
    size = np.abs(np.asarray(scores, np.float64))
    lengths = np.maximum(1.0, size) if lengths is None else np.asarray(lengths, np.float64)
    token = TOKEN_ERROR * np.maximum(1.0, size / lengths)
    return token * np.sqrt(lengths) + ROUNDING * size * np.log2(2 * lengths)


def predict(scores: np.ndarray, num_choices: np.ndarray, errors: np.ndarray | None = None) -> np.ndarray:
    """Position i32[B] of the best choice; among equal ones the first.

    Two choices of the same tokens score the same up to float32's last digits, which depend on the
    batch; what float32 cannot tell apart is a tie, so that the answer does not depend on them too.

    Args:
        scores: f32[B, C].
        num_choices: i32[B], each at least 1; further scores are padding.
        errors: f64[B, C], of each score; None for those of `score_errors`.
    """
    errors = score_errors(scores) if errors is None else errors
    scores = np.asarray(scores, np.float64)
    real = np.arange(scores.shape[1])[None, :] < np.asarray(num_choices)[:, None]
    scores = np.where(real, scores, -np.inf)
    best = scores.argmax(axis=1)[:, None]
    lowest = np.take_along_axis(scores - errors, best, axis=1)
    return (scores + errors >= lowest).argmax(axis=1).astype(np.int32)


def accuracy_of_scores(
    targets: Sequence[Mapping[str, Any]], scores: Sequence[float]
) -> dict[str, float]:
    """Mean credit, in percent, of the choices that rank first; a SeqIO score metric.

    A row of which a choice is missing, because a limit on the number of examples cut it off, does
    not count; ``rows`` says how many do. Without any the accuracy is NaN: an error would take the
    metrics of all tasks behind this one with it, and SeqIO's evaluator would not even say so.

    Args:
        targets: one for each choice of each row, with the row's ``index``, the choice's ``place``, its
            ``credit`` (1 where it is right), its ``length`` in tokens, and the row's ``num_choices``.
        scores: the choices' log-probabilities.
    """
    rows: dict[int, dict[int, tuple[float, int, float]]] = defaultdict(dict)
    sizes = {}
    for target, score in zip(targets, scores, strict=True):
        rows[target["index"]][target["place"]] = (float(score), target["length"], target["credit"])
        sizes[target["index"]] = target["num_choices"]
    whole = [index for index, found in rows.items() if len(found) == sizes[index]]
    if not whole:
        return {"accuracy": float("nan"), "rows": 0}
    counts = np.asarray([sizes[index] for index in whole])
    table = np.zeros((3, len(whole), counts.max())) + np.array([0.0, 1.0, 0.0])[:, None, None]
    for number, index in enumerate(whole):
        for place in range(counts[number]):
            table[:, number, place] = rows[index][place]
    found, lengths, credit = table
    best = predict(found, counts, score_errors(found, lengths))
    return {"accuracy": 100.0 * float(np.take_along_axis(credit, best[:, None], axis=1).mean()),
            "rows": len(whole)}
