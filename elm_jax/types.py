"""Type aliases that say intent; shapes are given where an alias is used."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = dict[str, Any]
"""Nested dictionary of arrays, as Flax writes it."""
FlatParams: TypeAlias = dict[str, Any]
"""Dictionary from a leaf's path, ``encoder/layers_0/mlp/wo/kernel``, to its array."""
Batch: TypeAlias = Mapping[str, Array]
"""Arrays by feature name, all with the same leading axis B."""
