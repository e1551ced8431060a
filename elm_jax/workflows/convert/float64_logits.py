"""Computes a function in float64 that was written for float32: what float32 rounds away is the difference."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Parameters in which an operation keeps a function that it calls once with its own arguments."""
_IDENTITIES = ("reduce_precision", "sharding_constraint", "optimization_barrier")


def in_float64(function: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Evaluates a function of one array as it is traced, with every floating-point number in float64.

    Its steps are those of the function in float32, constants included; roundings in between are left out. The
    arguments stay in their own dtype, and are widened where they are used, one at a time.

    Args:
        function: of trees of arrays; gives one array.
        arguments: its own.

    Returns:
        f64[...], the function's value.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    with jax.enable_x64(True):
        value, = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return np.asarray(_wide(value))


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Values of a traced function, operation by operation."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value_of(name: Any) -> Any:
        return name.val if isinstance(name, core.Literal) else known[name]

    for step in jaxpr.eqns:
        given = [_wide(value_of(name)) for name in step.invars]
        known |= zip(step.outvars, _applied(step, given), strict=True)
    return [value_of(name) for name in jaxpr.outvars]


def _applied(step: core.JaxprEqn, given: list[Any]) -> Sequence[Any]:
    """Results of one operation."""
    name, settings = step.primitive.name, step.params
    if name in _IDENTITIES:
        return given
    if name == "scan":
        return _scanned(settings, given)
    if name == "cond":
        branches = settings["branches"]
        branch = branches[int(np.clip(given[0], 0, len(branches) - 1))]
        return _evaluate(branch.jaxpr, branch.consts, given[1:])
    inner = next((settings[word] for word in _INNER if word in settings), None)
    if inner is not None:
        is_closed = isinstance(inner, core.ClosedJaxpr)
        return _evaluate(inner.jaxpr if is_closed else inner, inner.consts if is_closed else (), given)
    wide = {word: np.dtype(np.float64) if _is_narrow(value) else value for word, value in settings.items()}
    found = step.primitive.bind(*given, **wide)
    return found if step.primitive.multiple_results else [found]


def _scanned(settings: dict[str, Any], given: list[Any]) -> list[Any]:
    """Results of a loop over the leading axis, one turn after the other."""
    first, second = settings["num_consts"], settings["num_consts"] + settings["num_carry"]
    fixed, carried, rows = given[:first], given[first:second], given[second:]
    turns, kept = range(settings["length"]), []
    for turn in reversed(turns) if settings["reverse"] else turns:
        body = settings["jaxpr"]
        found = _evaluate(body.jaxpr, body.consts, [*fixed, *carried, *(row[turn] for row in rows)])
        carried, more = found[:settings["num_carry"]], found[settings["num_carry"]:]
        kept.append(more)
    kept = kept[::-1] if settings["reverse"] else kept
    return [*carried, *(jnp.stack(column) for column in zip(*kept, strict=True))]


def _is_narrow(value: Any) -> bool:
    """Whether a setting is a floating-point dtype."""
    return isinstance(value, np.dtype) and jnp.issubdtype(value, jnp.floating)


def _wide(value: Any) -> Any:
    """An array, in float64 if it is of a floating-point type."""
    array = jnp.asarray(value)
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
