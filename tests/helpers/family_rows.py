"""A small config of every family of networks, and random rows that fit it."""

import functools

import numpy as np
import weights

from elm_jax.models import AdapterConfig, T5Config, families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.types import Padded

VOCAB_SIZE = 29
CONFIGS = {
    "t5 1.0, tied": T5Config(VOCAB_SIZE, 16, 2, 8, 32, 2, 1, mlp_activations=("relu",),
                             logits_via_embedding=True),
    "t5 1.1": T5Config(VOCAB_SIZE, 24, 3, 5, 40, 1, 2),
    "llama": DecoderConfig(VOCAB_SIZE, 24, 6, 2, 4, 32, 2, 64, rope_base=100.0, pad_id=3),
    "gpt2": DecoderConfig(VOCAB_SIZE, 16, 2, 2, 8, 32, 1, 64, mlp_activations=("gelu_tanh",), norm="layer",
                          position="learned", dense_bias=True, tied_head=True, pad_id=2),
    "sparse t5": T5Config(VOCAB_SIZE, 16, 2, 8, 32, 2, 2, sparse=SparseConfig(
        4, 2, normalize_gates=True, capacity_factor=1.0, dense_sublayer=True)),
    "sparse llama": DecoderConfig(VOCAB_SIZE, 24, 6, 2, 4, 32, 3, 64, pad_id=3, sparse=SparseConfig(
        3, capacity_factor=1.0, offset=1)),
}
"""Every row of `FAMILIES`, once or more."""
ADAPTERS = {"none": None, "bottleneck": AdapterConfig(4),
            "lora": AdapterConfig(kind="lora", rank=2, targets="all")}
LEFT_OUT = {("t5 1.0, tied", "lora"), ("gpt2", "bottleneck"), ("sparse t5", "lora")}
"""Pairs that other rows stand for, to save time."""
PAIRS = [(name, adapter) for name in CONFIGS for adapter in ADAPTERS if (name, adapter) not in LEFT_OUT]
"""Names of configs and of adapters."""


@functools.cache
def network_and_params(name: str, adapter: str = "none", seed: int = 0):
    """A network and parameters, none of them zero: fresh adapters would change nothing, or next to it."""
    network = families.network_of(CONFIGS[name].with_adapter(ADAPTERS[adapter]))
    return network, weights.drawn(network, seed)


def rows(config, shape: tuple[int, ...], length: int, seed: int = 0, least: int = 1) -> Padded:
    """Random rows of unequal lengths, without EOS; behind their ends stands padding."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(4, config.vocab_size, (*shape, length)).astype(np.int32)
    lengths = draw.integers(least, length + 1, shape).astype(np.int32)
    tokens[np.arange(length) >= lengths[..., None]] = config.pad_id
    return Padded(tokens, lengths)


def choices(config, batch: int, count: int, length: int, seed: int = 1) -> Padded:
    """Random choices that end with EOS, of unequal lengths."""
    found = rows(config, (batch, count), length, seed)
    np.put_along_axis(found.tokens, found.lengths[..., None] - 1, config.eos_id, axis=-1)
    return found


def examples(config, count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of inputs and targets as prepared arrays hold them: both end with EOS; id 0 is a token too."""
    draw = np.random.default_rng(seed)

    def one(most: int) -> np.ndarray:
        size = draw.integers(1, most)
        tokens = draw.integers(4, config.vocab_size, size)
        tokens[size // 2] = 0
        return np.append(tokens, config.eos_id).astype(np.int32)

    return [(one(9), one(6)) for _ in range(count)]
