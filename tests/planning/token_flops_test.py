"""Operations a token, against what XLA counts in compiled programs, and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from elm_jax.models import families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.t5.config import T5Config
from elm_jax.planning.token_flops import token_cost
from elm_jax.runtime import trees

T5 = T5Config(vocab_size=1500, emb_dim=256, num_heads=5, head_dim=48, mlp_dim=700, num_encoder_layers=2,
              num_decoder_layers=3)
TIED = dataclasses.replace(T5, logits_via_embedding=True, mlp_activations=("relu",))
DECODER = DecoderConfig(vocab_size=1500, emb_dim=256, num_heads=8, num_kv_heads=2, head_dim=32, mlp_dim=700,
                        num_layers=3, max_length=512)
S, T, ROWS = 128, 64, 2


@pytest.mark.parametrize("config", [T5, TIED], ids=["untied", "tied"])
def test_a_dense_network_costs_what_xla_counts(config):
    network = families.network_of(config)
    batch = {name: jax.ShapeDtypeStruct((ROWS, length), jnp.int32) for name, length in (
        ("encoder_input_tokens", S), ("decoder_input_tokens", T))}
    counted = jax.jit(network.logits).lower(network.abstract_params(), batch).compile()
    found = token_cost(network, S, T)
    assert found.flops * ROWS * (S + T) == pytest.approx(counted.cost_analysis()["flops"], rel=0.05)
    assert found.total == found.active == trees.count(network.abstract_params())


def test_a_decoder_costs_its_kernels_and_its_attention():
    found = token_cost(families.network_of(DECODER), S, T)
    kernels = sum(leaf.size for path, leaf in trees.flatten(
        families.network_of(DECODER).abstract_params()).items() if path.endswith("kernel"))
    head = 0 if not DECODER.tied_head else 1500 * 256
    attention = DECODER.num_layers * (S + T) * 8 * 32
    assert found.flops == pytest.approx(2 * (kernels + head + attention))


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_sparse_network_costs_its_router_and_the_experts_that_a_token_has(chosen):
    sparse = dataclasses.replace(T5, sparse=SparseConfig(num_experts=8, experts_per_token=chosen, step=1))
    dense, found = token_cost(families.network_of(T5), S, T), token_cost(families.network_of(sparse), S, T)
    mlp, router = 3 * 256 * 700, 256 * 8
    assert found.total - dense.total == 5 * (7 * mlp + router)
    assert found.active - dense.active == 5 * ((chosen - 1) * mlp + router)
    tokens = 2 * S + 3 * T
    assert (found.flops - dense.flops) * (S + T) == pytest.approx(
        2 * tokens * ((chosen - 1) * mlp + router))
