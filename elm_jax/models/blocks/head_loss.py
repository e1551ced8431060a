"""Cross-entropy of a head, some positions at a time, and only those that carry weight.

The logits of a whole batch never exist together. If the head is frozen, the forward pass computes the
gradient of its inputs while the logits are at hand, and leaves out positions without weight.
Source of the idea: Hsu et al., https://arxiv.org/abs/2410.10989 (fused linear cross-entropy).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.models.layers.dense import LOGITS_PRECISION
from elm_jax.models.losses import LossConfig, LossSums, token_cross_entropy
from elm_jax.runtime import sharding
from elm_jax.types import Array

LEAST_LOGITS = 1 << 22
"""Fewer logits than these (16 MiB) are computed at once."""
LEAST_ROWS = 128
"""Tokens of a part, at least: each part reads the head twice."""


def num_parts(batch: int, length: int, vocabulary: int) -> int:
    """Number of parts into which the positions of rows [B, L] are cut; 1 for few logits.

    It is 1 on a mesh too: there logits are split over the devices.
    """
    if batch * length * vocabulary < LEAST_LOGITS or sharding.num_placed() > 1:
        return 1
    return max(1, batch * length // LEAST_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_cross_entropy(sides: str, config: LossConfig, states: Array, head: Array, targets: Array,
                       weights: Array) -> LossSums:
    """Computes loss sums f32[] of the logits ``states . head``, as `losses.token_cross_entropy` has them.

    Args:
        sides: axes of the head: ``vd``, or ``dv``.
        config: smoothing and z-loss.
        states: f[B, L, D].
        head: f[V, D], or f[D, V].
        targets: i32[B, L].
        weights: f32[B, L]; they get no gradient.
    """
    return token_cross_entropy(_logits(sides, states, head), targets, weights, config)


def _logits(sides: str, states: Array, head: Array) -> Array:
    return jnp.einsum(f"...d,{sides}->...v", states.astype(jnp.float32), head, precision=LOGITS_PRECISION)


def _forward(sides: str, config: LossConfig, *arguments: Any) -> tuple[LossSums, Any]:
    """Loss sums, and what the backward pass needs: a gradient f[B, L, D], or a function that pulls back."""
    states, head, targets, weights = (argument.value for argument in arguments)
    if arguments[1].perturbed:
        return jax.vjp(lambda states, head: token_cross_entropy(
            _logits(sides, states, head), targets, weights, config), states, head)
    sums, gradient = _in_parts(sides, config, head, states, targets, weights)
    return sums, gradient.astype(states.dtype)


def _in_parts(sides: str, config: LossConfig, head: Array, states: Array, targets: Array, weights: Array
              ) -> tuple[LossSums, Array]:
    """Loss sums f32[] of rows, and the gradient f32[B, L, D] of the sum of their losses, part by part."""
    parts = num_parts(*targets.shape, head.shape[sides.index("v")])
    given = states.reshape(-1, states.shape[-1]), targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    # Positions with weight come first, so that the last parts have none; the number of places is filled up.
    order = jnp.argsort(given[2] == 0, stable=True)
    count = order.size
    order = jnp.pad(order, (0, -count % parts), constant_values=count)

    def part(places: Array) -> tuple[LossSums, Array]:
        own = [jnp.take(array, places, axis=0, mode="fill", fill_value=0) for array in given]
        compute = functools.partial(_part, sides, config, head)
        shapes = jax.eval_shape(compute, *own)
        return jax.lax.cond(_any_of(own[2] != 0), compute, lambda *_: _zeros(shapes), *own)

    sums, found = jax.lax.map(part, order.reshape(parts, -1))
    gradient = jnp.zeros(given[0].shape, jnp.float32).at[order].set(
        found.reshape(-1, states.shape[-1]), mode="drop")
    return jax.tree.map(lambda each: each.sum(axis=0), sums), gradient.reshape(states.shape)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


@jax.custom_batching.custom_vmap
def _any_of(flags: Array) -> Array:
    """Whether any of bool[...] is true; mapped over experts, any of all, so that all take one branch."""
    return jnp.any(flags)


@_any_of.def_vmap
def _any_of_all(axis_size: int, in_batched: list[bool], flags: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _any_of(flags), False


def _part(sides: str, config: LossConfig, head: Array, states: Array, targets: Array, weights: Array
          ) -> tuple[LossSums, Array]:
    """Loss sums f32[] of tokens f[N, D], and the gradient f32[N, D] of the sum of their losses."""
    logits = _logits(sides, states, head)
    size = logits.shape[-1]
    largest = logits.max(axis=-1, keepdims=True)
    powers = jnp.exp(logits - largest)
    denominator = powers.sum(axis=-1, keepdims=True)
    log_z = (jnp.log(denominator) + largest)[:, 0]
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
    hit = vocabulary == targets[:, None]
    own = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    # The first of the largest, as argmax has it, which XLA's CPU backend computes far more slowly.
    best = jnp.where(logits == largest, vocabulary, size).min(axis=-1)
    even, z_loss = config.label_smoothing, config.z_loss
    loss = log_z - (1.0 - even) * own
    if even:
        loss = loss - even * jnp.mean(logits, axis=-1)
    slope = weights * (1.0 + 2.0 * z_loss * log_z)
    gradient = powers * (slope[:, None] / denominator) - jnp.where(
        hit, ((1.0 - even) * weights)[:, None], 0.0)
    if even:
        gradient = gradient - (even / size) * weights[:, None]
    gradient = jnp.einsum(f"nv,{sides}->nd", gradient, head, precision=LOGITS_PRECISION)
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return LossSums(jnp.sum(loss * weights), jnp.sum(weights), jnp.sum((best == targets) * weights)), gradient


def _backward(sides: str, config: LossConfig, kept: Any, sums: LossSums) -> tuple[Any, ...]:
    del sides, config
    if not isinstance(kept, jax.Array | jax.core.Tracer):
        return *kept(jax.tree.map(_instantiated, sums, is_leaf=_is_zero)), None, None
    return kept * _instantiated(sums.loss).astype(kept.dtype), None, None, None


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _instantiated(leaf: Any) -> Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf


head_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
