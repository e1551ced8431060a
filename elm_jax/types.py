"""Type aliases that name the intent of a value; shapes are given where an alias is used."""

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
    """Special token ids of a family of networks: padding, EOS, start.

    Attributes:
        pad: fills rows up; it may be a real token as well.
        eos: ends a text.
        start: begins a target; None where a target follows its prompt.
        bos: stands in front of every prompt; None for none.
    """

    pad: int
    eos: int
    start: int | None
    bos: int | None = None


class Padded(NamedTuple):
    """Rows of tokens, padded to one length.

    Attributes:
        tokens: i32[..., L].
        lengths: i32[...], number of real tokens in each row; the rest is padding, whatever its id.
        states: of the tokens, above frozen lower layers, as `models.network.Trunk.trunk_of_choices` gives
            them; None: the network computes them.
        tasks: i32[B], numbers of the rows' tasks, of inputs to a network whose gates read them; None for
            others.
    """

    tokens: Array
    lengths: Array
    states: Array | None = None
    tasks: Array | None = None
