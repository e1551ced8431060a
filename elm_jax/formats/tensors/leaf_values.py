"""Checks the values of leaves: finite ones only, and none beyond what a narrower type holds."""

from typing import Any

import ml_dtypes
import numpy as np

from elm_jax.errors import InputError, describe

_BLOCK = 1 << 16
"""Elements that are looked at together; they stay in the processor's cache."""


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of a floating-point type holds neither NaN nor infinity; looks at its bits."""
    bits = array.view(f"u{array.dtype.itemsize}").reshape(-1, order="A")
    infinity = np.asarray(np.inf, array.dtype).view(bits.dtype)
    sizes = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)  # without the sign
    return all(np.max(bits[start:start + _BLOCK] & sizes) < infinity
               for start in range(0, bits.size, _BLOCK))


def check_finite(array: np.ndarray, leaf: str, where: Any) -> None:
    """Raises InputError if a leaf, or a part of it, holds NaN or infinity.

    Args:
        array: of a floating-point type.
        leaf: its name.
        where: the file or folder that it comes from.
    """
    if not all_finite(array):
        raise InputError(describe("A value is not finite", where=f"leaf {leaf} of {where}",
                                  got="NaN or infinity", expected="finite values in every leaf",
                                  cure="train, fetch or write it again"))


def cast_leaf(array: np.ndarray, dtype: Any, leaf: str, where: Any) -> np.ndarray:
    """Casts a leaf, or a part of it, to another floating-point type, rounded to nearest.

    Args:
        array: of a floating-point type; NaN and infinity stay what they are.
        dtype: to cast to; an array that has it is returned itself.
        leaf: its name, for the error.
        where: the file or folder that it comes from, for the error.

    Raises:
        InputError: a finite value that the type does not hold.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    # Two types of one range, or a wider one, need no second look.
    if float(ml_dtypes.finfo(dtype).max) >= float(ml_dtypes.finfo(array.dtype).max) or all_finite(cast):
        return cast
    sizes = np.abs(array.astype(np.float64))
    largest = np.max(sizes, where=np.isfinite(sizes), initial=0.0)
    with np.errstate(over="ignore"):
        fits = np.isfinite(np.float64(largest).astype(dtype))
    if fits:  # what is not finite was not so before
        return cast
    raise InputError(describe(
        f"A value is too large for {dtype.name}", where=f"leaf {leaf} of {where}", got=f"{largest:g}",
        expected=f"at most {float(ml_dtypes.finfo(dtype).max):g}, which {dtype.name} holds",
        cure="cast to bfloat16 or float32, or not at all"))


def read_float32(array: np.ndarray, leaf: str, where: Any) -> np.ndarray:
    """Returns a leaf that was read, or a part of it, in float32.

    Raises:
        InputError: a value that is not finite, or too large for float32.
    """
    check_finite(array, leaf, where)
    return cast_leaf(array, np.float32, leaf, where)
