"""A recorded fingerprint is checked while tensors are read, in whatever order and parts."""

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.formats.tensors import hashed, streaming
from elm_jax.runtime import storage, trees

LEAVES = {"a/norm": np.arange(7.0, dtype=np.float32),
          "b/kernel": np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32),
          "c/kernel": np.random.default_rng(1).normal(size=(9, 40)).astype(np.float32),
          "d/scalar": np.float32(3)}
ALL = (slice(0, 50), slice(0, 6))


class Counted(streaming.ArrayTensors):
    """Counts the elements that are read."""

    elements = 0

    def read(self, path, index=None):
        array = super().read(path, index)
        self.elements += array.size
        return array


def opened(recorded=None, **how):
    counted = Counted(trees.unflatten(LEAVES))
    recorded = recorded or trees.fingerprint(trees.unflatten(LEAVES))
    return hashed.HashedTensors(counted, recorded, storage.as_path("here"), "Changed", "copy", **how), counted


def rows(start, stop, path="b/kernel"):
    return path, (slice(start, stop), slice(0, LEAVES[path].shape[1]))


ONCE = {
    "whole": [(path, None) for path in LEAVES],
    "in rows": [("a/norm", (slice(0, 3),)), ("a/norm", (slice(3, 7),)), rows(0, 20), rows(20, 50),
                rows(0, 9, "c/kernel"), ("d/scalar", None)],
    "without small ones": [("b/kernel", None), ("d/scalar", None)],
}
AGAIN = {
    "nothing": [],
    "backwards": [(path, None) for path in reversed(LEAVES)],
    "columns": [("a/norm", None), ("b/kernel", (slice(0, 50), slice(0, 3))),
                ("b/kernel", (slice(0, 50), slice(3, 6))), ("c/kernel", None)],
    "a gap": [("a/norm", None), rows(0, 10), rows(20, 50), ("c/kernel", None)],
    "twice": [("a/norm", None), ("a/norm", None), rows(0, 10), rows(0, 50), ("c/kernel", None)],
}


@pytest.mark.parametrize("order", [*ONCE, *AGAIN])
def test_every_order_gives_the_same_answer(order):
    for recorded in (None, "sha256:0"):
        tensors, counted = opened(recorded)
        for path, index in (ONCE | AGAIN)[order]:
            np.testing.assert_array_equal(tensors.read(path, index),
                                          LEAVES[path] if index is None else LEAVES[path][index])
        if recorded is None:
            tensors.check()
            tensors.check()
        else:
            with pytest.raises(InputError, match=r"Changed\n  where: here\n  got: sha256:[^$]*sha256:0"):
                tensors.check()
        if order in ONCE:
            assert counted.elements == sum(leaf.size for leaf in LEAVES.values()), "nothing is read twice"


def test_one_changed_value_is_seen():
    for path in LEAVES:
        tensors, counted = opened()
        counted._flat = {**counted._flat, path: LEAVES[path] + 1}
        with pytest.raises(InputError, match="Changed"):
            tensors.check()


def test_values_are_hashed_in_float32_or_as_they_are():
    half = {path: leaf.astype("float16") for path, leaf in LEAVES.items()}
    counted = Counted(trees.unflatten(half))
    wide = trees.fingerprint({path: leaf.astype(np.float32) for path, leaf in half.items()})
    hashed.HashedTensors(counted, wide, "here", "Changed", "copy").check()
    own = trees.fingerprint(half)
    hashed.HashedTensors(counted, own, "here", "Changed", "copy", as_float32=False).check()
