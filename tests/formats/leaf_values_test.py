"""Values of leaves: what no type holds is refused, by bits, in every type and at every place."""

import numpy as np
import pytest
import torch

from elm_jax.errors import InputError
from elm_jax.formats.model import FLOAT_DTYPES
from elm_jax.formats.tensors import leaf_values


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_values_that_are_not_finite_are_seen_at_every_place(dtype, monkeypatch):
    monkeypatch.setattr(leaf_values, "_BLOCK", 16)
    largest = np.asarray(torch.finfo(getattr(torch, dtype)).max, dtype)
    array = np.full((5, 7), -largest)
    assert leaf_values.all_finite(array) and leaf_values.all_finite(array.T[::2])
    assert leaf_values.all_finite(np.zeros((0, 3), dtype)) and leaf_values.all_finite(np.zeros((), dtype))
    for place, bad in ((0, np.nan), (17, -np.inf), (34, np.inf)):
        spoilt = array.copy()
        spoilt.flat[place] = bad
        assert not leaf_values.all_finite(spoilt) and not leaf_values.all_finite(spoilt.T)
    with pytest.raises(InputError, match=r"not finite\n  where: leaf a/b of there"):
        leaf_values.read_float32(spoilt, "a/b", "there")


@pytest.mark.parametrize(("source", "target"), [
    ("float32", "float16"), ("bfloat16", "float16"), ("float64", "float32"), ("float32", "bfloat16")])
def test_a_cast_is_torchs_up_to_the_largest_value_and_refused_beyond(source, target):
    largest = torch.finfo(getattr(torch, target)).max
    draw = np.random.default_rng(0).standard_normal(100) * 100
    array = np.asarray([*draw, 0.98 * largest, -0.98 * largest, 1e-30], source)
    wanted = torch.tensor(array.astype(np.float64)).to(getattr(torch, source)).to(getattr(torch, target))
    found = leaf_values.cast_leaf(array, target, "a", "there")
    assert found.dtype.name == target
    np.testing.assert_array_equal(found.astype(np.float64), wanted.double().numpy())
    kept = leaf_values.cast_leaf(np.asarray([np.nan, np.inf, 1], source), target, "a", "there")
    assert np.isnan(kept[0]) and np.isinf(kept[1]) and kept[2] == 1, "no fault of the cast"
    beyond = torch.finfo(getattr(torch, source)).max  # bfloat16's largest is little below float32's
    with pytest.raises(InputError, match=rf"too large for {target}\n  where: leaf a of there\n  got: "):
        leaf_values.cast_leaf(np.asarray([np.nan, 1, -beyond], source), target, "a", "there")
