"""The cross-entropy of a head in parts is that of all logits at once: sums and gradients."""

import family_rows as made
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.models.blocks import head_loss
from elm_jax.models.losses import LossConfig, token_cross_entropy
from elm_jax.runtime import trees

B, L, D, V = 3, 8, 5, 29


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(0)
    states, head = draw.normal(size=(B, L, D)), draw.normal(size=(V, D))
    head[7] = head[3]  # two equal logits: the first one counts as the likeliest
    targets = draw.integers(0, V, (B, L))
    best = np.argmax(states @ head.T, axis=-1)
    targets[0] = np.where(best[0] == 3, 7, best[0])
    targets[1] = best[1]
    weights = draw.integers(0, 2, (B, L)) * draw.random((B, L))
    return (jnp.float32(states), jnp.float32(head), jnp.int32(targets), jnp.float32(weights))


@pytest.mark.parametrize("sides", ["vd", "dv"])
@pytest.mark.parametrize("config", [LossConfig(), LossConfig(0.1, 0.01)], ids=str)
@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=str)
def test_parts_are_the_whole(given, monkeypatch, sides, config, trained):
    """Whether the head is frozen or trains, as a table or as a kernel."""
    monkeypatch.setattr(head_loss, "LEAST_LOGITS", 1)
    monkeypatch.setattr(head_loss, "LEAST_ROWS", 6)
    assert head_loss.num_parts(B, L, V) == 4
    states, head, targets, weights = given
    head = head if sides == "vd" else head.T

    def whole(states, head):
        logits = jnp.einsum(f"bld,{sides}->blv", states, head)
        return token_cross_entropy(logits, targets, weights, config)

    def parts(states, head):
        return head_loss.head_cross_entropy(sides, config, states, head, targets, weights)

    def with_gradient(function):
        def total(*arguments):
            sums = function(*arguments)
            return 0.7 * sums.total(), sums
        return jax.grad(total, argnums=trained, has_aux=True)(states, head)

    for one, other in zip(jax.tree.leaves(with_gradient(parts)), jax.tree.leaves(with_gradient(whole)),
                          strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.tree.leaves(parts(states, head)), jax.tree.leaves(whole(states, head)),
                          strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_stack_leaves_out_the_parts_in_which_no_expert_has_weight(given, monkeypatch):
    """Unequal weights, one expert without any; the number of positions is no multiple of that of parts."""
    monkeypatch.setattr(head_loss, "LEAST_LOGITS", 1)
    monkeypatch.setattr(head_loss, "LEAST_ROWS", 4)
    states, head, targets, weights = given
    states, targets, weights = states[:, :7], targets[:, :7], weights[:, :7]
    assert head_loss.num_parts(B, 7, V) == 5
    each = jnp.stack([weights, weights.at[1:].set(0), jnp.zeros_like(weights)])

    def gradient(states, weights):
        return jax.value_and_grad(lambda states: head_loss.head_cross_entropy(
            "vd", LossConfig(), states, head, targets, weights).loss)(states)

    def whole(states, weights):
        return jax.value_and_grad(lambda states: token_cross_entropy(
            states @ head.T, targets, weights, LossConfig()).loss)(states)

    mapped, whole_mapped = (jax.jit(jax.vmap(one, in_axes=(None, 0))) for one in (gradient, whole))
    expected = whole_mapped(states, each)
    for one, other in zip(mapped(states, each), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert " cond[" in str(jax.make_jaxpr(mapped)(states, each)), "no branch that all experts pass"


def test_few_logits_are_computed_at_once():
    assert head_loss.num_parts(8, 128, 64) == 1 and head_loss.num_parts(8, 128, 49152) == 8
    assert head_loss.num_parts(1, 100, 1 << 20) == 1 and head_loss.num_parts(4, 101, 1 << 20) == 3


@pytest.mark.parametrize(("name", "adapter"), [
    pytest.param("llama", "bottleneck", marks=pytest.mark.slow), ("gpt2", "lora")])
def test_a_decoder_trains_the_same_adapters_in_parts(monkeypatch, name, adapter):
    """With a head of its own and with a tied one; both are frozen."""
    network, params = made.network_and_params(name, adapter)
    overlay, frozen = trees.split(params, lambda path: "_adapter/" in path)
    batch = form_of(network).make(made.examples(network.config, 6), {"inputs": 10, "targets": 6}, 6)

    def gradient():
        return jax.jit(jax.value_and_grad(
            lambda overlay: network.loss(trees.merge(frozen, overlay), batch).total()))(overlay)

    expected = gradient()
    monkeypatch.setattr(head_loss, "LEAST_LOGITS", 1)
    monkeypatch.setattr(head_loss, "LEAST_ROWS", 24)
    assert head_loss.num_parts(*batch["tokens"].shape, network.config.vocab_size) > 1
    for one, other in zip(jax.tree.leaves(gradient()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
