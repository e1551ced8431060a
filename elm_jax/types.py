"""Type aliases that say intent; shapes are given where an alias is used."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = dict[str, Any]
"""Nested dictionary of arrays, as Flax writes it."""
FlatParams: TypeAlias = dict[str, Any]
"""Dictionary from a leaf's path, ``encoder/layers_0/mlp/wo/kernel``, to its array."""
Batch: TypeAlias = Mapping[str, Array]
"""Arrays by feature name, all with the same leading axis B."""


class SpecialIds(NamedTuple):
    """Token ids that a family of networks sets apart.

    Attributes:
        pad: fills rows up; it may be a real token as well.
        eos: ends a text.
        start: begins a target; None where a target follows its prompt.
    """

    pad: int
    eos: int
    start: int | None


class Padded(NamedTuple):
    """Rows of tokens, filled up to one length.

    Attributes:
        tokens: i32[..., L].
        lengths: i32[...], how many tokens of each row count; what lies behind is padding, whatever its id.
    """

    tokens: Array
    lengths: Array
