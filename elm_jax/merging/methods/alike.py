"""Checks that parameter trees have the same leaves, so that they can be merged."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from elm_jax.errors import InputError, describe

MOST_FAULTS = 50
"""Most leaves that an error lists."""


def check_alike(experts: Sequence[Mapping[str, Any]], names: Sequence[str], *, dtypes: bool = True) -> None:
    """Raises InputError unless flat trees have the same leaves, all of a floating-point type.

    Args:
        experts: by leaf, anything with a shape and a dtype.
        names: of the experts, for the error.
        dtypes: whether dtypes must be equal too.

    Raises:
        InputError: names every leaf that differs.
    """
    first = experts[0]
    faults = [f"{path} of {names[0]} is {leaf.dtype}, no floating point"
              for path, leaf in sorted(first.items()) if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    for name, other in zip(names[1:], experts[1:], strict=True):
        faults += [f"{path} is missing from {name}" for path in sorted(first.keys() - other.keys())]
        faults += [f"{path} is missing from {names[0]}" for path in sorted(other.keys() - first.keys())]
        faults += [f"{path} is {_form(first[path])} in {names[0]}, {_form(leaf)} in {name}"
                   for path, leaf in sorted(other.items())
                   if path in first and _form(leaf, dtypes) != _form(first[path], dtypes)]
    if faults:
        raise InputError(describe(
            "These cannot be merged: their leaves differ", where=", ".join(names),
            got="; ".join(faults[:MOST_FAULTS]) + (f"; and {len(faults) - MOST_FAULTS} more"
                                                   if len(faults) > MOST_FAULTS else ""),
            expected="the same leaves, shapes and floating-point types in all"))


def _form(leaf: Any, dtype: bool = True) -> str:
    return f"{list(leaf.shape)} {leaf.dtype}" if dtype else str(list(leaf.shape))
