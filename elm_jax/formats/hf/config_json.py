"""Functions on ``config.json`` that Hugging Face folders of all networks share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.formats.model import TensorSpec

CONFIG_FILE = "config.json"
DEFAULT_SHARD_BYTES = 5e9
"""Most bytes of a file of weights."""


def check_unquantised(values: Mapping[str, Any], where: Any) -> None:
    """Raises InputError if a ``config.json`` says that weights are codes to be scaled, not values."""
    settings = values.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise InputError(describe(
            "The model's weights are quantised in a form that this program does not read", where=where,
            got=f"quantization_config: {method or settings!r}"[:200],
            expected="weights in bfloat16, float16 or float32, or unscaled float8",
            cure="load the model with transformers, dequantize() it, and save it; or take a GGUF file of it"))


def main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype of most elements of a model's tensors."""
    counts: dict[str, int] = {}
    for spec in specs.values():
        counts[spec.dtype] = counts.get(spec.dtype, 0) + int(np.prod(spec.shape, dtype=np.int64))
    return max(counts, key=counts.__getitem__)
