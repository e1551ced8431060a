"""Merging on a slice of TPUs, compiled for it without one: no parameter leaves its chip."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.merging.methods import compose, method_table
from elm_jax.planning import chips, hlo

SHAPES = {"embedding": ((32128, 2048), ("model", "data")), "wi": ((2048, 5120), ("data", "model")),
          "wo": ((5120, 2048), ("model", "data")), "norm": ((2048,), ())}
"""Of T5-XL, and how a mesh of 4 x 4 chips holds them."""


@pytest.mark.parametrize("name", method_table.METHODS)
def test_tpu_program_moves_counts_and_sums_alone(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no compiler for TPUs (pip install libtpu==0.0.51, 205 MB)")
    row = method_table.get_method(name)
    devices = chips.devices_of(chips.parse("v5e:4x4"))
    mesh = Mesh(np.asarray(devices).reshape(4, 4), ("data", "model"))
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16,
                                         sharding=NamedSharding(mesh, PartitionSpec(*axes)))
              for path, (shape, axes) in SHAPES.items()}
    parameters = {"density": 0.2, "rescale": "l1"} if row.sparsify else {}

    def merge(experts, weights, base):
        return compose.merge_params(name, experts, weights, base, **parameters)

    count = row.num_experts or 3
    compiled = jax.jit(merge, out_shardings={path: leaf.sharding for path, leaf in leaves.items()}).lower(
        [leaves] * count, jax.ShapeDtypeStruct((count,), jnp.float32), leaves).compile()
    found = hlo.collectives_of(compiled.as_text(), mesh.size)
    assert all(one.kind == "all-reduce" and one.payload <= 4 * 64 for one in found), found
    assert bool(found) == (row.sparsify is not None or row.spherical), "what a whole leaf says is summed up"
    shards = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * 2 for leaf in leaves.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * shards
