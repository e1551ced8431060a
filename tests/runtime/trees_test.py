"""Trees: inverse pairs, and a fingerprint that sees names, shapes, dtypes and contents."""

import numpy as np
import pytest

from elm_jax.runtime import trees


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {"b": {"y": rng.normal(size=(2, 3)).astype(np.float32), "x": np.arange(4)},
            "a": {"z": np.ones(5, np.float32)}}


def same(left, right):
    flat_left, flat_right = trees.flatten(left), trees.flatten(right)
    return flat_left.keys() == flat_right.keys() and all(
        np.array_equal(flat_left[path], flat_right[path]) for path in flat_left)


def test_unflatten_is_the_inverse_of_flatten(tree):
    assert list(trees.flatten(tree)) == ["a/z", "b/x", "b/y"]
    assert same(trees.unflatten(trees.flatten(tree)), tree)


def test_merge_is_the_inverse_of_split(tree):
    selected, rest = trees.split(tree, lambda path: path.endswith("x"))
    assert list(trees.flatten(selected)) == ["b/x"]
    assert same(trees.merge(rest, selected), tree)


def test_merge_replaces_and_adds(tree):
    merged = trees.merge(tree, {"a": {"z": np.zeros(5, np.float32)}, "c": {"n": np.zeros(1)}})
    assert merged["a"]["z"].sum() == 0 and "c" in merged and same({"b": merged["b"]}, {"b": tree["b"]})


def test_counts(tree):
    assert trees.count(tree) == 15
    assert trees.nbytes(tree) == 6 * 4 + 4 * 8 + 5 * 4


def change_value(tree):
    tree["b"]["y"][0, 0] += 1


def change_shape(tree):
    tree["b"]["y"] = tree["b"]["y"].reshape(3, 2)


def change_dtype(tree):
    tree["a"]["z"] = tree["a"]["z"].view(np.int32)


def change_name(tree):
    tree["a"]["w"] = tree["a"].pop("z")


@pytest.mark.parametrize("change", [change_value, change_shape, change_dtype, change_name])
def test_fingerprint_sees_every_change(tree, change):
    before = trees.fingerprint(tree)
    change(tree)
    assert trees.fingerprint(tree) != before


def test_fingerprint_ignores_the_order_of_leaves(tree):
    turned = {"a": tree["a"], "b": {"x": tree["b"]["x"], "y": tree["b"]["y"]}}
    assert trees.fingerprint(turned) == trees.fingerprint(tree)


def test_first_difference_names_the_leaf(tree):
    other = trees.unflatten(dict(trees.flatten(tree)))
    assert trees.first_difference(tree, other) is None
    change_shape(other)
    assert trees.first_difference(tree, other) == "b/y: float32[2, 3] against float32[3, 2]"
    change_name(other)
    assert trees.first_difference(tree, other).startswith("a/w: missing against float32[5]")
