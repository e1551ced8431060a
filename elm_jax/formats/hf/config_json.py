"""Functions on ``config.json`` that Hugging Face folders of all networks share."""

from collections.abc import Mapping

import numpy as np

from elm_jax.formats.model import TensorSpec

CONFIG_FILE = "config.json"
DEFAULT_SHARD_BYTES = 5e9
"""Most bytes of a file of weights."""


def main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype of most elements of a model's tensors."""
    counts: dict[str, int] = {}
    for spec in specs.values():
        counts[spec.dtype] = counts.get(spec.dtype, 0) + int(np.prod(spec.shape, dtype=np.int64))
    return max(counts, key=counts.__getitem__)
