"""Meshes and logical-axis rules."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elm_jax import sharding
from elm_jax.errors import InputError
from elm_jax.sharding import Axes


@pytest.mark.parametrize(("sizes", "shape"), [
    ((-1, 1), (8, 1, 1)), ((4, 2), (4, 1, 2)), ((-1, 4), (2, 1, 4)), ((1, 1), (1, 1, 1)),
    ((2, 2, 2), (2, 2, 2)), ((-1, 1, 4), (2, 4, 1))])
def test_mesh_shapes(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.axis_names == ("data", "experts", "model")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize("sizes", [(8, 2), (-1, 3), (0, 1), (1, 0), (1, 1, 0), (-1, 1, 3), (2, 2, 4)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match="8"):
        sharding.make_mesh(*sizes)


def test_dimensions_follow_the_rules_and_stay_whole_where_they_do_not_divide():
    mesh = sharding.make_mesh(2, 4)
    assert sharding.leaf_sharding(Axes(("embed", "mlp")), (6, 8), mesh).spec == PartitionSpec(None, "model")
    assert sharding.leaf_sharding(Axes(("embed", "mlp")), (6, 7), mesh).spec == PartitionSpec(None, None)
    twice = sharding.leaf_sharding(Axes(("vocab", "mlp")), (8, 8), mesh)
    assert twice.spec == PartitionSpec("model", None)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(InputError, match="No sharding rule"):
        sharding.leaf_sharding(Axes(("embed", "nothing")), (2, 2), sharding.make_mesh())
    with pytest.raises(InputError, match="do not fit the shape"):
        sharding.leaf_sharding(Axes(("embed",)), (2, 2), sharding.make_mesh())


def test_batch_is_split_over_data_and_must_divide():
    mesh = sharding.make_mesh(4, 2)
    batch = sharding.put_batch({"x": np.arange(16).reshape(8, 2)}, mesh)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}
    assert np.array_equal(jax.device_get(batch["x"]), np.arange(16).reshape(8, 2))
    with pytest.raises(InputError, match="got: 6\n  expected: a multiple of 4"):
        sharding.put_batch({"x": np.zeros((6, 2))}, mesh)
