"""Collectives read from compiled programs, against counts and bytes known beforehand."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import InputError, RunError
from elm_jax.planning import chips, hlo
from elm_jax.runtime import sharding

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
ROWS, WIDTH, TRIPS = 64, 256, 5
WHOLE = ROWS * WIDTH * 4


@functools.cache
def mesh_of(platform: str) -> Mesh:
    if platform == "cpu":
        return sharding.make_mesh(4, 2)
    if not HAS_LIBTPU:
        pytest.skip("libtpu is not installed: no compiler for TPUs")
    return sharding.make_mesh(4, 2, devices=chips.devices_of(chips.parse("v5e:2x4")))


def collectives(function, platform):
    mesh, spec = mesh_of(platform), PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    place = NamedSharding(mesh, spec)
    text = jax.jit(mapped, in_shardings=place, out_shardings=place).lower(
        jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)).compile().as_text()
    return hlo.by_kind(hlo.collectives_of(text, 8))


def gather(x):
    return x + jnp.sum(jnp.sin(jax.lax.all_gather(x, "data", tiled=True)), axis=0, keepdims=True)


def scatter(x):
    wide = jnp.tile(jnp.sin(x), (4, 1))
    return jax.lax.psum_scatter(wide, "data", scatter_dimension=0, tiled=True)


def total(x):
    return jax.lax.psum(jnp.sin(x), "data")


def exchange(x):
    return jax.lax.all_to_all(jnp.sin(x), "data", 1, 1, tiled=True)


def shift(x):
    return jax.lax.ppermute(jnp.sin(x), "data", [(0, 1), (1, 2), (2, 3), (3, 0)])


PART = WHOLE / 4
EXPECTED = {
    "all-gather": (gather, WHOLE * 3 / 4),
    "reduce-scatter": (scatter, WHOLE * 3 / 4),
    "all-reduce": (total, 2 * PART * 3 / 4),
    "all-to-all": (exchange, PART * 3 / 4),
    "collective-permute": (shift, PART),
}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("kind", EXPECTED)
def test_one_collective_of_each_kind(kind, platform):
    function, sent = EXPECTED[kind]
    found = collectives(function, platform)
    assert found == {kind: {"count": 1, "bytes": pytest.approx(sent)}}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_loop_counts_as_often_as_it_runs(platform):
    def nested(x):
        inner = functools.partial(jax.lax.fori_loop, 0, 3, lambda _, y: total(y) / 4)
        return jax.lax.fori_loop(0, TRIPS, lambda _, y: jnp.cos(inner(y)), total(x))

    found = collectives(nested, platform)["all-reduce"]
    assert found["count"] == 1 + 3 * TRIPS
    assert found["bytes"] == pytest.approx((1 + 3 * TRIPS) * 2 * PART * 3 / 4)


def test_arrays_that_are_summed_together_all_count():
    """More than five operands: the text numbers them in comments."""
    def many(x):
        return sum(jax.lax.psum(jnp.sin(x + step), "data") for step in range(8))

    found = collectives(many, "cpu")["all-reduce"]
    assert found["bytes"] == pytest.approx(8 * 2 * PART * 3 / 4)


def test_a_group_is_the_axis_that_takes_part():
    over_model = collectives(lambda x: jax.lax.psum(jnp.sin(x), "model"), "cpu")
    assert over_model["all-reduce"]["bytes"] == pytest.approx(2 * PART / 2)
    over_both = collectives(lambda x: jax.lax.psum(jnp.sin(x), ("data", "model")), "cpu")
    assert over_both["all-reduce"]["bytes"] == pytest.approx(2 * PART * 7 / 8)


PROGRAM = """HloModule jit_f, entry_computation_layout={{()->f32[16,8]}}

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {{
  %p = f32[64,8]{{1,0}} parameter(0)
  %ar = f32[64,8]{{1,0}} all-reduce(%p), channel_id=3, {groups}, to_apply=%add
  ROOT %cut = f32[16,8]{{1,0}} dynamic-slice(%ar, %p)
}}

%async.1 (p: bf16[16,8]) -> bf16[64,8] {{
  %p = bf16[16,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %ag.1 = bf16[64,8]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=7, {groups}, {chain}
}}

%async.2 (p: bf16[16,8]) -> bf16[64,8] {{
  %p = bf16[16,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %ag.2 = bf16[64,8]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=7, {groups}, {chain}
}}

ENTRY %main.5 (x: f32[64,8], y: bf16[16,8]) -> f32[16,8] {{
  %x = f32[64,8]{{1,0}} parameter(0)
  %y = bf16[16,8]{{1,0}} parameter(1)
  %start = (bf16[64,8]{{1,0}}, u32[]) fusion(%y), kind=kCustom, calls=%async.1
  %done = bf16[64,8]{{1,0}} fusion(%y), kind=kCustom, calls=%async.2
  ROOT %out = f32[16,8]{{1,0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


CHAIN = 'frontend_attributes={chain_id="2"}'


@pytest.mark.parametrize("groups", [
    "replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=[2,4]<=[8]", "replica_groups=[2,4]<=[4,2]T(1,0)",
    "replica_groups=mesh['a'=2,'b'=4] {'b'}", "replica_groups=mesh['a'=8] {'a':(2)4}"])
def test_a_tpus_forms(groups):
    """A reduce-scatter as a fusion, a gather in steps of one chain, every way to write a group."""
    found = hlo.by_kind(hlo.collectives_of(PROGRAM.format(groups=groups, chain=CHAIN), 8))
    assert found == {
        "all-gather": {"count": 1, "bytes": 64 * 8 * 2 * 3 / 4},
        "reduce-scatter": {"count": 1, "bytes": 64 * 8 * 4 * 3 / 4},
    }


def test_what_is_not_understood_is_an_error_and_not_a_guess():
    with pytest.raises(RunError, match="no text of a compiled program"):
        hlo.collectives_of("not a program", 8)
    with pytest.raises(RunError, match="unknown way"):
        hlo.collectives_of(PROGRAM.format(groups="replica_groups=<new>", chain=CHAIN), 8)


def test_bytes_of_a_ring_by_hand():
    """Of n chips each sends n - 1 parts of a gather; an all-reduce is a scatter and a gather."""
    parts = np.arange(4)
    assert hlo.ring_bytes("all-gather", 400, 4) == 100 * (len(parts) - 1)
    assert hlo.ring_bytes("all-reduce", 400, 4) == 2 * 300
    assert hlo.ring_bytes("all-reduce", 400, 1) == 0


@pytest.mark.parametrize(("text", "message"), [
    ("v5e", "no topology"), ("v5e:4x", "no topology"), ("v5:4x4", "nearest: v5"), ("v5e:0", "no chips"),
    ("cpu:4096", "Too few simulated devices")])
def test_a_slice_that_does_not_exist(text, message):
    jax.devices()  # once JAX has started, its simulated devices are counted
    with pytest.raises(InputError, match=message):
        chips.devices_of(chips.parse(text))


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu=="):
        chips.devices_of(chips.parse("v5e:4x4"))


def test_what_the_compiler_says_against_a_slice_is_passed_on(monkeypatch):
    def fail(**_):
        raise RuntimeError("no such topology")

    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(chips.topologies, "get_topology_desc", fail)
    with pytest.raises(InputError, match="v5e:3x7: no such topology"):
        chips.devices_of(chips.parse("v5e:3x7"))
