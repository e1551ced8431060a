"""Values that the backward pass computes again instead of keeping them from the forward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.types import Array


def recomputed(num_tied: int) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Decorates a function of whose values only the arguments are to be kept for its gradient.

    `jax.checkpoint` says the same, but XLA's CPU backend removes its barriers early, finds the two
    computations equal, and keeps the first one's values after all. Here the second one's arguments
    depend on the gradient that comes in, by a choice that never changes a finite run.

    Args:
        num_tied: how many of the leading arguments are tied to the gradient: arrays with as many
            axes as the result. The decorated function has no forward-mode derivative.
    """

    def decorate(function: Callable[..., Array]) -> Callable[..., Array]:
        @jax.custom_vjp
        @functools.wraps(function)
        def call(*arguments: Any) -> Array:
            return function(*arguments)

        def forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
            return function(*arguments), arguments

        def backward(arguments: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
            tied = [_tie(argument, gradient) for argument in arguments[:num_tied]]
            _, pull = jax.vjp(function, *tied, *arguments[num_tied:])
            return pull(gradient)

        call.defvjp(forward, backward)
        return call

    return decorate


def _tie(argument: Array, gradient: Array) -> Array:
    """The argument, or the gradient where that is not a number; axes of other sizes share one."""
    starts = tuple(
        slice(None) if size == other else slice(1)
        for size, other in zip(argument.shape, gradient.shape, strict=True)
    )
    gradient = gradient[starts].astype(argument.dtype)
    return jnp.where(jnp.isnan(gradient), gradient, argument)
