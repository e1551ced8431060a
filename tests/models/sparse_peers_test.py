"""The sparse feed-forward is transformers' block: Switch, Mixtral, OLMoE, on the same random weights."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers.sparse_config import SparseConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
B, L, D, F, E = 3, 10, 8, 12, 4


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def block_of(module, name, **settings):
    """A block of transformers with random weights of some size, or a skip where this version lacks it."""
    found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    if not hasattr(found, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, settings.pop("config"))(**settings)
    torch.manual_seed(0)
    block = getattr(found, name)(config).eval()
    for weight in block.parameters():
        weight.data.copy_(torch.randn(weight.shape) * weight.shape[-1]**-0.5)
    return block


def inputs(length=L):
    return np.float32(np.random.default_rng(0).normal(size=(B, length, D)))


def run(block, x):
    """The block's output; older versions return the logits too."""
    with torch.no_grad():
        found = block(torch.tensor(x))
    return (found[0] if isinstance(found, tuple) else found).numpy()


def numpy_of(weight):
    return weight.detach().numpy()


def ours(params, config, activations, x, training=False):
    layer = SparseMlp(D, F, activations, 0.0, jnp.dtype("float32"), config)
    y, sown = layer.apply({"params": params}, x, not training, mutable=["router"])
    return y, sown["router"]["sums"]


def switch_params(block):
    """Leaves of `SparseMlp` with the weights of SwitchTransformersSparseMLP."""
    experts = [block.experts[f"expert_{number}"] for number in range(E)]
    kernels = {name: np.stack([numpy_of(getattr(each, name).weight).T for each in experts])
               for name in ("wi", "wo")}
    return {"router": {"router_weights": {"w": {"kernel": numpy_of(block.router.classifier.weight).T}}},
            "expert": {name: {"kernel": kernel} for name, kernel in kernels.items()}}


def switch_block(capacity):
    return block_of("switch_transformers", "SwitchTransformersSparseMLP", config="SwitchTransformersConfig",
                    d_model=D, d_ff=F, num_experts=E, expert_capacity=capacity, dropout_rate=0.0,
                    router_jitter_noise=0.0)


def require_right_switch():
    """transformers 5.0 to 5.17: the capacity bound nobody, and the gate was no probability (PR 48421)."""
    rows = np.any(run(switch_block(1), inputs()), axis=-1)
    assert np.all(rows.sum(axis=1) <= E) and rows.sum() < B * L, (
        "this version's Switch router is wrong: capacity 1 keeps more than one token an expert")


@pytest.mark.parametrize("capacity", [slow(1), 2, slow(3), 64])
def test_switch(capacity):
    """K = 1, raw gates, the capacity of a sequence, left to right."""
    require_right_switch()
    block, x = switch_block(capacity), inputs()
    # our capacity is a factor: L / E times it, rounded up
    config = SparseConfig(E, capacity_factor=capacity * E / L, min_capacity=1)
    y, sums = ours(switch_params(block), config, ("relu",), x, training=True)
    np.testing.assert_allclose(y, run(block, x), atol=1e-5)
    assert (sums.dropped > 0) == (capacity < 5)
    np.testing.assert_array_equal(np.any(y, -1), np.any(run(block, x), -1))


def fused_params(block):
    """Leaves of `SparseMlp` with the weights of Mixtral's and OLMoE's blocks."""
    both = numpy_of(block.experts.gate_up_proj).swapaxes(1, 2)
    kernels = {"wi_0": both[..., :F], "wi_1": both[..., F:],
               "wo": numpy_of(block.experts.down_proj).swapaxes(1, 2)}
    return {"router": {"router_weights": {"w": {"kernel": numpy_of(block.gate.weight).T}}},
            "expert": {name: {"kernel": kernel} for name, kernel in kernels.items()}}


@pytest.mark.parametrize("k", [slow(1), 2, slow(3)])
@pytest.mark.parametrize("length", [slow(1), L])
@pytest.mark.parametrize(("name", "normalize"), [("mixtral", True), ("olmoe", True), ("olmoe", False)])
def test_gated_blocks_without_capacity(name, normalize, length, k):
    """Mixtral: renormalised gates; OLMoE: either; whole rows and one-token steps."""
    settings = {"mixtral": ("MixtralSparseMoeBlock", {"config": "MixtralConfig", "num_local_experts": E}),
                "olmoe": ("OlmoeSparseMoeBlock", {"config": "OlmoeConfig", "num_experts": E,
                                                  "norm_topk_prob": normalize})}[name]
    block = block_of(name, settings[0], hidden_size=D, intermediate_size=F, num_experts_per_tok=k,
                     hidden_act="silu", **settings[1])
    if not hasattr(block.experts, "gate_up_proj"):
        pytest.skip(f"transformers {transformers.__version__} keeps these experts apart")
    config = SparseConfig(E, k, normalize_gates=normalize, capacity_factor=None)
    x = inputs(length)
    for training in (False, True):
        y, _ = ours(fused_params(block), config, ("silu", "linear"), x, training)
        np.testing.assert_allclose(y, run(block, x), atol=1e-5)
