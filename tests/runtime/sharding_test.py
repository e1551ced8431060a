"""Meshes and logical-axis rules."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elm_jax.errors import InputError
from elm_jax.runtime import sharding
from elm_jax.runtime.sharding import Axes


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


FSDP = sharding.make_rules([("embed", "data")])


def spec(names, shape, mesh, rules):
    return tuple(sharding.leaf_sharding(Axes(names), shape, mesh, rules).spec)


def test_an_override_replaces_one_row_and_leaves_the_others():
    changed = dict(FSDP)
    assert changed.pop("embed") == "data"
    assert changed == {name: axis for name, axis in sharding.DEFAULT_RULES if name != "embed"}
    assert sharding.make_rules() == sharding.DEFAULT_RULES
    assert hash(sharding.make_rules([["embed", ["data", "model"]]]))  # lists, as gin files may write them


def test_a_mesh_axis_serves_the_first_dimension_that_names_it():
    mesh = sharding.make_mesh(2, 4)
    assert spec(("embed", "mlp"), (6, 8), mesh, FSDP) == ("data", "model")
    # An activation's batch has the data axis already, so its embed dimension stays whole.
    assert spec(("batch", "length", "embed"), (6, 3, 8), mesh, FSDP) == ("data", None, None)
    assert spec(("batch", None, "mlp"), (6, 3, 8), mesh, FSDP) == ("data", None, "model")


def test_several_mesh_axes_split_one_dimension_as_far_as_it_divides():
    mesh = sharding.make_mesh(2, 2, 2)
    rules = sharding.make_rules([("embed", ("data", "experts")), ("mlp", ("data", "model"))])
    assert spec(("embed", "mlp"), (8, 8), mesh, rules) == (("data", "experts"), None)
    assert spec(("embed",), (6,), mesh, rules) == ("data",)
    assert spec(("embed", "mlp"), (5, 8), mesh, rules) == (None, ("data", "model"))


@pytest.mark.parametrize(("row", "message"), [
    (("embedd", "data"), "Unknown logical axis 'embedd'[\\s\\S]*sharding_rules[\\s\\S]*nearest: embed,"),
    (("embed", "dat"), "Unknown mesh axis 'dat'[\\s\\S]*sharding_rules: embed[\\s\\S]*nearest: data,"),
    (("embed", ("data", "modle")), "Unknown mesh axis 'modle'[\\s\\S]*nearest: model,"),
    (("embed",), "no pair"), ("embed", "no pair"), (7, "no pair"), (("embed", 7), "names no mesh axis"),
    (("embed", ("data", "data")), "names no mesh axis"), (("embed", ()), "names no mesh axis")])
def test_a_rule_that_means_nothing_is_an_input_error(row, message):
    with pytest.raises(InputError, match=message):
        sharding.make_rules([row])


def test_a_logical_axis_has_one_rule():
    with pytest.raises(InputError, match="two sharding rules"):
        sharding.make_rules([("embed", "data"), ("embed", None)])


def test_activations_go_where_the_rules_say_and_only_inside_of_the_context():
    mesh, rules = sharding.make_mesh(2, 4), sharding.make_rules([("length", "model")])
    x = np.ones((4, 8, 3), np.float32)
    assert sharding.constrain(x, "batch", "length", None) is x

    def double(x):
        with sharding.placed(mesh, rules):
            return sharding.constrain(2 * x, "batch", "length", None)

    found = jax.jit(double)(x)
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 2, 3)}
    assert np.array_equal(found, 2 * x)
    stacked = jax.jit(jax.vmap(double))(np.stack([x, x]))
    assert {shard.data.shape[1:] for shard in stacked.addressable_shards} == {(2, 2, 3)}


class _Chip:
    """What `create_device_mesh` reads of a TPU: place on the torus, kind, process."""

    platform, device_kind, process_index, core_on_chip, slice_index = "tpu", "TPU v5 lite", 0, 0, 0

    def __init__(self, number, coords):
        self.id, self.coords = number, coords


def test_neighbours_on_the_model_axis_are_neighbours_on_the_torus():
    """The order in which JAX lists the chips of a 4 x 4 slice goes host by host (2 x 2 chips each)."""
    places = [(2 * (host % 2) + chip % 2, 2 * (host // 2) + chip // 2, 0)
              for host in range(4) for chip in range(4)]
    chips = [_Chip(number, coords) for number, coords in enumerate(places)]
    grid = sharding._grid(chips, (4, 1, 4))
    assert sorted(chip.id for chip in grid.flat) == list(range(16))
    for row in grid[:, 0, :]:
        coords = np.asarray([chip.coords for chip in row])
        steps = np.abs(np.diff(coords, axis=0)).sum(axis=1)
        assert steps.max() == 1
    part = sharding._grid(chips, (2, 1, 2))
    assert [chip.id for chip in part.flat] == [0, 1, 2, 3]
