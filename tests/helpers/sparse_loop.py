"""The sparse feed-forward as a loop over groups, choices and experts in float64: slow, plain, independent."""

import dataclasses
import math

import numpy as np

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "linear": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
}


@dataclasses.dataclass
class Found:
    """What the loop finds.

    Attributes:
        y: [B, L, D].
        gates: [B, L, E], weights of the choices; 0 elsewhere.
        kept: [B, L, E], which choices have a place.
        sums: as `RouterSums`, by name.
    """

    y: np.ndarray
    gates: np.ndarray
    kept: np.ndarray
    sums: dict[str, np.ndarray]

    def balance(self) -> float:
        """E * sum over experts of the share of choices times the mean probability."""
        tokens = self.sums["tokens"]
        shares = zip(self.sums["choices"], self.sums["probs"], strict=True)
        return len(self.sums["probs"]) * sum(one / tokens * (other / tokens) for one, other in shares)

    def z_loss(self) -> float:
        """Mean of the squared logsumexp."""
        return self.sums["z"] / self.sums["tokens"]


def as_float64(tree):
    if isinstance(tree, dict):
        return {name: as_float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def expert(params, number, activations, row):
    """One expert on one token: [D] -> [D]."""
    names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
    hidden = np.ones(())
    for name, activation in zip(names, activations, strict=True):
        hidden = hidden * ACTIVATIONS[activation](row @ params["expert"][name]["kernel"][number])
    return hidden @ params["expert"]["wo"]["kernel"][number]


def logits_of(params, gate, row, task):
    found = 0.0
    if gate in ("token", "both"):
        found = found + row @ params["router"]["router_weights"]["w"]["kernel"]
    if gate in ("task", "both"):
        found = found + task @ params["router"]["task_weights"]["w"]["kernel"]
    return found


def places_of(config, length, training):
    """The rule of capacity, written anew."""
    if config.capacity is not None:
        return min(config.capacity, length)
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return None
    if config.capacity_counts_choices:
        factor = factor * config.experts_per_token
    return min(max(-int(-factor * length // config.num_experts), config.min_capacity), length)


def fill_order(order, best, probs):
    """The (token, k) of a group in the order in which they get places; best: {token: [experts]}."""
    tokens = sorted(best)
    ranks = range(max((len(each) for each in best.values()), default=0))
    if order == "position":
        return [(token, k) for token in tokens for k in ranks]
    if order == "probability":
        tokens = sorted(tokens, key=lambda token: (-probs[token][best[token][0]], token))
    return [(token, k) for k in ranks for token in tokens]


def group_gates(config, probs, real, places):
    """Gates and kept choices [N, E] of one group, and how many choices each expert had."""
    length, experts = probs.shape
    gates, kept = np.zeros((length, experts)), np.zeros((length, experts), bool)
    if config.choice == "experts":
        for e in range(experts):
            ranked = sorted((n for n in range(length) if real[n]), key=lambda n: (-probs[n, e], n))
            for n in ranked[:places]:
                gates[n, e], kept[n, e] = probs[n, e], True
        if config.normalize_gates:
            gates = gates / np.where(kept.any(1), gates.sum(1), 1.0)[:, None]
        return gates, kept, kept.copy()
    best = {n: sorted(range(experts), key=lambda e: (-probs[n, e], e))[:config.experts_per_token]
            for n in range(length) if real[n]}
    chosen, filled = np.zeros((length, experts), bool), [0] * experts
    for n, k in fill_order(config.order, best, probs):
        e = best[n][k]
        chosen[n, e] = True
        gates[n, e] = probs[n, e] / (sum(probs[n, each] for each in best[n]) if config.normalize_gates else 1)
        kept[n, e] = places is None or filled[e] < places
        filled[e] += 1
    return gates, kept, chosen


def sparse_loop(x, params, config, activations, training, real=None, task=None, task_ids=None) -> Found:
    """Applies the layer to x [B, L, D].

    Args:
        x: [B, L, D].
        params: of `SparseMlp`, as nested dictionaries.
        config: a `SparseConfig`.
        activations: names.
        training: which capacity holds.
        real: bool[B, L].
        task: [B, D_t] or [B, L, D_t].
        task_ids: [B, L], for sums by task.
    """
    x, params = np.asarray(x, np.float64), as_float64(params)
    rows, length, _ = x.shape
    real = np.ones((rows, length), bool) if real is None else np.asarray(real)
    task = np.zeros((rows, length, 1)) if task is None else np.asarray(task, np.float64)
    task = task if task.ndim == 3 else np.repeat(task[:, None], length, axis=1)
    logits = np.stack([[logits_of(params, config.gate, x[b, n], task[b, n]) for n in range(length)]
                       for b in range(rows)])
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    gates, kept, chosen = (np.zeros(probs.shape, kind) for kind in (float, bool, bool))
    size = min(config.group_rows, rows)
    for first in range(0, rows, size):
        part = slice(first, first + size)
        shape = (-1, config.num_experts)
        places = places_of(config, size * length, training)
        if length == 1 and config.choice == "tokens":
            places = None
        found = group_gates(config, probs[part].reshape(shape), real[part].reshape(-1), places)
        for whole, own in zip((gates, kept, chosen), found, strict=True):
            whole[part] = own.reshape(whole[part].shape)
    y = np.zeros(x.shape)
    for b, n, e in zip(*np.nonzero(kept), strict=True):
        y[b, n] += gates[b, n, e] * expert(params, e, activations, x[b, n])
    sums = _sums(config, logits, probs, chosen, kept, real)
    if task_ids is not None:
        sums["by_task"] = np.zeros((len(config.tasks), config.num_experts))
        for b, n in zip(*np.nonzero(real & (np.asarray(task_ids) >= 0)), strict=True):
            sums["by_task"][task_ids[b][n]] += chosen[b, n]
    return Found(y, gates, kept, sums)


def _sums(config, logits, probs, chosen, kept, real):
    sums = {"choices": np.zeros(config.num_experts), "probs": np.zeros(config.num_experts),
            "tokens": 0.0, "dropped": 0.0, "z": 0.0, "entropy": 0.0}
    for b, n in zip(*np.nonzero(real), strict=True):
        sums["tokens"] += 1
        sums["choices"] += chosen[b, n]
        sums["probs"] += probs[b, n]
        sums["dropped"] += (chosen[b, n] & ~kept[b, n]).sum() if config.choice == "tokens" else (
            not kept[b, n].any())
        sums["z"] += (logits[b, n].max() + np.log(np.exp(logits[b, n] - logits[b, n].max()).sum())) ** 2
        sums["entropy"] -= (probs[b, n] * np.log(probs[b, n])).sum()
    return sums
