"""Searches the weights of a merge: by gradient, or by evolution of a population scored in one program.

An objective to minimise is a hashable callable ``(weights f[E], data) -> f32[]``; it is a static argument of
jit, its data are not. The search moves a point in R^E, and a space maps points f[E] to weights f[E]; the
origin always maps to equal weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from elm_jax.errors import RunError, describe, unknown_name
from elm_jax.types import Array

Objective = Callable[[Array, Any], Array]
ADAM = optax.scale_by_adam()
SMOOTHING = 0.5
"""Share of the old spread in the next generation's: few samples estimate a spread badly."""
ELITE = 4
"""The best 1 / ELITE of a population sets the next distribution."""


def _simplex(point: Array) -> Array:
    return jax.nn.softmax(point)


def _plane(point: Array) -> Array:
    return point - jnp.mean(point, keepdims=True) + 1.0 / point.shape[0]


def _free(point: Array) -> Array:
    return point + 1.0 / point.shape[0]


SPACES: dict[str, Callable[[Array], Array]] = {"simplex": _simplex, "plane": _plane, "free": _free}
"""Maps from points f[E] to weights f[E]: none negative and of sum 1; any sign and of sum 1; any."""
SPREADS = {"simplex": 1.0, "plane": 0.3, "free": 0.3}
"""Standard deviation of the first generation, of each coordinate of the point."""


def get_space(name: str) -> Callable[[Array], Array]:
    """Returns the map from points f[E] to weights f[E] of a space; an unknown name is an InputError."""
    if name not in SPACES:
        raise unknown_name("space of weights", name, SPACES)
    return SPACES[name]


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a weight search.

    Attributes:
        weights: the best weights that were scored, the start's equal weights included.
        objective: of these weights.
        start: the objective of equal weights.
        history: the objective a step; of a population, the smallest of each generation.
        evaluations: how often the objective was computed.
    """

    weights: tuple[float, ...]
    objective: float
    start: float
    history: tuple[float, ...]
    evaluations: int


@functools.partial(jax.jit, static_argnames=("objective", "at_once"))
def score_population(objective: Objective, population: Array, data: Any, at_once: int | None = None) -> Array:
    """Computes the objective f32[P] of P weight vectors f32[P, E] in one program.

    Args:
        objective: static.
        population: f32[P, E].
        data: what the objective needs.
        at_once: number of vectors that are scored in parallel, the others in turn; None for all. Static.

    Returns:
        f32[P].
    """
    return jax.lax.map(lambda weights: objective(weights, data), population,
                       batch_size=at_once or population.shape[0])


def by_gradient(objective: Objective, data: Any, count: int, *, space: str, steps: int, learning_rate: float,
                report: Callable[[int, float], None] | None = None) -> Found:
    """Searches weights with Adam on the objective's gradient, from equal weights.

    Args:
        objective: differentiable in the weights.
        data: what the objective needs.
        count: E.
        space: of the weights.
        steps: updates; the objective is computed once more than that.
        learning_rate: of Adam, in the point's units, the same at every step.
        report: called with the step and its objective.

    Returns:
        The best weights of all steps, not the last ones.

    Raises:
        RunError: an objective or a gradient that is not finite.

    Source: Yang et al., https://arxiv.org/abs/2310.02575, section 3.2.2.
    """
    point = np.zeros(count, np.float32)
    state, history, seen = jax.device_get(ADAM.init(point)), [], []
    rate = jnp.float32(learning_rate)
    for step in range(steps + 1):
        # Between steps all is on the host, so every step uses the first one's program, wherever the data are.
        weights, value, after, state = jax.device_get(
            _gradient_step(objective, get_space(space), point, state, rate, data))
        history.append(float(value))
        seen.append(weights)
        last = step == steps
        if not (math.isfinite(history[-1]) and (last or np.isfinite(after).all())):
            raise RunError(describe("The search's objective or its gradient is not finite",
                                    where=f"step {step}", got=f"{history[-1]} at weights {seen[-1].tolist()}",
                                    cure="look at the experts' weights, or lower the learning rate"))
        if report is not None:
            report(step, history[-1])
        point = after
    best = int(np.argmin(history))
    return Found(_as_tuple(seen[best]), history[best], history[0], tuple(history), steps + 1)


@functools.partial(jax.jit, static_argnames=("objective", "space"))
def _gradient_step(objective: Objective, space: Callable[[Array], Array], point: Array, state: optax.OptState,
                   rate: Array, data: Any) -> tuple[Array, Array, Array, optax.OptState]:
    """One Adam step: the point's weights f[E] and objective f32[], the next point f[E], Adam's next state."""
    value, gradient = jax.value_and_grad(lambda point: objective(space(point), data))(point)
    direction, state = ADAM.update(gradient, state)
    return space(point), value, point - rate * direction, state


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Settings of a search by evolution.

    Attributes:
        steps: generations.
        population: weight vectors a generation.
        seed: of all draws.
        at_once: see `score_population`.
    """

    steps: int
    population: int
    seed: int
    at_once: int | None = None


class Cloud(NamedTuple):
    """A normal distribution of points: its mean f32[E], and its standard deviation f32[E] by coordinate."""

    mean: Array
    spread: Array


def by_evolution(objective: Objective, data: Any, count: int, *, space: str, how: Evolution,
                 report: Callable[[int, float], None] | None = None) -> Found:
    """Searches weights by the cross-entropy method, a (mu, lambda) evolution strategy without gradients.

    Each generation is drawn from a normal distribution with a spread of its own for every coordinate, the
    distribution's mean itself being one of the drawn; the best quarter gives the next mean and, smoothed,
    the next spread. A generation is drawn, scored and learnt from in one compiled program. What is not
    finite counts as worst.

    Args:
        objective: need not be differentiable.
        data: what the objective needs.
        count: E.
        space: of the weights.
        how: the population is drawn and scored.
        report: called with the generation and its best objective.

    Returns:
        The best weights of all generations. The first generation holds equal weights.

    Raises:
        RunError: the objective of equal weights is not finite.

    Source: Rubinstein 1999, https://doi.org/10.1023/A:1010091220143; for merging by a population, Huang et
        al., https://arxiv.org/abs/2307.13269, section 3.3, with CMA-ES.
    """
    cloud = Cloud(np.zeros(count, np.float32), np.full(count, SPREADS[space], np.float32))
    key, history, start = jax.random.key(how.seed), [], math.nan
    best = (math.inf, np.full(count, 1.0 / count))
    for step in range(how.steps):
        weights, values, cloud = jax.device_get(_generation(
            objective, get_space(space), how.population, how.at_once, cloud, jax.random.fold_in(key, step),
            data))
        if step == 0:
            start = float(values[0])
            if not math.isfinite(start):
                raise RunError(describe("The search's objective is not finite at equal weights", got=start,
                                        cure="look at the experts' weights"))
        first = int(np.argmin(values))
        history.append(float(values[first]))
        best = min(best, (history[-1], weights[first]), key=lambda pair: pair[0])
        if report is not None:
            report(step, history[-1])
    return Found(_as_tuple(best[1]), best[0], start, tuple(history), how.steps * how.population)


@functools.partial(jax.jit, static_argnames=("objective", "space", "size", "at_once"))
def _generation(objective: Objective, space: Callable[[Array], Array], size: int, at_once: int | None,
                cloud: Cloud, key: Array, data: Any) -> tuple[Array, Array, Cloud]:
    """Weights f32[P, E], objectives f32[P] (infinite for what is not finite), the next distribution."""
    mean, spread = cloud
    noise = jax.random.normal(key, (size, mean.shape[0])).at[0].set(0.0)
    points = mean[None] + spread[None] * noise
    weights = jax.vmap(space)(points)
    values = score_population(objective, weights, data, at_once)
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    elite = points[jnp.argsort(values)[:max(1, size // ELITE)]]
    # About the old mean, not their own: if the best are on one side, the next step is as wide as this one.
    reach = jnp.sqrt(jnp.mean(jnp.square(elite - mean[None]), axis=0))
    spread = SMOOTHING * spread + (1.0 - SMOOTHING) * reach
    return weights, values, Cloud(jnp.mean(elite, axis=0), spread)


def _as_tuple(weights: np.ndarray) -> tuple[float, ...]:
    return tuple(float(weight) for weight in weights)
