"""The config of a decoder-only network: dimensions, norms, positions, special ids, adapters.

Frozen and hashable, so that a config can be a static argument of `jax.jit`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.adapters.carriers import with_layers_of
from elm_jax.models.adapters.config import adapter_of
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.layers.sparse_config import (
    SparseConfig,
    check_causal,
    check_layers,
    sparse_of,
    with_sparse,
)
from elm_jax.models.network import DTYPES
from elm_jax.runtime.config_checks import LARGEST_DIMENSION, check_dimension

ACTIVATIONS = ("gelu_tanh", "linear", "relu", "silu")
NORMS = ("layer", "rms")
POSITIONS = ("learned", "rotary")
ROPE_SCALINGS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies, for contexts longer than those of the first training.

    Attributes:
        kind: ``linear`` divides every frequency by `factor`; ``llama3`` divides only the low ones.
        factor: of the division.
        low_freq_factor, high_freq_factor: for ``llama3``: wavelengths above ``original_max_length /
            low_freq_factor`` are scaled, those below ``original_max_length / high_freq_factor`` are not, and
            between the two the change is gradual.
        original_max_length: for ``llama3``, the context of the first training.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self) -> None:
        """Raises InputError for an unknown kind or a number out of range."""
        if self.kind not in ROPE_SCALINGS:
            raise unknown_name("kind of rotary scaling", str(self.kind), ROPE_SCALINGS,
                               "DecoderConfig.rope_scaling")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_length"):
            _check_positive(f"rope_scaling.{name}", getattr(self, name))
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise _wrong("rope_scaling.low_freq_factor", self.low_freq_factor,
                         f"less than high_freq_factor, {self.high_freq_factor}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a decoder-only network.

    Llama type: the defaults. GPT-2: ``mlp_activations=('gelu_tanh',)``, ``norm='layer'``,
    ``position='learned'``, ``dense_bias=True``, ``tied_head=True``.

    Attributes:
        vocab_size: rows V of the embedding.
        emb_dim: model width D.
        num_heads: heads H of the queries.
        num_kv_heads: heads of keys and values, a divisor of H.
        head_dim: size K of one head; ``H * K`` need not equal D.
        mlp_dim: feed-forward width F.
        num_layers: layers.
        max_length: most positions of a row: prompt and target together.
        mlp_activations: one name for ``act(x wi) wo``, two for ``act(x wi_0) * act(x wi_1) wo``.
        norm: ``rms``, or ``layer`` with a bias.
        norm_epsilon: of every norm.
        position: ``rotary``, or ``learned`` rows that are added to the embedding.
        rope_base: of the rotary frequencies.
        rope_scaling: a `RopeScaling` or the dictionary of its fields; None for none.
        qkv_bias: biases on queries, keys and values.
        dense_bias: biases on every dense layer.
        qk_norm: RMS norms of each head of queries and keys, before the rotation.
        qk_norm_joined: the norms are of all heads together (OLMoE).
        tied_head: the head is the embedding; its logits are not scaled.
        dropout_rate: rate of every dropout.
        dtype: of the activations; parameters, softmax, norms, rotations and logits stay float32.
        adapter: config of a kind of adapter, as `AdapterConfig` builds it; None for a network without.
        sparse: experts in the place of some layers' feed-forward: a `SparseConfig` or the dictionary of its
            fields; None for a dense network.
        pad_id: fills rows up; may equal `eos_id`.
        eos_id: ends a text, and stands for a prompt without tokens where there is no `bos_id`.
        extra_eos_ids: further ids that end a generated text.
        bos_id: stands in front of every prompt; None for none.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    max_length: int
    mlp_activations: tuple[str, ...] = ("silu", "linear")
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    position: str = "rotary"
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    dense_bias: bool = False
    qk_norm: bool = False
    qk_norm_joined: bool = False
    tied_head: bool = False
    dropout_rate: float = 0.0
    dtype: str = "float32"
    adapter: AdapterKind | None = None
    pad_id: int = 0
    eos_id: int = 2
    extra_eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    sparse: SparseConfig | None = None

    family: ClassVar[str] = "decoder"
    start_id: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Checks types and ranges; lists become tuples, the dictionary of a scaling becomes one."""
        for name in ("mlp_activations", "extra_eos_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", _scaling_of(self.rope_scaling))
        for name in _REQUIRED:
            largest = _LARGEST.get(name, LARGEST_DIMENSION)
            check_dimension(f"DecoderConfig.{name}", getattr(self, name), largest)
        check_dimension("DecoderConfig.num_heads * DecoderConfig.head_dim", self.num_heads * self.head_dim)
        self._check_choices()
        self._check_numbers()
        self._check_ids()
        object.__setattr__(self, "adapter", with_layers_of(self.adapter, self.num_layers))
        object.__setattr__(self, "sparse", sparse_of(self.sparse))
        check_causal(self.sparse, "DecoderConfig.sparse")
        check_layers(self.sparse, self.num_layers, "DecoderConfig.sparse")

    def _check_choices(self) -> None:
        if not isinstance(self.mlp_activations, tuple) or len(self.mlp_activations) not in (1, 2):
            raise _wrong("mlp_activations", self.mlp_activations, "a tuple of one or two names")
        for activation in self.mlp_activations:
            if activation not in ACTIVATIONS:
                raise unknown_name("activation", str(activation), ACTIVATIONS,
                                   "DecoderConfig.mlp_activations")
        for name, known in (("norm", NORMS), ("position", POSITIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known, f"DecoderConfig.{name}")
        for name in ("qkv_bias", "dense_bias", "qk_norm", "qk_norm_joined", "tied_head"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.adapter is not None and not isinstance(self.adapter, AdapterKind):
            raise _wrong("adapter", self.adapter, "None or an AdapterConfig")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise _wrong("rope_scaling", self.rope_scaling, "None or the fields of a RopeScaling")

    def _check_numbers(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise _wrong("num_kv_heads", self.num_kv_heads, f"a divisor of num_heads, {self.num_heads}")
        rotary = self.position == "rotary"
        if rotary and self.head_dim % 2:
            raise _wrong("head_dim", self.head_dim, "an even number: rotary positions turn pairs")
        if not rotary and (self.rope_scaling is not None or self.qk_norm):
            raise _wrong("position", self.position, "'rotary', for a rope_scaling or a qk_norm")
        if self.qk_norm_joined and not self.qk_norm:
            raise _wrong("qk_norm_joined", True, "qk_norm=True beside it")
        for name in ("norm_epsilon", "rope_base"):
            _check_positive(name, getattr(self, name))
        rate = self.dropout_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
            raise _wrong("dropout_rate", rate, "a number in [0, 1)")

    def _check_ids(self) -> None:
        if not isinstance(self.extra_eos_ids, tuple):
            raise _wrong("extra_eos_ids", self.extra_eos_ids, "a tuple of ids")
        named = {"pad_id": self.pad_id, "eos_id": self.eos_id, **(
            {} if self.bos_id is None else {"bos_id": self.bos_id})}
        for name, number in [*named.items(), *(("extra_eos_ids", number) for number in self.extra_eos_ids)]:
            if type(number) is not int or not 0 <= number < self.vocab_size:
                raise _wrong(name, number, f"an id from 0 to {self.vocab_size - 1}")

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as a NumPy dtype."""
        return jnp.dtype(self.dtype)

    def with_adapter(self, adapter: AdapterKind | None) -> "DecoderConfig":
        """Returns the same config with other adapters, or with none."""
        return dataclasses.replace(self, adapter=adapter)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary. Inverse of `from_dict`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not self.qk_norm_joined:  # of most networks, and unknown to older versions
            del values["qk_norm_joined"]
        scaling = self.rope_scaling
        return with_sparse(self.sparse, {
            **values, "family": self.family, "mlp_activations": list(self.mlp_activations),
            "extra_eos_ids": list(self.extra_eos_ids),
            "rope_scaling": None if scaling is None else dataclasses.asdict(scaling),
            "adapter": None if self.adapter is None else self.adapter.to_dict()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Any = None) -> "DecoderConfig":
        """Builds a config from the dictionary that `to_dict` wrote, less its family.

        Args:
            values: the fields.
            where: the file that they come from, for the error.

        Raises:
            InputError: a field is unknown, missing or wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name("DecoderConfig field", name, known, where)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise InputError(describe("DecoderConfig lacks fields", where=where, expected=", ".join(missing)))
        try:
            return cls(**{**values, "adapter": adapter_of(values)})
        except InputError as error:
            if where is None:
                raise
            raise InputError(describe("The network's config is wrong", where=where,
                                      got=str(error))) from error


_REQUIRED = ("vocab_size", "emb_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "num_layers",
             "max_length")
_LARGEST = {"num_layers": 1024, "max_length": 1 << 24}
"""A config with larger values is damaged, and refused before a network is built."""


def _scaling_of(values: Mapping[str, Any]) -> RopeScaling:
    known = [field.name for field in dataclasses.fields(RopeScaling)]
    for name in values:
        if name not in known:
            raise unknown_name("field of a rotary scaling", str(name), known, "DecoderConfig.rope_scaling")
    if "kind" not in values or "factor" not in values:
        raise _wrong("rope_scaling", dict(values), "at least 'kind' and 'factor'")
    return RopeScaling(**values)


def _check_positive(field: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise _wrong(field, value, "a number above 0")


def _wrong(field: str, value: object, expected: str) -> InputError:
    return InputError(describe("The network's config is wrong", where=f"DecoderConfig.{field}",
                               got=repr(value)[:200], expected=expected))
