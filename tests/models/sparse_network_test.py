"""Sparse layers inside of networks: masks, reports, layouts, what a decoder may look at, what is refused."""

import dataclasses

import family_rows as made
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_networks as sparse

from elm_jax.errors import InputError
from elm_jax.models import AdapterConfig, T5Config, families
from elm_jax.models.blocks import layer_stack, router_losses
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import Layout, frozen_depth
from elm_jax.models.t5x_module import T5XTransformer
from elm_jax.runtime import trees

BOTH = pytest.mark.parametrize("name", list(sparse.CONFIGS))
BOTH_IN_TIME = pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.slow), "decoder"])
LOSSES = LossConfig(balance_loss=0.01, router_z_loss=1e-3)


def loss_of(net, params, batch, settings=LOSSES, seed=None):
    rng = None if seed is None else jax.random.key(seed)
    return jax.jit(lambda params: net.loss(params, batch, rng, settings))(params)


def assert_close(found, expected, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@BOTH_IN_TIME
def test_a_layout_changes_nothing(name):
    """Losses, reports and gradients, with dropout, of a stack whose sparse layers have dense ones between."""
    settings = {"capacity_factor": 0.6, "min_capacity": 1, "jitter": 0.1, "step": 2, "offset": 0}

    def both(layout):
        net = sparse.network(name, layout, **settings)
        net = dataclasses.replace(net, config=dataclasses.replace(net.config, dropout_rate=0.1))
        params, batch = sparse.parameters(net), sparse.batch_of(net)

        def total(params):
            sums = net.loss(params, batch, jax.random.key(1), LOSSES)
            return sums.total() / sums.weight, sums

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    expected = both(Layout())
    (_, sums), _ = expected
    assert set(sums.router) == {"t5": {"encoder/layers_0", "encoder/layers_2", "decoder/layers_0"},
                                "decoder": {"decoder/layers_0", "decoder/layers_2"}}[name]
    assert all(float(report.dropped) > 0 for report in sums.router.values())
    assert_close(both(Layout("layer", scan_layers=True)), expected)


def test_layers_that_are_all_sparse_run_as_one_loop():
    plain = sparse.network("decoder", step=1)
    params, batch = sparse.parameters(plain), sparse.batch_of(plain)
    expected = loss_of(plain, params, batch, seed=0)
    assert len(expected.router) == 4
    for layout in (Layout("dots"), Layout(scan_layers=True)):
        assert_close(loss_of(sparse.network("decoder", layout, step=1), params, batch, seed=0), expected)


def test_a_loop_keeps_routers_in_float32():
    """Kernels are stacked in the dtype in which they are multiplied; a router computes in float32."""
    params = sparse.network("decoder", step=1).abstract_params()["decoder"]
    leaves = jax.eval_shape(lambda: layer_stack._stack(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params), range(4), jnp.dtype("bfloat16")))
    kernels = {path: leaf.dtype for path, leaf in trees.flatten(leaves).items() if path.endswith("/kernel")}
    assert {path for path, dtype in kernels.items() if dtype == jnp.float32} == {
        "mlp/router/router_weights/w/kernel"}
    assert kernels["mlp/expert/wo/kernel"] == jnp.bfloat16


@BOTH
def test_padding_is_in_no_report_and_takes_no_share(name):
    net = sparse.network(name, capacity_factor=8.0)
    params = sparse.parameters(net)
    batch, wide = (sparse.batch_of(net, lengths=lengths) for lengths in (
        sparse.LENGTHS, {"inputs": 17, "targets": 12}))
    found, sums = (loss_of(net, params, each, seed=0) for each in (wide, batch))
    assert_close(found, sums)
    if name == "decoder":
        real = {"decoder": (batch["segment_ids"] > 0).sum()}
    else:  # id 0 is a token of each input too
        real = {"encoder": (batch["encoder_input_tokens"] != 0).sum() + 7,
                "decoder": batch["decoder_loss_weights"].sum()}
    for layer, report in sums.router.items():
        assert float(report.tokens) == real[layer.split("/")[0]], layer
        assert float(report.choices.sum()) == 2 * float(report.tokens)
        assert float(report.probs.sum()) == pytest.approx(float(report.tokens), rel=1e-5)


@BOTH
def test_one_expert_with_gates_of_one_is_the_dense_network(name):
    net = sparse.network(name, num_experts=1, experts_per_token=1, normalize_gates=True, step=1)
    dense = families.network_of(sparse.CONFIGS[name])
    params = trees.flatten(sparse.parameters(dense))
    own = {path.replace("/mlp/", "/mlp/expert/"): leaf[None] for path, leaf in params.items()
           if "/mlp/" in path} | {path: leaf for path, leaf in params.items() if "/mlp/" not in path}
    routers = {path: leaf for path, leaf in trees.flatten(sparse.parameters(net)).items()
               if "/router/" in path}
    batch = sparse.batch_of(net)
    expected = loss_of(dense, trees.unflatten(params), batch, LossConfig())
    assert expected.router == {} == expected.auxiliary
    found = loss_of(net, trees.unflatten({**own, **routers}), batch, LossConfig(), seed=0)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)


@BOTH
@pytest.mark.parametrize("settings", [
    {"experts_per_token": 1}, {"experts_per_token": 2, "normalize_gates": True},
    {"choice": "experts", "eval_capacity_factor": 0.5, "experts_per_token": 2},
], ids=["K=1", "K=2", "experts choose"])
def test_no_token_of_a_decoder_looks_ahead(name, settings):
    """In training, where choices are dropped: later tokens change, earlier logits do not."""
    if name == "decoder" and "choice" in settings:
        with pytest.raises(InputError, match="may not depend on later tokens"):
            sparse.network(name, **settings)
        return
    net = sparse.network(name, capacity_factor=0.5, min_capacity=1, **settings)
    params, batch = sparse.parameters(net), sparse.batch_of(net, lengths={"inputs": 10, "targets": 10})
    key = "tokens" if name == "decoder" else "decoder_input_tokens"
    logits = jax.jit(lambda tokens: net.logits(params, {**batch, key: tokens},
                                               dropout_rng=jax.random.key(0)))
    tokens = np.array(batch[key])
    changed = tokens.copy()
    changed[:, 4:] = (changed[:, 4:] + 5) % made.VOCAB_SIZE
    left, right = (np.asarray(logits(each)) for each in (tokens, changed))
    np.testing.assert_allclose(left[:, :4], right[:, :4], rtol=0, atol=1e-5)
    assert np.abs(left[:, 4:] - right[:, 4:]).max() > 1e-3
    report = loss_of(net, params, batch, seed=0).router["decoder/layers_1"]
    assert float(report.dropped) > 0 and float(report.choices.sum()) == (
        net.config.sparse.experts_per_token * float(report.tokens))


def test_experts_choose_in_the_encoder_alone():
    net = sparse.network("t5", choice="experts", capacity_factor=1.0, eval_capacity_factor=1.0)
    own = net.config.sparse.of_decoder()
    assert (own.choice, own.experts_per_token, own.eval_capacity_factor) == ("tokens", 2, None)
    assert sparse.network("t5", order="probability").config.sparse.of_decoder().order == "position"
    params, config = sparse.parameters(net), net.config
    inputs, targets = made.rows(config, (3,), 8), made.choices(config, 3, 1, 6)
    score = jax.jit(net.target_log_probs)
    whole = np.asarray(score(params, inputs, targets))[:, 0]
    cache, token = jax.jit(net.start, static_argnums=2)(params, inputs, 6)
    step = jax.jit(net.step)
    for place in range(6):  # teacher forcing
        logits, cache = step(params, cache, token)
        token = targets.tokens[:, 0, place]
        found = np.asarray(jax.nn.log_softmax(logits))[np.arange(3), token]
        counted = place < targets.lengths[:, 0]
        np.testing.assert_allclose(found[counted], whole[counted, place], rtol=0, atol=1e-5)
    # A row's company changes nothing: it is a group of its own.
    moved = jax.tree.map(lambda array: array[[2, 2, 0]], (inputs, targets))
    np.testing.assert_allclose(score(params, *moved)[:, 0], whole[[2, 2, 0]], rtol=0, atol=1e-5)


def test_choices_side_by_side_do_not_compete_for_places():
    """A decoder scores the choices of a row in one row: a choice's score is as without the others."""
    net = sparse.network("decoder", eval_capacity_factor=0.5, min_capacity=1, step=4)
    params, config = sparse.parameters(net), net.config
    assert any(report.dropped > 0 for report in loss_of(net, params, sparse.batch_of(net)).router.values())
    inputs, targets = made.rows(config, (2,), 8), made.choices(config, 2, 3, 6)
    score = jax.jit(net.target_log_probs)
    whole = score(params, inputs, targets)
    again = score(params, inputs, jax.tree.map(lambda array: array[:, [2, 2, 2]], targets))
    np.testing.assert_allclose(again[:, 0], whole[:, 2], rtol=0, atol=1e-5)


def report_of(rng, experts):
    tokens = 50.0
    probs = rng.dirichlet(np.ones(experts), 50).sum(axis=0)
    choices = rng.multinomial(100, np.ones(experts) / experts).astype(np.float32)
    return RouterSums(*map(np.float32, (choices, probs, tokens, 3.0, rng.uniform(10, 20), 4.0)))


def test_losses_are_their_formulas_by_layer():
    rng = np.random.default_rng(0)
    reports = {f"encoder/layers_{index}": report_of(rng, 6) for index in range(3)}
    balance, z = [], []
    for report in reports.values():
        pairs = zip(report.choices, report.probs, strict=True)
        balance.append(6 * sum(float(f) / 50 * float(p) / 50 for f, p in pairs))
        z.append(float(report.z) / 50)
    assert float(router_losses.balance_loss(reports)) == pytest.approx(np.mean(balance), rel=1e-6)
    assert float(router_losses.router_z_loss(reports)) == pytest.approx(np.mean(z), rel=1e-6)


def test_an_even_load_has_a_balance_of_k_and_collapse_one_of_all_experts():
    even = RouterSums(np.full(4, 25.0), np.full(4, 12.5), 50.0, 0.0, 0.0, 0.0)
    assert float(router_losses.balance_loss({"a": even})) == pytest.approx(2.0)
    on = [RouterSums(*(50.0 * np.eye(4)[expert] for _ in range(2)), 50.0, 0.0, 0.0, 0.0) for expert in (0, 1)]
    # Each layer by itself: two that collapse on different experts are not balanced.
    assert float(router_losses.balance_loss({"a": on[0], "b": on[1]})) == pytest.approx(4.0)
    nothing = RouterSums(np.zeros(4), np.zeros(4), 0.0, 0.0, 0.0, 0.0)
    assert float(router_losses.balance_loss({"a": nothing})) == 0.0


@BOTH
def test_losses_of_routers_are_auxiliary_and_pull_at_the_routers(name):
    net = sparse.network(name)
    params, batch = sparse.parameters(net), sparse.batch_of(net)

    def auxiliary(params):
        sums = net.loss(params, batch, jax.random.key(0), LOSSES)
        return sum(sums.auxiliary.values()), sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(auxiliary, has_aux=True))(params)
    assert set(sums.auxiliary) == {"balance_loss", "router_z_loss"}
    for loss, coefficient, function in (("balance_loss", 0.01, router_losses.balance_loss),
                                        ("router_z_loss", 1e-3, router_losses.router_z_loss)):
        assert float(sums.auxiliary[loss]) == pytest.approx(
            coefficient * float(function(sums.router)) * float(sums.weight), rel=1e-5)
    routers = [leaf for path, leaf in trees.flatten(gradient).items() if "/router/" in path]
    assert routers and all(float(jnp.abs(leaf).max()) > 0 for leaf in routers)


def test_a_large_vocabulary_s_loss_has_them_too(monkeypatch):
    """The path that never holds all logits."""
    net = sparse.network("decoder", step=4)
    params, batch = sparse.parameters(net), sparse.batch_of(net)
    expected = loss_of(net, params, batch, seed=0)
    monkeypatch.setattr("elm_jax.models.decoder.network.num_parts", lambda *_: 2)
    monkeypatch.setattr("elm_jax.models.blocks.head_loss.num_parts", lambda *_: 2)

    def total(params):
        sums = net.loss(params, batch, jax.random.key(0), LOSSES)
        return sums.total(), sums

    frozen_head = jax.jit(lambda rest, head: jax.value_and_grad(lambda rest: total(
        {**rest, "head": head}), has_aux=True)(rest))
    rest = {name: leaf for name, leaf in params.items() if name != "head"}
    (_, sums), gradient = frozen_head(rest, params["head"])
    assert_close(sums, expected)
    plain = jax.jit(jax.grad(lambda params: total(params)[0]))(params)
    assert_close(gradient, {name: leaf for name, leaf in plain.items() if name != "head"}, 1e-4)


def test_settings_without_a_layer_are_refused():
    with pytest.raises(InputError, match="No layer is sparse"):
        dataclasses.replace(sparse.T5, sparse=SparseConfig(4, step=4))
    with pytest.raises(InputError, match="No layer is sparse"):
        dataclasses.replace(sparse.DECODER, sparse=SparseConfig(4, step=0))
    with pytest.raises(InputError, match=r"(?s)no effect.*decoder_step"):
        dataclasses.replace(sparse.DECODER, sparse=SparseConfig(4, decoder_step=1))
    assert dataclasses.replace(sparse.T5, sparse=SparseConfig(4, step=0, decoder_step=1)).sparse


def test_projections_of_experts_carry_no_adapters():
    lora = AdapterConfig(kind="lora", rank=2, targets=["wi_0", "query"])
    config = sparse.network("decoder", step=2).config.with_adapter(lora)
    paths = list(trees.flatten(families.network_of(config).abstract_params()))
    assert {path.split("/")[1] for path in paths if "wi_0_adapter" in path} == {"layers_0", "layers_2"}
    lora.check_used(paths)
    every = sparse.network("decoder", step=1).config
    bare = AdapterConfig(kind="scaling", targets=["hidden"])
    for adapter, expected in ((AdapterConfig(kind="lora", rank=2, targets=["wi_0"]), "no such projection"),
                              (bare, "none of the places")):
        paths = trees.flatten(families.network_of(every.with_adapter(adapter)).abstract_params())
        with pytest.raises(InputError, match=expected):
            adapter.check_used(paths)


@pytest.mark.parametrize(("name", "deepest"), [("t5", 3), ("decoder", 4)])
def test_a_trunk_ends_where_tokens_compete(name, deepest):
    """States are kept by the segment: they may not depend on what else is in the row."""
    assert frozen_depth(sparse.network(name), []) == deepest
    assert frozen_depth(sparse.network(name, eval_capacity_factor=2.0), []) == 1
    fixed = sparse.network(name, capacity_factor=None, capacity=3)
    assert frozen_depth(fixed, []) == 1


@BOTH_IN_TIME
def test_a_frozen_trunk_has_no_report(name):
    net = dataclasses.replace(sparse.network(name), trunk=2)
    params, batch = sparse.parameters(net), sparse.batch_of(net)
    sums = loss_of(net, params, batch, seed=0)
    assert not {f"{stack}/layers_{layer}" for stack in ("encoder", "decoder") for layer in (0, 1)
                if stack == "encoder" or name == "decoder"} & set(sums.router)
    tokens, segments = net.trunk_rows(batch)
    given = {**batch, "trunk_states": jax.jit(net.trunk_states)(params, tokens, segments)}
    assert_close(loss_of(net, params, given, seed=0), sums)


def test_t5x_runs_no_sparse_network():
    token = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(InputError, match="does not run sparse networks under T5X"):
        T5XTransformer(sparse.network().config).init(jax.random.key(0), token, token, token)


def test_configs_of_layers_say_which_are_sparse():
    config = T5Config(made.VOCAB_SIZE, 16, 2, 8, 32, 4, 4, sparse=SparseConfig(2, step=2, decoder_step=4))
    leaves = trees.flatten(families.network_of(config).abstract_params())
    found = {path.rsplit("/mlp/")[0] for path in leaves if "/router/" in path}
    assert found == {"encoder/layers_1", "encoder/layers_3", "decoder/layers_3"}
    assert {path.rsplit("/mlp/")[0] for path in leaves if "/mlp/wi_0/" in path} == {
        f"{stack}/layers_{layer}" for stack in ("encoder", "decoder") for layer in range(4)} - found
