"""Gates of sparse layers: from the router's logits to each token's experts, weights and places."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elm_jax.models.layers.sparse_config import EXPERTS, POSITION, PROBABILITY, SparseConfig
from elm_jax.types import Array


class RouterSums(NamedTuple):
    """Sums over the real tokens of a batch that one sparse layer reports; those of two batches add.

    Attributes:
        choices: f32[E], choices of each expert before any is dropped: K a token.
        probs: f32[E], the router's probabilities.
        tokens: f32[], real tokens.
        dropped: f32[], choices without a place; in the choice by experts, tokens that none took.
        z: f32[], squared logsumexp of the logits.
        entropy: f32[], of the router's probabilities, in nats.
        by_task: f32[M, E], the choices by the tokens' tasks; None where tasks are not told apart.
    """

    choices: Array
    probs: Array
    tokens: Array
    dropped: Array
    z: Array
    entropy: Array
    by_task: Array | None = None


def router_sums(logits: Array, chosen: Array, kept: Array, real: Array) -> RouterSums:
    """Sums the report of a layer, all but `RouterSums.by_task`.

    Args:
        logits: f32[G, N, E].
        chosen: bool[G, N, E], the choices of each token.
        kept: bool[G, N, E], those that have a place.
        real: bool[G, N], tokens that are not padding.
    """
    weights = real.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    probs = jax.nn.softmax(logits, axis=-1)
    entropy = log_z - jnp.sum(probs * logits, axis=-1)
    chosen, kept = chosen & real[..., None], kept & real[..., None]
    return RouterSums(
        choices=chosen.sum((0, 1), dtype=jnp.float32), probs=jnp.einsum("gne,gn->e", probs, weights),
        tokens=weights.sum(), dropped=(chosen & ~kept).sum(dtype=jnp.float32),
        z=jnp.sum(jnp.square(log_z) * weights), entropy=jnp.sum(entropy * weights))


def choices_by_task(logits: Array, real: Array, task_ids: Array, config: SparseConfig, places: int | None
                    ) -> Array:
    """Counts choices f32[M, E] of each expert by the tokens' tasks, before any is dropped.

    Args:
        logits: f32[G, N, E].
        real: bool[G, N].
        task_ids: i32[G, N], numbers of tasks in `SparseConfig.tasks`; below 0 for a token of no task.
        config: of the layer.
        places: of an expert in a group, for the choice by experts.
    """
    if config.choice == EXPERTS:
        chosen = taken_of(choose_by_experts(logits, real, config, places), logits.shape[1])
    else:
        chosen = chosen_of(choose_by_tokens(logits, real, config, None), config.num_experts)[0]
    tasks = jax.nn.one_hot(task_ids, len(config.tasks))
    return jnp.einsum("gnm,gne->me", tasks, (chosen & real[..., None]).astype(jnp.float32))


class TokenChoices(NamedTuple):
    """The experts that tokens chose, best first.

    Attributes:
        experts: i32[G, N, K].
        gates: f32[G, N, K], weights of their outputs, also of choices without a place; 0 for padding.
        places: i32[G, N, K], number of the choice's place among those of its expert in the group.
        kept: bool[G, N, K], whether the choice has a place: a real token's, below the capacity.
    """

    experts: Array
    gates: Array
    places: Array
    kept: Array


class ExpertChoices(NamedTuple):
    """The tokens that experts chose, the likeliest first.

    Attributes:
        tokens: i32[G, E, C], places of the tokens in their group.
        gates: f32[G, E, C], weights of the expert's outputs; 0 where none is taken.
        taken: bool[G, E, C], whether the place holds a token: there may be fewer real ones.
    """

    tokens: Array
    gates: Array
    taken: Array


def capacity(config: SparseConfig, group_places: int, training: bool) -> int | None:
    """Places of an expert in a group: ``ceil(factor * N / E)``, times K if choices count; or a fixed number.

    Args:
        config: of the layer.
        group_places: places N of a group, padding included.
        training: which of the two factors holds.

    Returns:
        At most N (a token chooses an expert once); from a factor, at least `min_capacity`. None for no
        dropping.
    """
    if config.capacity is not None:
        return min(config.capacity, group_places)
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return None
    choices = group_places * (config.experts_per_token if config.capacity_counts_choices else 1)
    # 1.1 * 10 is 11.000000000000002 in floating point, and no more than 11 places
    places = math.ceil(round(factor * choices / config.num_experts, 9))
    return min(max(places, config.min_capacity), group_places)


def choose_by_tokens(logits: Array, real: Array, config: SparseConfig, places: int | None) -> TokenChoices:
    """Each real token takes its K likeliest experts; of equal ones the first.

    Args:
        logits: f32[G, N, E].
        real: bool[G, N], tokens that are not padding.
        config: K, gates, order.
        places: of an expert in a group; None: as many as are chosen.
    """
    probs, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.experts_per_token)
    gates = probs / probs.sum(axis=-1, keepdims=True) if config.normalize_gates else probs
    taken = jnp.broadcast_to(real[..., None], experts.shape)
    turns = _turns(probs, config.order)
    number = jax.vmap(_places, (0, 0, None if turns.ndim == 1 else 0, None))
    found = number(experts, taken, turns, config.num_experts)
    kept = taken if places is None else taken & (found < places)
    return TokenChoices(experts, jnp.where(taken, gates, 0.0), found, kept)


def choose_by_experts(logits: Array, real: Array, config: SparseConfig, places: int) -> ExpertChoices:
    """Each expert takes the real tokens that the router gives it most of, as many as it has places.

    Source: Zhou et al., https://arxiv.org/abs/2202.09368. Renormalised gates are divided by the sum of
    those of the experts that took the token.

    Args:
        logits: f32[G, N, E].
        real: bool[G, N].
        config: of the layer.
        places: C of each expert in a group, at most N.
    """
    probs = jnp.where(real[..., None], jax.nn.softmax(logits, axis=-1), 0.0)
    ranked = jnp.where(real[..., None], jax.lax.stop_gradient(probs), -1.0)
    best, tokens = jax.lax.top_k(ranked.swapaxes(1, 2), places)
    taken = best >= 0.0
    gates = jnp.where(taken, jnp.take_along_axis(probs.swapaxes(1, 2), tokens, axis=2), 0.0)
    if config.normalize_gates:
        groups = jnp.arange(logits.shape[0])[:, None, None]
        total = jnp.zeros(real.shape, gates.dtype).at[groups, tokens].add(gates)
        gates = jnp.where(taken, gates / jnp.where(taken, total[groups, tokens], 1.0), 0.0)
    return ExpertChoices(tokens, gates, taken)


def chosen_of(choices: TokenChoices, num_experts: int) -> tuple[Array, Array]:
    """Masks bool[G, N, E] of each token's choices, and of those that have a place."""
    mask = choices.experts[..., None] == jnp.arange(num_experts)[None, None, None]
    return mask.any(axis=2), (mask & choices.kept[..., None]).any(axis=2)


def taken_of(choices: ExpertChoices, group_places: int) -> Array:
    """Mask bool[G, N, E] of the experts that took each token."""
    groups, experts = (jnp.arange(size).reshape(shape) for size, shape in zip(
        choices.tokens.shape[:2], ((-1, 1, 1), (1, -1, 1)), strict=True))
    shape = (choices.tokens.shape[0], group_places, choices.tokens.shape[1])
    return jnp.zeros(shape, bool).at[groups, choices.tokens, experts].set(choices.taken)


def _turns(probs: Array, order: str) -> Array:
    """In which order a group's choices, numbered ``n * K + k``, get places: i32[NK] or i32[G, NK]."""
    length, experts_per_token = probs.shape[1:]
    if order == POSITION:
        return jnp.arange(length * experts_per_token)
    tokens = jnp.arange(length)
    if order == PROBABILITY:
        tokens = jnp.argsort(-jax.lax.stop_gradient(probs[..., 0]), axis=-1, stable=True)
    choices = jnp.arange(experts_per_token).reshape((-1, 1) if tokens.ndim == 1 else (1, -1, 1))
    turns = jnp.expand_dims(tokens, -2) * experts_per_token + choices
    return turns.reshape(*tokens.shape[:-1], -1)


def _places(experts: Array, taken: Array, turns: Array, num_experts: int) -> Array:
    """Numbers the choices i32[N, K] of each expert in the order of their turns: i32[N, K].

    By a stable sort, whose cost does not grow with E as that of a sum over one-hot rows does.
    """
    wanted = jnp.where(taken, experts, num_experts).reshape(-1)[turns]
    order = jnp.argsort(wanted, stable=True)
    wanted = wanted[order]
    starts = jnp.searchsorted(wanted, jnp.arange(num_experts + 1))
    numbers = jnp.arange(wanted.size) - starts[wanted]
    found = jnp.zeros(wanted.size, jnp.int32).at[turns[order]].set(
        numbers.astype(jnp.int32), unique_indices=True)
    return found.reshape(experts.shape)
