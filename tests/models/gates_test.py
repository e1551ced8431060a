"""The rule of capacity, and who gets a place, against transformers' NLLB-MoE and rules written anew."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.models.layers import gates
from elm_jax.models.layers.sparse_config import SparseConfig, check_causal

E = 4


def logits_of(groups, length, seed=0, experts=E):
    return jnp.float32(np.random.default_rng(seed).normal(size=(groups, length, experts)))


@pytest.mark.parametrize("length", [1, 3, 7, 10, 64, 1000])
@pytest.mark.parametrize("factor", ["1", "1.1", "1.25", "2", "0.3", "0.07"])
@pytest.mark.parametrize("counts", [True, False], ids=["with K", "without K"])
def test_the_capacity(counts, factor, length):
    """Exact fractions: rounded up, at least the minimum, at most the group's places."""
    for experts, k, least in ((1, 1, 1), (5, 2, 1), (10, 2, 4), (64, 3, 4), (8, 8, 1)):
        config = SparseConfig(experts, k, capacity_factor=float(factor), eval_capacity_factor=2.0,
                              capacity_counts_choices=counts, min_capacity=least)
        exact = math.ceil(fractions.Fraction(factor) * length * (k if counts else 1) / experts)
        assert gates.capacity(config, length, True) == min(max(exact, least), length)
        exact = math.ceil(fractions.Fraction(2) * length * (k if counts else 1) / experts)
        assert gates.capacity(config, length, False) == min(max(exact, least), length)


def test_no_factor_is_no_capacity():
    """By default outside of training."""
    assert gates.capacity(SparseConfig(4), 100, False) is None
    assert gates.capacity(SparseConfig(4, capacity_factor=None), 100, True) is None
    assert gates.capacity(SparseConfig(4), 100, True) == 32


def nllb_router(capacity, by_probability):
    """transformers' router, or a skip where this version has none."""
    module = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe")
    transformers = pytest.importorskip("transformers")
    if not hasattr(module, "NllbMoeTop2Router"):
        pytest.skip("this version of transformers has no NllbMoeTop2Router")
    return module.NllbMoeTop2Router(transformers.NllbMoeConfig(
        d_model=8, num_experts=E, expert_capacity=capacity, second_expert_policy="all",
        normalize_router_prob_before_dropping=True, batch_prioritized_routing=by_probability)).train()


@pytest.mark.parametrize("capacity", [1, 3, 5, 20])
@pytest.mark.parametrize("order", ["choice", "probability"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_it_drops_what_nllb_drops(padded, order, capacity):
    """All first choices before second ones, left to right or by the first one's probability; K = 2."""
    import torch

    length = 24
    real = np.arange(length) % 5 != 4 if padded else np.ones(length, bool)
    logits = logits_of(1, length)
    router = nllb_router(capacity, order == "probability")
    _, theirs = router.route_tokens(
        torch.tensor(np.asarray(logits[0])), padding_mask=torch.tensor(~real)[None, None, None])
    config = SparseConfig(E, 2, order=order, normalize_gates=True)
    ours = gates.choose_by_tokens(logits, jnp.asarray(real)[None], config, capacity)
    combined = np.zeros((length, E))
    for token, k in zip(*np.nonzero(np.asarray(ours.kept[0])), strict=True):
        combined[token, ours.experts[0, token, k]] = ours.gates[0, token, k]
    np.testing.assert_allclose(combined, theirs.detach().numpy(), atol=1e-6)
    assert (ours.kept[0].sum() < 2 * real.sum()) == (capacity < 20)


@pytest.mark.parametrize("order", ["position", "choice", "probability"])
def test_places_are_counted_without_gaps(order):
    """Each expert's choices have the numbers 0, 1, ... in every group."""
    config = SparseConfig(E, 3, order=order)
    real = jnp.arange(17)[None] < jnp.array([[17], [9], [0]])
    found = gates.choose_by_tokens(logits_of(3, 17), real, config, None)
    for group in range(3):
        for expert in range(E):
            mine = np.asarray((found.experts[group] == expert) & real[group][:, None])
            assert sorted(np.asarray(found.places[group])[mine]) == list(range(mine.sum()))
    np.testing.assert_array_equal(found.kept, jnp.broadcast_to(real[..., None], found.kept.shape))


def test_positions_fill_from_left_to_right():
    """A token's place is the number of earlier choices of its expert: no later token counts."""
    found = gates.choose_by_tokens(logits_of(1, 12), jnp.ones((1, 12), bool), SparseConfig(E, 2), 3)
    experts, places = np.asarray(found.experts[0]), np.asarray(found.places[0])
    for token in range(12):
        for k in range(2):
            assert places[token, k] == np.sum(experts[:token] == experts[token, k])


def test_equal_logits_take_the_first_experts():
    """Ties are decided by number, on every device alike."""
    found = gates.choose_by_tokens(jnp.zeros((1, 5, E)), jnp.ones((1, 5), bool), SparseConfig(E, 2), None)
    np.testing.assert_array_equal(found.experts[0], [[0, 1]] * 5)
    np.testing.assert_allclose(found.gates, 0.25)


def test_experts_take_the_likeliest_real_tokens():
    """As many as they have places, or as there are real tokens."""
    config = SparseConfig(E, choice="experts", capacity_factor=1.0, eval_capacity_factor=1.0)
    real, logits = jnp.arange(6)[None] < 3, logits_of(1, 6)
    found = gates.choose_by_experts(logits, real, config, 5)
    probs = np.asarray(jax.nn.softmax(logits[0]))
    for expert in range(E):
        ranked = sorted(range(3), key=lambda token: -probs[token, expert])
        assert list(np.asarray(found.tokens[0, expert][:3])) == ranked
        np.testing.assert_allclose(found.gates[0, expert], [*probs[ranked, expert], 0, 0], rtol=1e-6)
        np.testing.assert_array_equal(found.taken[0, expert], [True] * 3 + [False] * 2)


@pytest.mark.parametrize(("settings", "fault"), [
    ({"order": "choice", "experts_per_token": 2}, r"sparse.order\s+got: 'choice'"),
    ({"order": "probability"}, r"sparse.order\s+got: 'probability'"),
    ({"choice": "experts", "eval_capacity_factor": 1.0}, r"sparse.choice\s+got: 'experts'")], ids=str)
def test_decoders_refuse_what_looks_ahead(settings, fault):
    """Orders other than by position, and the choice by experts."""
    check_causal(SparseConfig(4, 2), "sparse")
    with pytest.raises(InputError, match=fault):
        check_causal(SparseConfig(4, **settings), "sparse")


def test_an_order_of_choices_needs_second_ones():
    """With one expert a token it is the order of positions."""
    with pytest.raises(InputError, match=r"(?s)no effect.*order='choice'.*experts_per_token of 2"):
        SparseConfig(4, order="choice")
