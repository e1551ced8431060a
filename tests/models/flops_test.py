"""The operations that benchmarks/accelerator.py counts, against what XLA counts in the compiled programs."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest
from checkout import ROOT

from elm_jax.models import AdapterConfig, T5Config, T5Network
from elm_jax.types import Padded

FOLDER = ROOT / "benchmarks"
WIDE = T5Config(vocab_size=1500, emb_dim=256, num_heads=5, head_dim=48, mlp_dim=700, num_encoder_layers=2,
                num_decoder_layers=3)


@pytest.fixture(scope="module")
def accelerator():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("accelerator", FOLDER / "accelerator.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["accelerator"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def _padded(tokens):
    return Padded(tokens, jax.ShapeDtypeStruct(tokens.shape[:-1], jnp.int32))


def counted(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("adapter", [None, AdapterConfig(96)], ids=["bare", "adapters"])
def test_the_forward_pass(accelerator, adapter):
    network = T5Network(WIDE.with_adapter(adapter))
    rows, source, target, choices = 3, 128, 64, 5
    tokens = jax.ShapeDtypeStruct((rows, source), jnp.int32)
    batch = {"encoder_input_tokens": tokens,
             "decoder_input_tokens": jax.ShapeDtypeStruct((rows, target), jnp.int32)}
    params = network.abstract_params()
    expected = accelerator.forward_flops(network.config, rows, source, target)
    # XLA counts elementwise work too, and all of the causal attention where half of it is needed.
    assert expected == pytest.approx(counted(network.logits, params, batch), rel=0.05)
    places = jax.ShapeDtypeStruct((rows, choices, target), jnp.int32)
    expected = accelerator.forward_flops(network.config, rows, source, target, choices)
    assert expected == pytest.approx(counted(network.target_log_probs, params, _padded(tokens),
                                             _padded(places)),
                                     rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [False, True], ids=["full", "prompt"])
def test_a_training_step(accelerator, prompt):
    import dataclasses

    shapes = dataclasses.replace(accelerator.SHAPES["tiny"], config=WIDE, source=128, target=64)
    _, need = accelerator.training(shapes, "float32", prompt)
    # Above it: what the backward pass computes again (models/layers/recompute.py), and the optimiser.
    assert 0.8 < need["flops"] / need["compiled_flops"] < 1.02
