"""Training of sparse networks: losses, metrics, resuming, frozen leaves, experts as leaves of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_networks as sparse
import tiny_run
from t5_rows import FORM

from elm_jax.data.arrays.cursor import TrainStream
from elm_jax.errors import InputError
from elm_jax.experts.overlay import FREEZES, frozen_by
from elm_jax.models import T5Config, families
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.losses import LossConfig
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps
from elm_jax.training.loop import fit
from elm_jax.training.optimizers import OptimizerConfig, make_optimizer
from elm_jax.training.run_settings import RunConfig, StackConfig, check_losses
from elm_jax.training.stack import stacked_step
from elm_jax.training.stack.slots import Opened, StackedRun
from elm_jax.training.stack.stacked_loop import StackCallbacks, fit_stack
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_config import TrainConfig

LOSSES = LossConfig(balance_loss=0.01, router_z_loss=1e-3)
NETWORK = families.network_of(T5Config(
    64, 32, 4, 8, 64, 2, 2, dropout_rate=0.1, sparse=SparseConfig(4, capacity_factor=1.0, min_capacity=1,
                                                                 jitter=0.01, expert_dropout=0.2)))
ADAFACTOR = OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=8, parameter_scale=True)


def train(model_dir, train_steps, freeze=None, network=NETWORK, **options):
    """A run of every leaf that is not frozen, on one device."""
    params = sparse.parameters(network)
    frozen, overlay = trees.split(params, frozen_by(network, freeze))
    source = TrainStream(tiny_run.CopySource(), form=FORM, batch_size=8, lengths=tiny_run.LENGTHS, seed=5,
                         pack=True)
    run = RunConfig(**{"train_steps": train_steps, "random_seed": 3, "model_dir": model_dir, "name": None,
                       "checkpoint_period": 7, "optimizer": ADAFACTOR, "loss": LOSSES, **options})
    return fit(network, frozen, overlay, source, run, sharding.make_mesh(1, 1))


def losses(result):
    return [row["loss"] for row in result.rows]


def test_twenty_steps_learn_and_two_sessions_are_one(tmp_path):
    whole = train(None, 20)
    assert np.mean(losses(whole)[-3:]) < 0.9 * np.mean(losses(whole)[:3])
    for row in whole.rows:
        assert 0.01 * 0.9 < row["balance_loss"] < 0.04 and row["router_z_loss"] > 0
        assert all(isinstance(value, int | float) for value in row.values()) and "router" not in row
    train(str(tmp_path), 6)
    again = train(str(tmp_path), 20)
    assert losses(again) == losses(whole)
    found, expected = jax.device_get((again.overlay, whole.overlay))
    assert trees.fingerprint(found) == trees.fingerprint(expected)


PARTS = {"gate": ("/router/",), "experts": ("/expert/",), "sparse layers": ("/router/", "/expert/")}


def test_frozen_leaves_are_those_that_are_named():
    params = trees.flatten(sparse.parameters(NETWORK))
    assert set(PARTS) == {freeze for freeze in FREEZES if not freeze.startswith("all but")}
    for freeze, parts in PARTS.items():
        named = {path for path in params if any(part in path for part in parts)}
        assert named and set(filter(frozen_by(NETWORK, freeze), params)) == named


def test_vectors_of_tasks_may_train_alone_or_with_the_experts():
    network = sparse.network(gate="both", tasks=("a", "b"), task_dim=3)
    params = trees.flatten(network.abstract_params())
    table = {"task_embedder/embedding"}
    for freeze, trained in (("all but task vectors", table), ("all but task vectors and experts", {
            *table, *(path for path in params if "/expert/" in path)})):
        assert set(params) - set(filter(frozen_by(network, freeze), params)) == trained
        with pytest.raises(InputError, match=r"nothing to train: the network's gates read no tasks"):
            frozen_by(NETWORK, freeze)
    assert table <= set(filter(frozen_by(network, "gate"), params))


def test_all_leaves_train_but_frozen_ones():
    params = trees.flatten(sparse.parameters(NETWORK))
    trained = trees.flatten(jax.device_get(train(None, 2, "experts").overlay))
    assert {path for path in params if path not in trained} == {path for path in params if "/expert/" in path}
    assert not {path for path, leaf in trained.items() if np.array_equal(leaf, params[path])}


def test_what_a_network_has_not_cannot_be_frozen():
    dense = families.network_of(sparse.T5)
    assert not any(map(frozen_by(dense, None), trees.flatten(dense.abstract_params())))
    with pytest.raises(InputError, match="nothing to freeze: the network has no sparse layer"):
        frozen_by(dense, "gate")
    with pytest.raises(InputError, match=r"(?s)'gates'.*nearest: gate"):
        frozen_by(NETWORK, "gates")
    config = functools.partial(TrainConfig, model_dir="run", task="task", initial_checkpoint_path="base",
                               train_steps=1)
    assert config(kind="dataset", freeze="experts").freeze == "experts"
    with pytest.raises(InputError, match=r"(?s)no effect: the base is frozen.*'prompt'"):
        config(freeze="experts")


def step_of(network, batch, config=None, num_steps=1, **options):
    """(state, metrics) after steps on one batch."""
    config = config or steps.StepConfig(network, OptimizerConfig("adamw", 1e-2), **options)
    step = jax.jit(functools.partial(steps.train_step, config, {}))
    state = states.create_state(sparse.parameters(network), config.optimizer)
    for _ in range(num_steps):
        state, metrics = step(state, batch, np.uint32(1), np.int32(10))
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.slow), "decoder"])
def test_microbatches_change_neither_gradient_nor_report(name):
    """With groups of a row nothing depends on the cut, but the balance loss of each part."""
    net = sparse.network(name, capacity_factor=0.7, min_capacity=1)
    batch = sparse.batch_of(net)
    one, parts = (step_of(net, batch, loss=LossConfig(router_z_loss=0.0), num_microbatches=number)
                  for number in (1, 4))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=2e-5)
    layers = one[1]["router"]
    assert set(layers) == {"t5": {"encoder/layers_1", "decoder/layers_1"},
                           "decoder": {"decoder/layers_1", "decoder/layers_3"}}[name]
    assert all(report.dropped > 0 and report.choices.shape == (4,) for report in layers.values())
    metrics = step_of(net, batch, loss=LOSSES, num_microbatches=4)[1]
    assert 0.02 * 0.8 < metrics["balance_loss"] < 0.08


def test_training_has_its_capacity_without_dropout_too():
    """Evaluation drops nothing here; whether a network trains is not told from its rate of dropout."""
    net = sparse.network("decoder", capacity_factor=0.5, min_capacity=1)
    batch, params = sparse.batch_of(net), sparse.parameters(net)
    metrics = step_of(net, batch)[1]
    assert sum(report.dropped for report in metrics["router"].values()) > 0
    unused = jax.jit(lambda params: net.loss(params, batch, None))(params)
    assert sum(float(report.dropped) for report in unused.router.values()) == 0
    _, without = steps.batch_loss(params, {}, net, LossConfig(), batch, None)
    assert float(without.loss) == pytest.approx(float(unused.loss), rel=1e-6)


def test_a_stack_takes_the_steps_of_its_experts():
    net = sparse.network("decoder", capacity_factor=0.7, min_capacity=1)
    config = steps.StepConfig(net, OptimizerConfig("adamw", 1e-2), LOSSES)
    batches = [sparse.batch_of(net, seed=seed) for seed in (0, 1)]
    overlay = sparse.parameters(net)
    spec = steps.make_spec(config, {}, overlay, batches[0], sharding.make_mesh(1, 1))
    stack = stacked_step.make_stack_spec(spec, 2)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), states.create_state(overlay, config.optimizer))
    slots = stacked_step.Slots(np.uint32([1, 1]), np.int32([10, 10]), np.float32([1e-2, 1e-2]),
                               np.array([True, True]))
    batch = stacked_step.put_stacked(batches, stack)
    after, metrics = jax.device_get(jax.jit(functools.partial(stacked_step.stacked_step, stack, {}))(
        state, batch, slots))
    for number, own in enumerate(batches):
        alone, expected = step_of(net, own, config)
        for left, right in zip(jax.tree.leaves(metrics), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(left[number], right, rtol=1e-5, atol=1e-6)
        for left, right in zip(jax.tree.leaves(after.overlay), jax.tree.leaves(alone.overlay), strict=True):
            assert np.mean(np.abs(left[number] - right) > 1e-5) <= 1e-3


def test_a_loss_without_a_sparse_layer_is_refused_everywhere(tmp_path):
    dense = families.network_of(sparse.T5)
    expected = r"(?s)This loss has no effect: no layer is sparse.*LossConfig\.balance_loss"
    with pytest.raises(InputError, match=expected):
        train(str(tmp_path / "solo"), 2, network=dense)
    with pytest.raises(InputError, match=expected):
        PretrainConfig(str(tmp_path / "pretrain"), sparse.T5, ("passages",), loss=LOSSES)
    with pytest.raises(InputError, match=r"nothing to freeze"):
        PretrainConfig(str(tmp_path / "pretrain"), sparse.T5, ("passages",), freeze="gate")
    net, source = tiny_run.network(), tiny_run.stream()
    overlay, frozen = trees.split(tiny_run.parameters(net), tiny_run.is_prompt_leaf)
    run = StackedRun("one", 0, 1e-3, "digest", lambda: Opened(overlay, source, 2, []), str(tmp_path / "run"),
                     {})
    settings = StackConfig(size=1, model_dir=str(tmp_path / "stack"), loss=LOSSES)
    with pytest.raises(InputError, match=expected):
        fit_stack(net, frozen, [run], settings, sharding.make_mesh(1, 1), StackCallbacks(on_end=print))
    assert not any(tmp_path.iterdir())
    above = dataclasses.replace(sparse.network("decoder"), trunk=4)
    with pytest.raises(InputError, match="no layer is sparse above the frozen ones"):
        check_losses(LOSSES, above)
    check_losses(LOSSES, dataclasses.replace(above, trunk=3))
    check_losses(LossConfig(), dense)


def test_settings_of_losses_leave_older_digests_as_they_were():
    config = functools.partial(TrainConfig, model_dir="run", task="task", initial_checkpoint_path="base",
                               train_steps=1, kind="dataset")
    assert not {"loss", "freeze"} & set(config().deciding())
    assert config(loss=LOSSES).deciding()["loss"]["balance_loss"] == 0.01
    assert LossConfig().facts() == {"label_smoothing": 0.0, "z_loss": 0.0}
    assert len({config(**more).digest() for more in ({}, {"loss": LOSSES}, {"freeze": "gate"})}) == 3


EXPERTS = {"layers_0": {"mlp": {"expert": {"wi": {"kernel": (40, 12, 20)}, "wo": {"kernel": (40, 20, 12)}},
                                "router": {"kernel": (12, 40)}}}}
"""More experts than features: optax factors over the two largest dimensions, whatever they are."""


@pytest.mark.parametrize("config", [
    OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=8),
    OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=16, parameter_scale=True),
    OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=8, parameter_scale=True, weight_decay=0.1),
    OptimizerConfig("adamw", 1e-2, weight_decay=0.1)], ids=["factored", "whole", "decayed", "adamw"])
def test_each_expert_is_optimised_as_if_alone(config):
    rng = np.random.default_rng(0)
    shapes = trees.flatten(EXPERTS)
    params = {path: rng.normal(0, 1, shape).astype(np.float32) for path, shape in shapes.items()}
    scales = {path: 10.0 ** rng.uniform(-2, 2, (shape[0], *[1] * (len(shape) - 1)))
              for path, shape in shapes.items()}  # of unlike experts
    grads = [{path: (scales[path] * rng.normal(0, 1, shape)).astype(np.float32)
              for path, shape in shapes.items()} for _ in range(3)]

    def run(params, grads):
        params = trees.unflatten(params)
        optimizer = make_optimizer(config, 10)
        state = optimizer.init(params)
        for grad in grads:
            updates, state = optimizer.update(trees.unflatten(grad), state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return trees.flatten(params)

    found = jax.jit(run)(params, grads)
    for path, shape in shapes.items():
        if "/expert/" not in path:
            alone = run({path: params[path]}, [{path: grad[path]} for grad in grads])
            np.testing.assert_allclose(found[path], alone[path], rtol=1e-5, atol=1e-6)
            continue
        for expert in range(shape[0]):
            alone = run({"leaf": params[path][expert]}, [{"leaf": grad[path][expert]} for grad in grads])
            np.testing.assert_allclose(found[path][expert], alone["leaf"], rtol=1e-5, atol=1e-6)


def test_statistics_of_experts_are_split_as_the_experts_are():
    net = sparse.network("decoder", num_experts=64, step=1)
    params = net.abstract_params()
    config = OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=8)
    shapes = states.abstract_state(params, config).opt_state[0]
    assert jax.tree.structure(shapes.v) == jax.tree.structure(params)
    mesh = sharding.make_mesh(1, 2, 4)
    found = states.shardings_of_state(net, params, config, mesh).opt_state[0]
    path = "decoder/layers_0/mlp/expert/wi_0/kernel"
    rows, columns = (trees.flatten(tree)[path] for tree in (shapes.v_row, shapes.v_col))
    assert (rows.shape, columns.shape) == ((64, 24), (64, 32))  # means over F, and over D
    rows, columns = (trees.flatten(tree)[path].spec for tree in (found.v_row, found.v_col))
    assert (tuple(rows), tuple(columns)) == (("experts", None), ("experts", "model"))
