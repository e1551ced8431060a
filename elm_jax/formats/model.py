"""The common form of all model formats: a model whose tensors are read one at a time.

Each format (hf, t5x, elm) has a reader that gives a `Model` and a writer that takes one, so that n
formats need 2n pieces, not n². Tensors have this program's leaf names and shapes; a reader converts its
format's names, transpositions and stacked layers when a tensor is read.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (registers the name "bfloat16" with numpy)
import numpy as np

from elm_jax.formats import leaf_names
from elm_jax.models.network import NetworkConfig

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Dtypes that a stored parameter may have."""
Index = tuple[slice, ...]
"""A part of a tensor: a slice for each dimension."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor; the dtype is a name of numpy or ml_dtypes."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a leaf is stored in a checkpoint of another format.

    Attributes:
        name: the tensor's name there.
        transposed: whether its two dimensions are swapped against this program's.
        layer: place in a tensor that stacks all layers; None if the tensor is the leaf's own.
    """

    name: str
    transposed: bool = False
    layer: int | None = None


class Tensors(Protocol):
    """Tensors of a checkpoint by this program's leaf paths, in this program's orientation.

    Attributes:
        specs: of every leaf, known without reading contents.
        origins: where each leaf comes from.
    """

    specs: Mapping[str, TensorSpec]
    origins: Mapping[str, Origin]

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf, or a part of it (in the leaf's own dimensions), in its stored dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Model:
    """A full model whose tensors are read on request.

    Attributes:
        kind: format that it was read from: ``hf``, ``t5x`` or ``elm``.
        where: its folder, for errors and reports.
        config: its network.
        tensors: every leaf of that network, and no other.
        vocabulary: contents of its file (`Vocabulary.from_bytes`), None if the folder carries none.
        facts: what a format wants back when it is written again (Hugging Face's config fields that
            this program has no use for, the step of a T5X checkpoint); JSON-ready.
        beside: JSON files by name that a writer puts beside the weights.
        notes: what the reader assumed or left out, a sentence each, for the report.
        check: raises InputError if the contents are not those of which the folder records a fingerprint. A
            writer calls it when it has read all, before what it wrote gets its name: reading in the
            alphabet's order then costs no second pass.
    """

    kind: str
    where: str
    config: NetworkConfig
    tensors: Tensors
    vocabulary: bytes | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        """The model's name for users (see `leaf_names.name_of`)."""
        return leaf_names.name_of(self.where)

    @property
    def address(self) -> str:
        """The address that finds the model again (see `leaf_names.address_of`)."""
        return leaf_names.address_of(self.where)
