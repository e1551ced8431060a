"""Rematerialisation: values that the backward pass recomputes instead of keeping them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.types import Array


def recomputed(num_tied: int) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Decorates a function of arrays so that its gradient keeps only the arguments and recomputes the rest.

    `jax.checkpoint` does the same, but XLA's CPU backend removes its barriers early, finds the two
    computations equal, and keeps the first one's values after all. Here the arguments of the second
    computation depend on the incoming gradient, by a `where` that changes no finite value.

    Args:
        num_tied: number of leading arguments f[...] that are tied to the gradient; each has as many axes
            as the result f[...].

    Returns:
        A decorator. The decorated function takes and returns the same arrays, and has no forward-mode
        derivative.
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
    """Returns the argument f[...], or the gradient where that is NaN; axes of unequal sizes use index 0."""
    starts = tuple(
        slice(None) if size == other else slice(1)
        for size, other in zip(argument.shape, gradient.shape, strict=True)
    )
    gradient = gradient[starts].astype(argument.dtype)
    return jnp.where(jnp.isnan(gradient), gradient, argument)
