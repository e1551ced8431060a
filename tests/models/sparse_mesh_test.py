"""A sparse layer on meshes: outputs, sums, gradients as on one device, and what moves between devices."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.planning import hlo
from elm_jax.runtime import sharding

B, L, D, F, E = 8, 6, 8, 16, 8
TIGHT = {"capacity_factor": 0.6, "min_capacity": 1}
CASES = {
    "top 1": TIGHT,
    "top 2": {"experts_per_token": 2, "order": "choice", "normalize_gates": True, **TIGHT},
    "pairs of rows": {"experts_per_token": 2, "group_rows": 2, **TIGHT},
    "no dropping": {"experts_per_token": 2, "capacity_factor": None},
    "experts": {"choice": "experts", "capacity_factor": 0.9, "eval_capacity_factor": 0.9, "min_capacity": 1},
}
MESHES = [(1, 2, 1), (1, 4, 1), (1, 8, 1), (8, 1, 1), (1, 1, 2), (2, 2, 2), (2, 4, 1)]
"""(data, experts, model)."""
RULES = {"apart": (("batch", ("data", "experts")),), "together": ()}
"""Whether each device of the experts' axis has rows of its own."""


def layer_of(settings, dropout=0.0, num_experts=E):
    return SparseMlp(D, F, ("gelu", "linear"), dropout, jnp.dtype("float32"),
                     SparseConfig(num_experts, **settings))


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def params_of(layer):
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), draw(B, L, D), True))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [draw(*leaf.shape, seed=number) * leaf.shape[-2]**-0.5
                                     for number, leaf in enumerate(leaves)])


def loss_of(layer, params, x, real):
    """A loss that every output and every sum is a part of; and those."""
    rngs = {"dropout": jax.random.key(0)}
    y, sown = layer.apply({"params": params}, x, False, real, rngs=rngs, mutable=["router"])
    sums = sown["router"]["sums"]
    loss = jnp.sum(y * draw(*y.shape, seed=9)) + sums.probs @ draw(sums.probs.size, seed=8) + sums.z
    return loss + 2 * sums.entropy, (y, sums)


def results(layer, params, x, real, mesh=None, rules=()):
    """Loss, outputs, sums and gradients on a mesh; on one device without."""
    return jax.jit(functools.partial(graded, layer, mesh, rules))(params, x, real)


def graded(layer, mesh, rules, params, x, real, stacked=False):
    function = jax.value_and_grad(functools.partial(loss_of, layer), (0, 1), has_aux=True)
    with sharding.placed(mesh, sharding.make_rules(rules), stacked) if mesh else contextlib.nullcontext():
        return function(params, x, real)


@functools.cache
def on_one(case, dropout=0.0, rows=B):
    layer = layer_of(CASES[case], dropout)
    arguments = params_of(layer), draw(rows, L, D, seed=3), jnp.asarray(padding(rows))
    return layer, arguments, results(layer, *arguments)


def padding(rows):
    real = np.ones((rows, L), bool)
    real[1, 4:], real[2, :2], real[-1] = False, False, False
    return real


@pytest.mark.parametrize("case", CASES)
def test_one_mesh_changes_nothing(case):
    check(case, (2, 2, 2), "apart")


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_mesh_changes_anything(case, shape, rules):
    check(case, shape, rules)


def check(case, shape, rules):
    layer, arguments, expected = on_one(case)
    if case != "no dropping":
        assert expected[0][1][1].dropped > 0
    same(results(layer, *arguments, mesh_of(shape), RULES[rules]), expected)


@pytest.mark.parametrize("case", ["top 2", "no dropping"])
def test_dropout_does_not_depend_on_the_mesh(case):
    layer, arguments, expected = on_one(case, dropout=0.3)
    assert not np.allclose(expected[0][1][0], on_one(case)[2][0][1][0], atol=1e-2)
    same(results(layer, *arguments, mesh_of((2, 2, 2)), RULES["apart"]), expected)


ODD = {
    "experts over data": (("expert", "data"),),
    "experts over both": (("batch", ("data", "experts")), ("expert", ("data", "experts"))),
    "experts over what the batch is not": (("batch", ("data", "experts")), ("expert", ("experts", "model"))),
    "the batch turned round": (("batch", ("experts", "data")),),
    "hidden width over data": (("expert_mlp", "data"),),
    "kernels over data too": (("batch", ("data", "experts")), ("embed", "data")),
    "length over model": (("length", "model"),),
}


@pytest.mark.slow
@pytest.mark.parametrize("rules", ODD)
@pytest.mark.parametrize("case", ["top 2", "no dropping", "experts"])
def test_no_rules_change_anything(case, rules):
    layer, arguments, expected = on_one(case)
    same(results(layer, *arguments, mesh_of((2, 2, 2)), ODD[rules]), expected)


@pytest.mark.parametrize(("rows", "case"), [(6, "top 1"), (6, "pairs of rows"), (7, "pairs of rows")])
def test_what_does_not_divide_is_right_too(rows, case):
    """Rows over four devices, groups over two, a group that lacks a row."""
    layer, arguments, expected = on_one(case, rows=rows)
    same(results(layer, *arguments, mesh_of((1, 2, 1) if rows == 7 else (1, 4, 1)), RULES["apart"]), expected)


@pytest.mark.parametrize("case", ["pairs of rows", "experts"])
def test_choices_by_task_are_counted_on_a_mesh_too(case):
    layer = layer_of({**CASES[case], "tasks": ("a", "b", "c")})
    params, x, real = on_one(case)[1]
    ids = jnp.arange(B * L).reshape(B, L) % 4 - 1

    def counts(mesh, params, x):
        with sharding.placed(mesh, sharding.make_rules(RULES["apart"])):
            _, sown = layer.apply({"params": params}, x, True, real, None, ids, mutable=["router"])
        return sown["router"]["sums"].by_task

    one, many = (jax.jit(functools.partial(counts, mesh_of(shape)))(params, x)
                 for shape in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_array_equal(one, many)
    assert (np.asarray(one).sum(axis=1) > 0).all()


def mesh_of(shape):
    data, experts, model = shape
    return sharding.make_mesh(data, model, experts)


EXPERT_AXES = {"wi_0": ("expert", "embed", "expert_mlp"), "wi_1": ("expert", "embed", "expert_mlp"),
               "wo": ("expert", "expert_mlp", "embed"), "router_weights": ("embed", None)}


def sent(case, shape, rules):
    """Collectives of the compiled gradient, parameters and rows split as the rules say; bytes of a row."""
    layer, arguments, _ = on_one(case)
    mesh, table = mesh_of(shape), sharding.make_rules(rules)

    def put(axes, leaf):
        return sharding.leaf_sharding(sharding.Axes(axes), leaf.shape, mesh, table)

    params = jax.tree.map_with_path(
        lambda path, leaf: put(next(EXPERT_AXES[key.key] for key in path if key.key in EXPERT_AXES), leaf),
        arguments[0])
    places = params, put(("batch", None, None), arguments[1]), put(("batch", None), arguments[2])
    run = jax.jit(functools.partial(graded, layer, mesh, rules), in_shardings=places,
                  out_shardings=(None, places[:2]))
    return hlo.collectives_of(run.lower(*arguments).compile().as_text(), mesh.size)


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 2)], ids=str)
def test_rows_move_and_kernels_stay(shape):
    """Four all-to-alls, there and back in both directions, of all places that a device's groups have."""
    found = sent("top 2", shape, RULES["apart"])
    moved = [one for one in found if one.kind == "all-to-all"]
    places = E * -(-TIGHT["capacity_factor"] * 2 * L // E)
    assert [one.payload for one in moved] == [B // (shape[0] * shape[1]) * places * D * 4] * 4
    assert {one.group for one in moved} == {shape[1]}
    assert "all-gather" not in hlo.by_kind(found)
    kernels = 3 * E * D * F * 4 // (shape[1] * shape[2])  # of a device: summed over the rows that it lacks
    expected = kernels if shape[0] > 1 else 0
    assert sum(one.payload for one in found if one.payload >= kernels) == expected


def test_where_all_rows_lie_together_outputs_are_summed():
    """Once forward; backward the gradients of the rows and of their gates."""
    found = sent("top 2", (1, 4, 1), RULES["together"])
    assert set(hlo.by_kind(found)) == {"all-reduce"}
    assert sum(one.payload for one in found) == 4 * (2 * B * L * D + 2 * B * L)


def test_without_a_capacity_rows_are_gathered_and_kernels_stay():
    found = sent("no dropping", (1, 4, 1), RULES["apart"])
    rows, choices = 4 * B * L * D, B * L * 2
    gathered = [one.payload for one in found if one.kind == "all-gather"]
    # Forward the rows and of each choice expert, gate, place, and whether it counts; backward their outputs'.
    assert sum(gathered) == 2 * rows + choices * (4 + 4 + 4 + 1)
    assert sorted(one.payload for one in found if one.kind == "reduce-scatter") == [4 * choices, rows, rows]
    assert not any(one.kind == "all-to-all" for one in found)


@pytest.mark.parametrize(("case", "shape"), [("top 2", (2, 2, 2)), ("no dropping", (2, 4, 1))])
def test_in_a_stack_of_networks_the_axis_is_the_stacks(case, shape):
    """Rows and routers of four networks over the mesh's experts: nothing of the layer is split there too."""
    layer, (params, x, real), _ = on_one(case)
    xs = jnp.stack([x, 2 * x, draw(*x.shape, seed=5), -x])
    mesh = mesh_of(shape)
    rules = sharding.rules_of_one(sharding.make_rules(RULES["apart"]))
    one = functools.partial(graded, layer, mesh, [row for row in rules if row[0] in ("batch", "expert")],
                            stacked=True)
    found = jax.jit(jax.vmap(one, in_axes=(None, 0, None), spmd_axis_name="experts"))(params, xs, real)
    same(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(
        results(layer, params, x, real) for x in xs)))


def same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * float(jnp.abs(other).max()))
