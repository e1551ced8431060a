"""The sparse feed-forward against a float64 loop over tokens, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_loop import as_float64, sparse_loop

from elm_jax.errors import InputError
from elm_jax.models.blocks.feed_forward import Mlp
from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers.sparse_config import SparseConfig

B, L, D, F, T = 4, 6, 5, 7, 3
GATED, PLAIN = ("gelu", "linear"), ("relu",)
TASKS = {"tasks": ("a", "b"), "task_dim": T}
CASES = {
    "switch": {},
    "tight": {"capacity_factor": 0.5, "min_capacity": 1},
    "top 2": {"experts_per_token": 2, "capacity_factor": 0.6, "min_capacity": 1},
    "top 2 without factor K": {"experts_per_token": 2, "capacity_factor": 1.0, "min_capacity": 2,
                               "capacity_counts_choices": False, "group_rows": 2},
    "top 2 renormalised": {"experts_per_token": 2, "capacity_factor": 0.6, "min_capacity": 1,
                           "normalize_gates": True, "order": "choice", "group_rows": 2},
    "top 3 by probability": {"experts_per_token": 3, "capacity_factor": 0.4, "min_capacity": 1,
                             "order": "probability", "group_rows": 3},
    "top 1 by probability": {"capacity_factor": 0.7, "min_capacity": 1, "order": "probability"},
    "one group": {"capacity_factor": 0.5, "min_capacity": 1, "group_rows": 8},
    "no dropping": {"experts_per_token": 2, "capacity_factor": None, "normalize_gates": True},
    "fixed places": {"experts_per_token": 2, "capacity_factor": None, "capacity": 2, "group_rows": 2},
    "no dropping, raw": {"experts_per_token": 3, "capacity_factor": None},
    "task": {"gate": "task", "capacity_factor": 0.9, "min_capacity": 1, **TASKS},
    "both": {"gate": "both", "experts_per_token": 2, "capacity_factor": 0.7, "min_capacity": 1, **TASKS},
    "experts": {"choice": "experts", "capacity_factor": 1.3, "eval_capacity_factor": 2.0, "min_capacity": 1},
    "experts renormalised": {"choice": "experts", "capacity_factor": 0.9, "eval_capacity_factor": 8.0,
                             "min_capacity": 1, "normalize_gates": True, "group_rows": 2},
}


def layer_of(settings, activations=GATED, dtype="float32", num_experts=4):
    named = {"tasks": ("a", "b"), **settings}
    return SparseMlp(D, F, activations, 0.0, jnp.dtype(dtype), SparseConfig(num_experts, **named))


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def params_of(layer, seed=0):
    """Random leaves of some size, the router's too: experts of unlike load."""
    task = draw(B, T) if layer.sparse.gate != "token" else None
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), draw(B, L, D), True, None, task))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    made = [draw(*leaf.shape, seed=seed + 7 * number) * leaf.shape[-2]**-0.5
            for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(layer, params, x, training, real=None, task=None, task_ids=None):
    """The output and the layer's sums."""
    rngs = {"dropout": jax.random.key(0)} if training else None
    y, sown = layer.apply({"params": params}, x, not training, real, task, task_ids, rngs=rngs,
                          mutable=["router"])
    return y, sown["router"]["sums"]


def some_padding():
    return jnp.array([[True] * L, [True] * 4 + [False] * 2, [False] * 2 + [True] * 4, [False] * L])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop(case, padded, training):
    """Outputs and sums, over gates, K, capacities, orders, groups; with padding, tasks of tokens too."""
    layer = layer_of(CASES[case])
    params, x, task = params_of(layer), draw(B, L, D, seed=3), draw(B, *[L] * padded, T, seed=4)
    real = some_padding() if padded else None
    task = task if layer.sparse.gate != "token" else None
    ids = np.random.default_rng(5).integers(-1, 2, (B, L)) if padded else None  # -1: of no task
    y, sums = apply(layer, params, x, training, real, task, ids)
    found = sparse_loop(x, params, layer.sparse, GATED, training, real, task, ids)
    np.testing.assert_allclose(y, found.y, atol=2e-6)
    assert (sums.by_task is None) == (ids is None)
    for name, wanted in found.sums.items():
        np.testing.assert_allclose(getattr(sums, name), wanted, rtol=1e-5, err_msg=name)


def test_the_cases_drop_and_fill():
    """What the loop is compared on holds drops in training, and none outside."""
    for name, settings in CASES.items():
        layer = layer_of(settings)
        task = draw(B, T, seed=4) if layer.sparse.gate != "token" else None
        dropped = [apply(layer, params_of(layer), draw(B, L, D, seed=3), training, None, task)[1].dropped
                   for training in (True, False)]
        assert (dropped[1] == 0) == (layer.sparse.capacity is None), name
        assert (dropped[0] > 0) == (name not in ("switch", "no dropping", "no dropping, raw")), name


def weights_of_loss():
    """Of a loss that reads the output, the probabilities and the z loss."""
    return draw(B, L, D, seed=8), 0.3, 0.2


def loss(layer, activations, params, x, real, task):
    share, balance, z = weights_of_loss()
    rngs = {"dropout": jax.random.key(0)}
    y, sown = layer.apply({"params": params}, x, False, real, task, rngs=rngs, mutable=["router"])
    sums = sown["router"]["sums"]
    even = layer.sparse.num_experts * jnp.sum(sums.choices * sums.probs) / sums.tokens**2
    return jnp.sum(y * share) + balance * even + z * sums.z / sums.tokens


def loop_loss(layer, activations, params, x, real, task):
    share, balance, z = weights_of_loss()
    found = sparse_loop(x, params, layer.sparse, activations, True, real, task)
    return np.sum(found.y * np.float64(share)) + balance * found.balance() + z * found.z_loss()


def slopes(layer, activations, at, real, step=1e-5):
    """The loop's derivatives by central differences, along one random direction for each leaf."""
    leaves, tree = jax.tree.flatten(jax.tree.map(as_float64, at))
    for number, leaf in enumerate(leaves):
        direction = np.random.default_rng(number).normal(size=leaf.shape)
        ends = []
        for sign in (1, -1):
            moved = [*leaves[:number], leaf + sign * step * direction, *leaves[number + 1:]]
            params, x, task = jax.tree.unflatten(tree, moved)
            ends.append(loop_loss(layer, activations, params, x, real, task))
        yield number, direction, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("activations", [PLAIN, GATED], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_its_gradients_are_the_loops_slopes(case, activations):
    """Those of the output, the balance loss and the z loss together: every leaf, the input, the task."""
    layer = layer_of(CASES[case], activations)
    task = draw(B, T, seed=4) if layer.sparse.gate != "token" else None
    at, real = (params_of(layer), draw(B, L, D, seed=3), task), some_padding()
    value, gradient = jax.jit(jax.value_and_grad(
        lambda at: loss(layer, activations, *at[:2], real, at[2])))(at)
    np.testing.assert_allclose(value, loop_loss(layer, activations, *at[:2], real, task), rtol=1e-5)
    leaves = jax.tree.leaves(gradient)
    for number, direction, slope in slopes(layer, activations, at, real):
        np.testing.assert_allclose(np.sum(leaves[number] * direction), slope, rtol=2e-4, atol=2e-5)


def test_the_z_loss_moves_the_router_alone():
    """Its gradient by finite differences of the formula, one weight after another."""
    layer = layer_of({"experts_per_token": 2})
    params, x, real = params_of(layer), draw(B, L, D, seed=3), some_padding()

    def z_loss(params):
        sums = apply(layer, params, x, False, real)[1]
        return sums.z / sums.tokens

    gradient = jax.grad(z_loss)(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["expert"]))
    kernel = np.float64(params["router"]["router_weights"]["w"]["kernel"])
    rows = np.float64(x)[np.asarray(real)]
    for place in np.ndindex(kernel.shape):
        moved = [kernel.copy(), kernel.copy()]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        one, other = (np.mean(np.log(np.exp(rows @ each).sum(-1)) ** 2) for each in moved)
        np.testing.assert_allclose(gradient["router"]["router_weights"]["w"]["kernel"][place],
                                   (one - other) / 2e-6, rtol=1e-4, atol=1e-6)


AMPLE = {"top 1": {}, "top 2": {"experts_per_token": 2}, "no dropping": {"capacity_factor": None},
         "top 3, no dropping": {"capacity_factor": None, "experts_per_token": 3}}


def ample(settings):
    return {"capacity_factor": 100.0, **settings}


def dense_of(params, number=0, activations=GATED):
    """The dense feed-forward of one expert: a layer and its leaves."""
    mlp = Mlp(D, F, activations, 0.0, jnp.dtype("float32"))
    return mlp, jax.tree.map(lambda leaf: leaf[number], params["expert"])


@pytest.mark.parametrize("case", AMPLE)
def test_permuting_experts_changes_nothing(case):
    """Experts and the router's columns together, with and without drops."""
    order = jnp.array([2, 0, 3, 1])
    for settings in (ample(AMPLE[case]), {"capacity_factor": 0.5, "min_capacity": 1, **AMPLE[case]}):
        layer = layer_of(settings)
        params, x = params_of(layer), draw(B, L, D, seed=3)
        router = params["router"]["router_weights"]["w"]["kernel"][:, order]
        moved = {"router": {"router_weights": {"w": {"kernel": router}}},
                 "expert": jax.tree.map(lambda leaf: leaf[order], params["expert"])}
        y, sums = apply(layer, params, x, True)
        z, moved_sums = apply(layer, moved, x, True)
        np.testing.assert_allclose(y, z, atol=1e-6)
        np.testing.assert_array_equal(sums.choices[order], moved_sums.choices)
        assert sums.dropped == moved_sums.dropped


@pytest.mark.parametrize("normalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("factor", [1.0, None], ids=["capacity", "no capacity"])
def test_one_expert_is_the_dense_layer(factor, normalize):
    """Its gate is 1 in both cases: the softmax of one logit; every real token has a place at factor 1."""
    layer = layer_of({"capacity_factor": factor, "normalize_gates": normalize}, num_experts=1)
    params, x = params_of(layer), draw(B, L, D, seed=3)
    mlp, leaves = dense_of(params)
    np.testing.assert_allclose(apply(layer, params, x, True)[0],
                               mlp.apply({"params": leaves}, x, True), atol=1e-6)


@pytest.mark.parametrize("case", AMPLE)
def test_equal_experts_are_the_dense_layer_times_the_gates(case):
    """Renormalised gates: the dense layer; raw ones: the sum of the K probabilities times it."""
    for normalize in (True, False):
        layer = layer_of({**ample(AMPLE[case]), "normalize_gates": normalize})
        params, x = params_of(layer), draw(B, L, D, seed=3)
        params["expert"] = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 4, axis=0), params["expert"])
        mlp, leaves = dense_of(params)
        probs = np.asarray(jax.nn.softmax(x @ params["router"]["router_weights"]["w"]["kernel"]))
        best = np.sort(probs, axis=-1)[..., -layer.sparse.experts_per_token:].sum(-1, keepdims=True)
        dense = mlp.apply({"params": leaves}, x, True)
        np.testing.assert_allclose(apply(layer, params, x, True)[0], dense if normalize else best * dense,
                                   atol=2e-6)


@pytest.mark.parametrize("case", AMPLE)
def test_a_router_of_zeros_has_uniform_gates(case):
    """Each expert's gate is 1 / E, renormalised 1 / K; of equal probabilities the first experts are taken."""
    for normalize in (True, False):
        layer = layer_of({**ample(AMPLE[case]), "normalize_gates": normalize})
        params, x = params_of(layer), draw(B, L, D, seed=3)
        params["router"] = jax.tree.map(jnp.zeros_like, params["router"])
        used = layer.sparse.experts_per_token
        outputs = [mlp.apply({"params": leaves}, x, True)
                   for mlp, leaves in (dense_of(params, number) for number in range(used))]
        y, sums = apply(layer, params, x, True)
        np.testing.assert_allclose(y, sum(outputs) / (used if normalize else 4), atol=2e-6)
        np.testing.assert_allclose(sums.probs / sums.tokens, 0.25)
        np.testing.assert_allclose(sums.entropy / sums.tokens, np.log(4.0), rtol=1e-6)


def test_drops_are_rows_of_zeros():
    """A token whose expert is full, and padding; the others are what ample capacity gives them."""
    layer = layer_of({"capacity_factor": 0.5, "min_capacity": 1})
    params, x, real = params_of(layer), draw(B, L, D, seed=3), some_padding()
    y, sums = apply(layer, params, x, True, real)
    full, _ = apply(layer_of({"capacity_factor": None}), params, x, True, real)
    dropped = ~np.any(y, axis=-1)
    assert dropped.sum() == sums.dropped + (~real).sum() and sums.dropped > 0
    np.testing.assert_allclose(y[~dropped], full[~dropped], atol=1e-6)
    assert np.all(np.any(full, axis=-1) == real)


@pytest.mark.parametrize("settings", [
    {"capacity_factor": 0.5, "min_capacity": 1}, {"experts_per_token": 2, "capacity_factor": 0.5,
                                                  "min_capacity": 1, "order": "choice"},
    {"choice": "experts", "capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 1}], ids=str)
def test_padding_takes_no_place(settings):
    """Real tokens get what they get if padding holds other values, or is at the other end."""
    layer = layer_of({**settings, "group_rows": B})
    params, x, real = params_of(layer), draw(B, L, D, seed=3), some_padding()
    y, sums = apply(layer, params, x, True, real)
    z, other = apply(layer, params, jnp.where(real[..., None], x, 100.0), True, real)
    np.testing.assert_array_equal(y, z)
    jax.tree.map(np.testing.assert_array_equal, sums, other)
    turned, _ = apply(layer, params, jnp.roll(x, 2, axis=1), True, jnp.roll(real, 2, axis=1))
    rows = np.array([1, 2])  # those of which no token goes round the end
    turned = np.roll(turned, -2, axis=1)
    if settings.get("choice") != "experts" and layer.sparse.experts_per_token == 1:
        kept = np.any(y[rows], axis=-1) & np.any(turned[rows], axis=-1)
        np.testing.assert_allclose(y[rows][kept], turned[rows][kept], atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.4, 1.0, None])
def test_no_token_depends_on_a_later_one(factor, k):
    """With capacity that drops, in the order of positions: what a decoder may use."""
    layer = layer_of({"experts_per_token": k, "capacity_factor": factor, "min_capacity": 1})
    params, x = params_of(layer), draw(1, 12, D, seed=3)
    y, sums = apply(layer, params, x, True)
    assert sums.dropped > 0 or factor is None
    for end in range(1, 12):
        changed = x.at[:, end:].set(draw(1, 12 - end, D, seed=100 + end))
        np.testing.assert_allclose(apply(layer, params, changed, True)[0][:, :end], y[:, :end], atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(apply(layer, params, x, True)[0][:, 5] * draw(1, D)))(x)
    assert np.any(gradient[:, 5]) or factor == 0.4
    assert not np.any(gradient[:, 6:])


@pytest.mark.parametrize("order", ["choice", "probability"])
def test_the_other_orders_look_ahead(order):
    """Why decoders refuse them: a later token's first choice takes an earlier one's second place."""
    layer = layer_of({"experts_per_token": 2, "capacity_factor": 0.5, "min_capacity": 1, "order": order})
    params, x = params_of(layer), draw(1, 12, D, seed=3)
    y, _ = apply(layer, params, x, True)
    changed = [apply(layer, params, x.at[:, 6:].set(draw(1, 6, D, seed=seed)), True)[0][:, :6] - y[:, :6]
               for seed in range(5)]
    assert np.abs(np.stack(changed)).max() > 1e-3


@pytest.mark.parametrize("group_rows", [1, 4])
def test_a_step_of_one_token_never_drops(group_rows):
    """Whatever the capacity; it gives what the whole row gives without dropping."""
    settings = {"experts_per_token": 2, "capacity_factor": 0.1, "eval_capacity_factor": 0.1,
                "min_capacity": 1, "group_rows": group_rows}
    layer, params = layer_of(settings), params_of(layer_of(settings))
    x = draw(B, L, D, seed=3)
    whole, sums = apply(layer_of({"experts_per_token": 2, "capacity_factor": None}), params, x, False)
    for training in (True, False):
        steps = [apply(layer, params, x[:, place:place + 1], training) for place in range(L)]
        assert all(each.dropped == 0 for _, each in steps)
        np.testing.assert_allclose(np.concatenate([y for y, _ in steps], axis=1), whole, atol=1e-6)
    assert apply(layer, params, x, True)[1].dropped > 0 and sums.dropped == 0


def test_groups_do_not_see_each_other():
    """A row alone gives what it gives in a batch; two rows of a group compete."""
    layer = layer_of({"capacity_factor": 0.5, "min_capacity": 1})
    params, x = params_of(layer), draw(B, L, D, seed=3)
    y, _ = apply(layer, params, x, True)
    for row in range(B):
        np.testing.assert_allclose(apply(layer, params, x[row:row + 1], True)[0], y[row:row + 1], atol=1e-6)
    one = layer_of({"capacity_factor": 0.5, "min_capacity": 1, "group_rows": B})
    assert np.any(apply(one, params, x, True)[0] != y)


@pytest.mark.parametrize("settings", [{}, {"capacity_factor": None, "experts_per_token": 2}], ids=str)
def test_bfloat16_is_near_float32(settings):
    """The router stays in float32: the same choices, but for the input's own rounding."""
    layer, half = layer_of(settings), layer_of(settings, dtype="bfloat16")
    params, x = params_of(layer), draw(B, L, D, seed=3).astype(jnp.bfloat16)
    y, sums = apply(layer, params, x.astype(jnp.float32), True)
    z, half_sums = apply(half, params, x, True)
    assert z.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(z), y, atol=0.03 * np.abs(y).max())
    jax.tree.map(np.testing.assert_array_equal, sums, half_sums)


@pytest.mark.parametrize("settings", [{"experts_per_token": 2, "capacity_factor": 0.7, "min_capacity": 1},
                                      {"experts_per_token": 2, "capacity_factor": None},
                                      CASES["experts"]], ids=["capacity", "blocks", "experts"])
@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)],
                         ids=["own leaves", "shared leaves"])
def test_it_works_under_vmap_checkpoint_and_scan(own, settings):
    """Stacks of networks, rematerialised layers and loops of layers: values and gradients of plain calls."""
    layer = layer_of(settings)
    trees = [params_of(layer, seed=seed) for seed in (0, 1)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if own else trees[0]
    x, share = jnp.stack([draw(B, L, D, seed=3), draw(B, L, D, seed=5)]), draw(B, L, D, seed=8)

    def total(params, x):
        return jnp.sum(layer.apply({"params": params}, x, False) * share)

    axes = (0 if own else None, 0)
    plain = [jax.value_and_grad(total, (0, 1))(trees[number if own else 0], x[number]) for number in (0, 1)]
    plain = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain)
    stacked = jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(total), (0, 1)), axes))(params, x)
    looped = jax.jit(lambda params, x: jax.lax.scan(
        lambda _, each: (None, jax.value_and_grad(jax.checkpoint(total), (0, 1))(*each)), None,
        (params if own else jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params), x))[1])(params, x)
    for found in (stacked, looped):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_experts_and_jitter_of_the_router():
    """Rates of the network and of the experts; jitter changes gates alone."""
    quiet, params, x = layer_of({}), params_of(layer_of({})), draw(B, L, D, seed=3)
    plain, _ = apply(quiet, params, x, True)
    dropped = SparseMlp(D, F, GATED, 0.5, jnp.dtype("float32"), SparseConfig(4))
    none = SparseMlp(D, F, GATED, 0.5, jnp.dtype("float32"), SparseConfig(4, expert_dropout=0.0))
    more = SparseMlp(D, F, GATED, 0.0, jnp.dtype("float32"), SparseConfig(4, expert_dropout=0.5))
    for layer, changes in ((dropped, True), (none, False), (more, True)):
        assert np.any(apply(layer, params, x, True)[0] != plain) == changes
        np.testing.assert_array_equal(apply(layer, params, x, False)[0], apply(quiet, params, x, False)[0])
    jitter = layer_of({"jitter": 0.01, "normalize_gates": True})
    sharp = jax.tree.map(lambda leaf: leaf, params)
    sharp["router"] = jax.tree.map(lambda leaf: 50.0 * leaf, params["router"])  # no choice flips
    y, sums = apply(jitter, sharp, x, True)
    z, plain_sums = apply(layer_of({"normalize_gates": True}), sharp, x, True)
    assert np.any(sums.z != plain_sums.z)
    np.testing.assert_array_equal(sums.choices, plain_sums.choices)
    np.testing.assert_allclose(y, z, atol=1e-6)  # the experts read x itself
    np.testing.assert_array_equal(apply(jitter, sharp, x, False)[1].z,
                                  apply(layer_of({"normalize_gates": True}), sharp, x, False)[1].z)


def test_a_fresh_layer_has_its_leaves():
    """Names, shapes and starts; beside token gates the task's weights start at 0."""
    shapes = {}
    for gate in ("token", "task", "both"):
        layer = layer_of({"gate": gate, **(TASKS if gate != "token" else {})})
        params = layer.init(jax.random.key(0), draw(B, L, D), True, None, draw(B, T))["params"]
        flat = jax.tree_util.tree_leaves_with_path(params)
        shapes[gate] = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
                        for path, leaf in flat}
        if gate != "token":
            assert np.any(params["router"]["task_weights"]["w"]["kernel"]) == (gate == "task")
    experts = {f"expert/{name}/kernel": shape
               for name, shape in (("wi_0", (4, D, F)), ("wi_1", (4, D, F)), ("wo", (4, F, D)))}
    token, task = {"router/router_weights/w/kernel": (D, 4)}, {"router/task_weights/w/kernel": (T, 4)}
    assert shapes == {"token": experts | token, "task": experts | task, "both": experts | token | task}


@pytest.mark.parametrize("task", [None, draw(B, T + 1), draw(B + 1, T)], ids=["none", "width", "rows"])
def test_a_task_gate_asks_for_the_tasks(task):
    """One error, before anything is computed."""
    layer = layer_of({"gate": "both", **TASKS})
    with pytest.raises(InputError, match=r"(?s)lacks the vectors of the rows' tasks.*\(4, 3\)"):
        layer.apply({"params": params_of(layer)}, draw(B, L, D), True, None, task)
