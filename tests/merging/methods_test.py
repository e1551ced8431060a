"""Merging against plain float64 sums, and its laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.merging import methods

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
    merged = methods.get_method("mean")([convert(each) for each in experts], weights)
    assert_close(merged, expected, atol=3e-7)
    assert all(leaf.dtype == np.float32 for leaf in merged.values())


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_an_expert_merged_with_itself_is_itself(number, dtype):
    (expert,) = overlays(1, dtype=dtype)
    for weights in (None, list(range(1, number + 1))):
        merged = methods.weighted_mean([expert] * number, weights)
        for path, leaf in expert.items():
            assert merged[path].dtype == leaf.dtype and merged[path].shape == leaf.shape
            np.testing.assert_allclose(
                merged[path].astype(np.float64), leaf.astype(np.float64),
                rtol=0 if dtype != "float64" else 1e-15,
            )  # fmt: skip


@pytest.mark.parametrize("convert", [dict, to_jax], ids=["numpy", "jax"])
def test_weight_one_on_one_expert_gives_it_back(convert):
    experts = [convert(each) for each in overlays(3)]
    assert_close(methods.weighted_mean(experts, [0, 1, 0]), experts[1], rtol=0)


def test_permutation_of_experts_and_weights_changes_nothing():
    experts, weights = overlays(4), [0.1, 0.2, 0.3, 0.4]
    expected = methods.weighted_mean(experts, weights)
    for order in itertools.permutations(range(4)):
        merged = methods.weighted_mean([experts[i] for i in order], [weights[i] for i in order])
        assert_close(merged, expected, rtol=2**-23)  # where float64 sums lie at a half, one unit


def test_bfloat16_is_accumulated_wide_and_rounded_once():
    experts = overlays(9, dtype="bfloat16")
    merged = methods.weighted_mean(experts)
    for path in SHAPES:
        exact = sum(each[path].astype(np.float64) for each in experts) / 9
        assert merged[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(merged[path], exact.astype(jnp.bfloat16))
    jax_merged = methods.weighted_mean([to_jax(each) for each in experts])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax_merged.values())
    assert_close(jax_merged, merged, rtol=2**-8)


def test_numpy_and_jax_agree_and_inputs_stay():
    experts = overlays(3)
    before = [{path: leaf.copy() for path, leaf in each.items()} for each in experts]
    merged = methods.weighted_mean(experts, [3, 2, 1])
    assert_close(methods.weighted_mean([to_jax(e) for e in experts], [3, 2, 1]), merged, atol=3e-7)
    for each, copy in zip(experts, before, strict=True):
        assert_close(each, copy, rtol=0)


def test_mean_leaf_under_jit_on_stacked_leaves_is_differentiable_in_the_weights():
    leaves = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    weights = jnp.array([0.2, 0.3, 0.5])
    merged = jax.jit(methods.mean_leaf)(jnp.asarray(leaves), weights)
    np.testing.assert_allclose(merged, np.einsum("e...,e->...", leaves, weights), atol=1e-6)
    gradient = jax.grad(lambda w: methods.mean_leaf(jnp.asarray(leaves), w).sum())(weights)
    np.testing.assert_allclose(gradient, leaves.sum(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("lambdas", [None, [0.5, 0.25, 0.25]])
def test_task_arithmetic_with_lambdas_of_sum_one_is_the_weighted_mean(lambdas):
    base, *experts = overlays(4, seed=1)
    got = methods.task_arithmetic_mean({**base, "other": np.zeros(3)}, experts, lambdas)
    assert_close(got, methods.weighted_mean(experts, lambdas), atol=2e-7)


def test_task_arithmetic_equals_float64_and_keeps_the_base_without_task_vectors():
    base, *experts = overlays(3, seed=2)
    got = methods.task_arithmetic_mean(base, experts, [1.5, -0.5])
    expected = {path: base[path] + 1.5 * (experts[0][path].astype(np.float64) - base[path])
                - 0.5 * (experts[1][path].astype(np.float64) - base[path])
                for path in SHAPES}  # fmt: skip
    assert_close(got, expected, atol=1e-6)
    assert_close(methods.task_arithmetic_mean(base, [base, base], [3.0, 7.0]), base, rtol=0)
    assert_close(methods.task_arithmetic_mean(base, experts, [0.0, 0.0]), base, rtol=0)


def test_task_arithmetic_refuses_a_base_that_lacks_a_leaf():
    base, *experts = overlays(3)
    del base["encoder/norm/scale"]
    with pytest.raises(InputError, match=r"base and expert 1[\s\S]*encoder/norm/scale: missing"):
        methods.task_arithmetic_mean(base, experts)
    with pytest.raises(InputError, match="2"):
        methods.task_arithmetic_mean(overlays(1)[0], experts, [1.0])


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("encoder/norm/scale", None, r"encoder/norm/scale: float32\[5\] against missing"),
        ("aaa", np.zeros(2, np.float32), r"aaa: missing against float32\[2\]"),
        ("decoder/wo/kernel", np.zeros((5, 7), np.float32), r"\[7, 5\] against float32\[5, 7\]"),
        ("encoder/norm/scale", np.zeros(5, jnp.bfloat16), r"float32\[5\] against bfloat16\[5\]"),
    ],
)
def test_unlike_overlays_are_refused_with_leaf_and_both_experts(path, leaf, message):
    experts = dict(zip(("xsum", "imdb", "trec"), overlays(3), strict=True))
    methods.check_mergeable(experts)
    if leaf is None:
        del experts["trec"][path]
    else:
        experts["trec"][path] = leaf
    with pytest.raises(InputError, match=rf"xsum and trec[\s\S]*{message}"):
        methods.check_mergeable(experts)
    with pytest.raises(InputError, match=rf"expert 1 and expert 3[\s\S]*{message}"):
        methods.weighted_mean(list(experts.values()))


def test_the_first_differing_leaf_is_named():
    first, second = overlays(2)
    del second["encoder/norm/scale"], second["decoder/wo/kernel"]
    with pytest.raises(InputError, match="first differing leaf decoder/wo/kernel"):
        methods.check_mergeable({"a": first, "b": second})


def test_integer_leaves_are_refused():
    expert = {"step": np.zeros(3, np.int32)}
    with pytest.raises(InputError, match=r"floating point[\s\S]*leaf step: int32"):
        methods.weighted_mean([expert, expert])


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0], [1.0, float("nan")], [-1.0, 2.0],
                [float("inf"), 1.0], []],
)  # fmt: skip
def test_bad_weights_are_refused(weights):
    with pytest.raises(InputError, match=r"[Ww]eight"):
        methods.weighted_mean(overlays(2), weights)


def test_weights_are_normalised():
    assert methods.normalised_weights(None, 4) == [0.25] * 4
    assert methods.normalised_weights([2, 6], 2) == [0.25, 0.75]
    with pytest.raises(InputError, match="needs experts"):
        methods.normalised_weights(None, 0)


def test_unknown_method_names_the_nearest():
    with pytest.raises(InputError, match=r"Unknown merging method 'maen'.*\n.*mean"):
        methods.get_method("maen")
