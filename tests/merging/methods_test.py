"""Merging against plain float64 sums, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.merging.methods import compose, method_table

SHAPES = {"decoder/wo/kernel": (7, 5), "encoder/norm/scale": (5,), "encoder/scalar": ()}


def overlays(number: int, seed: int = 0, dtype: str = "float32") -> list[dict[str, np.ndarray]]:
    """Random flat overlays."""
    rng = np.random.default_rng(seed)
    return [
        {path: np.asarray(rng.normal(size=shape)).astype(jnp.dtype(dtype))
         for path, shape in SHAPES.items()}
        for _ in range(number)
    ]  # fmt: skip


def to_jax(overlay: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {path: jnp.asarray(leaf) for path, leaf in overlay.items()}


def assert_close(got, expected, **tolerance) -> None:
    assert got.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(np.asarray(got[path], np.float64),
                                   np.asarray(expected[path], np.float64), **tolerance)  # fmt: skip


@pytest.mark.parametrize("convert", [dict, to_jax], ids=["numpy", "jax"])
@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4], [0.25] * 4, [0, 0, 5, 0]])
def test_weighted_mean_equals_float64(convert, weights):
    """The semantics of mergekit's `linear` with `normalize: true`."""
    experts = overlays(4)
    share = np.asarray(weights or [1] * 4, np.float64) / np.sum(weights or [1] * 4)
    expected = {
        path: sum(w * e[path].astype(np.float64) for w, e in zip(share, experts, strict=True))
        for path in SHAPES
    }
    merged = compose.merge_params("mean", [convert(each) for each in experts], weights)
    assert_close(merged, expected, atol=3e-7)
    assert all(leaf.dtype == np.float32 for leaf in merged.values())


def test_bfloat16_is_accumulated_wide_and_rounded_once():
    experts = overlays(9, dtype="bfloat16")
    merged = compose.merge_params("mean", experts)
    for path in SHAPES:
        exact = sum(each[path].astype(np.float64) for each in experts) / 9
        assert merged[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(merged[path], exact.astype(jnp.bfloat16))


def test_inputs_stay():
    experts = overlays(3)
    before = [{path: leaf.copy() for path, leaf in each.items()} for each in experts]
    compose.merge_params("mean", experts, [3, 2, 1])
    for each, copy in zip(experts, before, strict=True):
        assert_close(each, copy, rtol=0)


def test_mean_on_stacked_leaves_under_jit_is_differentiable_in_the_weights():
    leaves = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    weights = jnp.array([0.2, 0.3, 0.5])

    def merged(weights):
        return compose.merge_leaf("linear", jnp.asarray(leaves), weights, normalize=False)

    np.testing.assert_allclose(jax.jit(merged)(weights), np.einsum("e...,e->...", leaves, weights), atol=1e-6)
    gradient = jax.grad(lambda w: merged(w).sum())(weights)
    np.testing.assert_allclose(gradient, leaves.sum(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("lambdas", [None, [0.5, 0.25, 0.25]])
def test_task_arithmetic_with_lambdas_of_sum_one_is_the_weighted_mean(lambdas):
    base, *experts = overlays(4, seed=1)
    got = compose.merge_params("task_arithmetic", experts, lambdas, {**base, "other": np.zeros(3)})
    assert_close(got, compose.merge_params("mean", experts, lambdas), atol=3e-7)


def test_task_arithmetic_equals_float64_and_keeps_the_base_without_task_vectors():
    base, *experts = overlays(3, seed=2)
    got = compose.merge_params("task_arithmetic", experts, [1.5, -0.5], base)
    expected = {path: base[path] + 1.5 * (experts[0][path].astype(np.float64) - base[path])
                - 0.5 * (experts[1][path].astype(np.float64) - base[path])
                for path in SHAPES}  # fmt: skip
    assert_close(got, expected, atol=1e-6)
    assert_close(compose.merge_params("task_arithmetic", [base, base], [3.0, 7.0], base), base, rtol=0)
    assert_close(compose.merge_params("task_arithmetic", experts, [0.0, 0.0], base), base, rtol=0)


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("encoder/norm/scale", None, r"encoder/norm/scale is missing from trec"),
        ("aaa", np.zeros(2, np.float32), r"aaa is missing from xsum"),
        ("decoder/wo/kernel", np.zeros((5, 7), np.float32), r"\[7, 5\] float32 in xsum, \[5, 7\] float32"),
        ("encoder/norm/scale", np.zeros(5, jnp.bfloat16), r"\[5\] float32 in xsum, \[5\] bfloat16 in trec"),
    ],
)
def test_unlike_overlays_are_refused_with_leaf_and_both_experts(path, leaf, message):
    experts = dict(zip(("xsum", "imdb", "trec"), overlays(3), strict=True))
    compose.merge_params("mean", list(experts.values()), names=list(experts))
    if leaf is None:
        del experts["trec"][path]
    else:
        experts["trec"][path] = leaf
    with pytest.raises(InputError, match=message):
        compose.merge_params("mean", list(experts.values()), names=list(experts))


def test_every_differing_leaf_is_named():
    first, second = overlays(2)
    del second["encoder/norm/scale"], second["decoder/wo/kernel"]
    with pytest.raises(InputError, match=r"decoder/wo/kernel is missing[\s\S]*encoder/norm/scale is missing"):
        compose.merge_params("mean", [first, second], names=["a", "b"])


def test_integer_leaves_are_refused():
    expert = {"step": np.zeros(3, np.int32)}
    with pytest.raises(InputError, match=r"step of 0 is int32"):
        compose.merge_params("mean", [expert, expert])


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0], [1.0, float("nan")], [-1.0, 2.0],
                [float("inf"), 1.0], []],
)  # fmt: skip
def test_bad_weights_are_refused(weights):
    with pytest.raises(InputError, match=r"[Ww]eight"):
        compose.merge_params("mean", overlays(2), weights)


def test_unknown_method_names_the_nearest():
    with pytest.raises(InputError, match=r"Unknown merging method 'maen'.*\n.*mean"):
        method_table.get_method("maen")


@pytest.mark.parametrize(("weights", "parameters", "expected"), [
    ((1.0, -0.999), {}, 2.0 / 0.001),  # both take part, and their weights nearly cancel: as in mergekit
    ((1.0, -0.999), {"divisor": "absolute"}, 2.0 / 1.999),
    ((0.8, -0.8), {}, 1.6),  # no weight is left to divide by
    ((0.8, -0.8), {"divisor": "absolute"}, 1.0),
    ((0.3, -0.1, -0.2), {}, 0.6),  # cancel but for the rounding of float32
])
def test_votes_with_negative_weights(weights, parameters, expected):
    """Changes of 1 times each weight's sign, so that every expert takes part in the one element."""
    signs = np.sign(weights)
    changes = [np.full(4, change * (1.001001 if weights[1] == -0.999 and sign < 0 else 1), np.float32)
               for change, sign in zip(signs, signs, strict=True)]
    got = compose.merge_leaf("ties", changes, weights, np.zeros(4, np.float32), **parameters)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("alone", [1.0, -1.0])
def test_an_expert_of_negative_weight_that_wins_alone_keeps_its_sign_by_the_absolute_divisor(alone):
    changes = [np.zeros(4, np.float32), np.full(4, alone, np.float32)]
    base = np.zeros(4, np.float32)
    for divisor, expected in (("sum", alone), ("absolute", -alone)):
        got = compose.merge_leaf("ties", changes, [1.0, -0.5], base, divisor=divisor)
        np.testing.assert_array_equal(got, np.full(4, expected))


@pytest.mark.parametrize(("method", "weights", "parameters", "note"), [
    ("ties", [1.0, -0.999], {}, "sign cancels"), ("ties", [-1.0, -1.0], {}, "sign cancels"),
    ("dare_ties", [1.0, -0.5], {"normalize": True}, "sign cancels"),
    ("linear", [1.0, -0.999], {}, "magnifies"), ("linear", [1.5, -0.5], {}, None),
    ("ties", [1.0, -0.999], {"normalize": False}, None), ("dare_ties", [1.0, -0.5], {}, None),
    ("ties", [1.0, -0.999], {"divisor": "absolute"}, None), ("ties", [1.0, 0.0], {}, None)])
def test_weights_of_both_signs_are_told_of_with_the_cure(method, weights, parameters, note):
    row = method_table.METHODS[method]
    found = method_table.notes_on_signs([
        method_table.to_json(row, weights, row.settings(parameters, len(weights)))])
    assert len(found) == (note is not None)
    assert note is None or (note in found[0] and "divisor absolute" in found[0])


def test_shares_of_a_merge_that_votes_are_its_weights_and_of_others_what_they_come_to():
    def shares(method, weights, **parameters):
        row = method_table.METHODS[method]
        return method_table.shares_of([method_table.to_json(row, weights, row.settings(parameters, 2))])

    assert shares("ties", [0.8, -0.8]) == [0.8, -0.8] and shares("ties", [0.0, 0.0]) == [0.0, 0.0]
    assert shares("linear", [1.0, 3.0]) == [0.25, 0.75]
    assert shares("linear", [1.0, -3.0], divisor="absolute") == [0.25, -0.75]


def test_a_divisor_without_division_is_refused():
    with pytest.raises(InputError, match="no effect where nothing is divided"):
        method_table.METHODS["ties"].settings({"normalize": False, "divisor": "absolute"}, 2)
