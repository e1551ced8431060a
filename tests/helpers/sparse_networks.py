"""Small sparse networks, batches that fit them, and dense networks of the same dimensions."""

import dataclasses

import family_rows as made
import weights

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.models import T5Config, families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import Layout, Network

LENGTHS = {"inputs": 10, "targets": 7}
T5 = T5Config(made.VOCAB_SIZE, 16, 2, 8, 32, 3, 2)
DECODER = DecoderConfig(made.VOCAB_SIZE, 24, 4, 2, 6, 32, 4, 64, pad_id=3)
CONFIGS = {"t5": T5, "decoder": DECODER}


def network(name: str = "t5", layout: Layout | None = None, **settings) -> Network:
    """A network of one of `CONFIGS` with sparse layers of these settings."""
    sparse = SparseConfig(**{"num_experts": 4, "experts_per_token": 2, **settings})
    return families.network_of(dataclasses.replace(CONFIGS[name], sparse=sparse), layout)


def parameters(net: Network, seed: int = 0):
    """Random parameters f32, none of them zero."""
    return weights.drawn(net, seed)


def batch_of(net: Network, rows: int = 8, seed: int = 0, lengths: dict[str, int] | None = None):
    """A batch of one example a row; its last row is padding."""
    return form_of(net).make(made.examples(net.config, rows - 1, seed), lengths or LENGTHS, rows)
