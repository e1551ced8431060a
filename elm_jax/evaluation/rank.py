"""Rank classification: the predicted answer is the choice of the largest log-probability.

A choice's score is the sum over its tokens INCLUDING the end token, without length normalisation, or, where
a setting says so, the mean over the same tokens (`per_token`). Source of the sum:
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

TIE = 1e-5
"""Scores so near to each other, relative to the best, are equal: what float32 cannot tell apart."""


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


def per_token(scores: np.ndarray, lengths: Sequence[Sequence[int]]) -> np.ndarray:
    """Divides scores f32[B, C] of choices by their numbers of tokens, end token included; returns f64[B, C].

    Args:
        scores: sums of log-probabilities; those behind a row's last choice are padding.
        lengths: of each row's choices, each at least 1.
    """
    divisors = np.ones(scores.shape)
    for row, own in zip(divisors, lengths, strict=True):
        row[:len(own)] = own
    return scores / divisors


def predict(scores: np.ndarray, num_choices: np.ndarray) -> np.ndarray:
    """Position i32[B] of the best choice; among equal ones the first.

    Two choices of the same tokens score the same up to float32's last digits, which depend on the
    batch; `TIE` keeps the answer from depending on them too.

    Args:
        scores: f32[B, C].
        num_choices: i32[B], each at least 1; further scores are padding.
    """
    scores = np.asarray(scores, np.float64)
    real = np.arange(scores.shape[1])[None, :] < np.asarray(num_choices)[:, None]
    scores = np.where(real, scores, -np.inf)
    best = scores.max(axis=1, keepdims=True)
    return (scores >= best - TIE * np.maximum(1.0, np.abs(best))).argmax(axis=1).astype(np.int32)


def accuracy_of_scores(
    targets: Sequence[Mapping[str, Any]], scores: Sequence[float]
) -> dict[str, float]:
    """Percentage of rows whose right choice ranks first; a SeqIO score metric.

    A row of which a choice is missing, because a limit on the number of examples cut it off, does
    not count; ``rows`` says how many do. Without any the accuracy is NaN: an error would take the
    metrics of all tasks behind this one with it, and SeqIO's evaluator would not even say so.

    Args:
        targets: one for each choice of each row, with the row's ``index``, the choice's ``place``, the
            ``right`` place and the row's ``num_choices``.
        scores: the choices' log-probabilities.
    """
    rows: dict[int, dict[int, float]] = defaultdict(dict)
    facts = {}
    for target, score in zip(targets, scores, strict=True):
        rows[target["index"]][target["place"]] = float(score)
        facts[target["index"]] = target
    whole = [index for index, found in rows.items() if len(found) == facts[index]["num_choices"]]
    if not whole:
        return {"accuracy": float("nan"), "rows": 0}
    counts = np.asarray([facts[index]["num_choices"] for index in whole])
    table = np.zeros((len(whole), counts.max()))
    for number, index in enumerate(whole):
        table[number, :counts[number]] = [rows[index][place] for place in range(counts[number])]
    right = np.asarray([facts[index]["right"] for index in whole])
    return {"accuracy": 100.0 * float(np.mean(predict(table, counts) == right)), "rows": len(whole)}
