"""The config of a T5 network: its dimensions, its generation (1.0 or 1.1), its adapters.

Frozen and hashable, so that a config can be a static argument of `jax.jit`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.adapters.bottleneck import bottleneck_of
from elm_jax.models.adapters.carriers import with_layers_of
from elm_jax.models.adapters.config import adapter_of
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.layers.sparse_config import SparseConfig, check_layers, sparse_of, with_sparse
from elm_jax.models.network import DTYPES
from elm_jax.runtime.config_checks import LARGEST_DIMENSION, check_dimension

ACTIVATIONS = ("gelu", "linear", "relu")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Dimensions of a T5 encoder-decoder.

    T5 1.1: ``mlp_activations=('gelu', 'linear')``, ``logits_via_embedding=False``.
    T5 1.0: ``mlp_activations=('relu',)``, ``logits_via_embedding=True``.

    Attributes:
        vocab_size: rows V of the embedding.
        emb_dim: model width D.
        num_heads: heads H.
        head_dim: size K of one head; ``H * K`` need not equal D.
        mlp_dim: feed-forward width F.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        mlp_activations: one name for ``act(x wi) wo``, two for ``act(x wi_0) * act(x wi_1) wo``.
        dropout_rate: rate of every dropout.
        logits_via_embedding: head tied to the embedding, logits scaled by ``D ** -0.5``.
        dtype: of the activations; parameters, softmax, norms and logits stay float32.
        relative_attention_num_buckets: rows of the relative position bias.
        relative_attention_max_distance: distances from here on share one bucket.
        adapter: config of a kind of adapter, as `AdapterConfig` builds it; None for a network without. The
            encoder's layers come first where it numbers layers.
        sparse: experts in the place of some layers' feed-forward: a `SparseConfig` or the dictionary of its
            fields; None for a dense network.
        family, pad_id, eos_id, start_id: T5's, whatever its size; padding is no token of a text.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    adapter: AdapterKind | None = None
    sparse: SparseConfig | None = None

    family: ClassVar[str] = "t5"
    pad_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    start_id: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Checks types and ranges; a list of activations becomes a tuple."""
        if isinstance(self.mlp_activations, list):
            object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in _DIMENSIONS:
            check_dimension(f"T5Config.{name}", getattr(self, name), _LARGEST.get(name, LARGEST_DIMENSION))
        check_dimension("T5Config.num_heads * T5Config.head_dim", self.num_heads * self.head_dim)
        self._check_choices()
        self._check_buckets()

    def _check_choices(self) -> None:
        if not isinstance(self.mlp_activations, tuple) or len(self.mlp_activations) not in (1, 2):
            raise _wrong("mlp_activations", self.mlp_activations, "a tuple of one or two names")
        for activation in self.mlp_activations:
            if activation not in ACTIVATIONS:
                raise unknown_name(
                    "activation", str(activation), ACTIVATIONS, "T5Config.mlp_activations"
                )
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", str(self.dtype), DTYPES, "T5Config.dtype")
        if not isinstance(self.logits_via_embedding, bool):
            raise _wrong("logits_via_embedding", self.logits_via_embedding, "True or False")
        rate = self.dropout_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
            raise _wrong("dropout_rate", rate, "a number in [0, 1)")
        if self.adapter is not None and not isinstance(self.adapter, AdapterKind):
            raise _wrong("adapter", self.adapter, "None or an AdapterConfig")
        object.__setattr__(self, "adapter", with_layers_of(self.adapter, self.num_layers))
        object.__setattr__(self, "sparse", sparse_of(self.sparse))
        check_layers(self.sparse, self.num_encoder_layers, "T5Config.sparse", self.num_decoder_layers)

    def _check_buckets(self) -> None:
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets % 4:
            raise _wrong("relative_attention_num_buckets", buckets, "a multiple of 4")
        if distance <= buckets // 2:
            raise _wrong(
                "relative_attention_max_distance", distance,
                f"more than {buckets // 2} (half of relative_attention_num_buckets)",
            )

    @property
    def bottleneck(self) -> int:
        """Width R of the bottleneck adapters.

        Raises:
            InputError: the network has none.
        """
        return bottleneck_of(self.adapter, self.emb_dim, "T5Config.adapter")

    @property
    def num_layers(self) -> int:
        """Layers of encoder and decoder together."""
        return self.num_encoder_layers + self.num_decoder_layers

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as a NumPy dtype."""
        return jnp.dtype(self.dtype)

    def with_adapter(self, adapter: AdapterKind | None) -> "T5Config":
        """Returns the same config with other adapters, or with none."""
        return dataclasses.replace(self, adapter=adapter)

    def with_dropout(self, rate: float) -> "T5Config":
        """Returns the same config with another dropout rate."""
        return dataclasses.replace(self, dropout_rate=rate)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary. Inverse of `from_dict`."""
        adapter = None if self.adapter is None else self.adapter.to_dict()
        return with_sparse(self.sparse, {**dataclasses.asdict(self), "adapter": adapter,
                                         "mlp_activations": list(self.mlp_activations)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Any = None) -> "T5Config":
        """Builds a config from the dictionary that `to_dict` wrote.

        Args:
            values: the fields.
            where: the file that they come from, for the error.

        Raises:
            InputError: a field is unknown, missing or wrong.
        """
        try:
            return cls._from_dict(values)
        except InputError as error:
            if where is None:
                raise
            raise InputError(describe("The network's config is wrong", where=where,
                                      got=str(error))) from error

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> "T5Config":
        if not isinstance(values, Mapping):
            raise InputError(describe("The network's config is wrong", got=repr(values)[:200],
                                      expected="an object with the fields of a T5Config"))
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name("T5Config field", name, known)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise InputError(describe("T5Config lacks fields", expected=", ".join(missing)))
        return cls(**{**values, "adapter": adapter_of(values)})


_REQUIRED = (
    "vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim",
    "num_encoder_layers", "num_decoder_layers",
)
_DIMENSIONS = (
    *_REQUIRED, "relative_attention_num_buckets", "relative_attention_max_distance"
)
_LARGEST = {"num_encoder_layers": 1024, "num_decoder_layers": 1024}
"""A config with larger values is damaged, and refused before a network is built."""


def _wrong(field: str, value: object, expected: str) -> InputError:
    return InputError(
        describe("The network's config is wrong", where=f"T5Config.{field}", got=repr(value)[:200],
                 expected=expected)
    )
