"""Remat policies and scanned layers: the same losses, on one device and on meshes; the same tree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from elm_jax.errors import InputError
from elm_jax.models.blocks import layer_stack
from elm_jax.models.network import REMAT
from elm_jax.models.t5.network import Layout, T5Network
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps
from elm_jax.training.loop import fit
from elm_jax.training.run_settings import RunConfig

NUM_STEPS = 4
FSDP = (("embed", "data"),)


def network(kind: str, layout: Layout = Layout(), dropout: float = 0.1) -> T5Network:  # noqa: B008
    config = tiny_run.network(adapter=kind == "prompt", dropout=dropout).config
    return T5Network(dataclasses.replace(config, num_encoder_layers=3, num_decoder_layers=2), layout)


def overlay_of(kind: str) -> tuple[dict, dict]:
    base = tiny_run.parameters(network(kind))
    return base, trees.split(base, tiny_run.is_prompt_leaf if kind == "prompt" else lambda path: True)[0]


@functools.cache
def run(kind, layout=Layout(), mesh=(1, 1), rules=(), dropout=0.1, parts=1, dtype=None):  # noqa: B008
    base, overlay = overlay_of(kind)
    settings = RunConfig(train_steps=NUM_STEPS, optimizer=tiny_run.ADAMW, rules=sharding.make_rules(rules),
                         num_microbatches=parts, base_dtype=dtype, name=None)
    return fit(network(kind, layout, dropout), base, overlay, tiny_run.stream(), settings,
               sharding.make_mesh(*mesh))


def losses(*arguments, **options) -> list[float]:
    return [row["loss"] for row in run(*arguments, **options).rows]


def check_losses(kind, layout, mesh=(1, 1), rules=(), parts=1):
    """A layout's losses are those of the plain layout, dropout included."""
    expected, found = losses(kind, parts=parts), losses(kind, layout, mesh, rules, parts=parts)
    assert len(expected) == NUM_STEPS
    if mesh != (1, 1):  # a mesh adds up in another order, which AdamW enlarges where a gradient is near zero
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=f"{kind} {layout} {mesh}")
        expected = losses(kind, mesh=mesh, rules=rules, parts=parts)
    np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"{kind} {layout} {mesh}")


@pytest.mark.slow  # the default suite has a decoder's
def test_a_scan_that_computes_layers_again_has_the_losses_of_the_plain_layout():
    """Dropout is on: each layer's masks follow from the step and the layer's number, in a loop or not."""
    check_losses("prompt", Layout("layer", True))


@pytest.mark.slow
def test_every_layout_has_the_losses_of_the_plain_one():
    check_losses("dataset", Layout("layer", True), (2, 4), FSDP)
    check_losses("dataset", Layout("layer", True))
    check_losses("prompt", Layout("dots", True), (8, 1), FSDP)
    check_losses("prompt", Layout("none", True), (4, 2), parts=2)
    check_losses("dataset", Layout("dots", False))
    check_losses("dataset", Layout("layer", False), (8, 1), FSDP)
    check_losses("dataset", Layout("none", True), (2, 2), FSDP, 2)


@pytest.mark.slow
def test_layouts_agree_without_dropout_too():
    expected = losses("dataset", dropout=0.0)
    found = losses("dataset", Layout("layer", True), (4, 2), FSDP, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.allclose(expected, losses("dataset"), rtol=1e-3)


def test_a_trained_tree_has_one_folder_a_layer_whatever_the_layout():
    found = run("prompt", Layout("layer", True)).overlay
    _, overlay = overlay_of("prompt")
    assert trees.first_difference(found, overlay) is None
    assert "layers_2" in found["encoder"] and "layers" not in found["encoder"]


def test_layers_drop_unlike_features():
    """Were the layers' keys equal, all layers of a scan would drop the same."""
    keys = jax.random.split(jax.random.key(0), 3)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 3
    seen = []

    class Layer(layer_stack.nn.Module):
        @layer_stack.nn.compact
        def __call__(self, x, deterministic):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
            return x + keep * self.param("scale", lambda key: jnp.ones(()))

    def through(layout):
        params = {f"layers_{index}": {"scale": jnp.float32(10.0**index)} for index in range(3)}
        stack = layer_stack.LayerStack(Layer(), 3, jnp.dtype("float32"), layout)
        return layer_stack.run_layers(stack, params, jnp.zeros((1, 2, 20)), (), jax.random.key(1))

    seen = [np.asarray(through(Layout(scan_layers=scan))) for scan in (False, True)]
    assert np.array_equal(*seen)
    digits = [(seen[0] // 10**index) % 10 for index in range(3)]
    assert not np.array_equal(digits[0], digits[1]) and not np.array_equal(digits[1], digits[2])


def spec(kind: str, layout: Layout, dtype: str | None = None) -> steps.StepSpec:
    net, mesh = network(kind, layout), sharding.make_mesh(1, 1)
    base, overlay = overlay_of(kind)
    frozen, _ = trees.split(base, lambda path: path not in trees.flatten(overlay))
    frozen = states.frozen_leaves(net, frozen, mesh, dtype=dtype)
    rows = tiny_run.stream(pack=False).batch(0)
    batch = {name: np.repeat(array, 16, axis=1) for name, array in rows.items()}
    return steps.make_spec(steps.StepConfig(net, tiny_run.ADAMW), frozen, overlay, batch, mesh)


@pytest.mark.slow
def test_less_is_kept_where_more_is_computed_again():
    temporaries = {
        remat: steps.compile_step(spec("dataset", Layout(remat, True))).memory_analysis().temp_size_in_bytes
        for remat in REMAT
    }
    assert temporaries["layer"] < 0.8 * temporaries["none"]
    assert temporaries["layer"] < temporaries["dots"] < temporaries["none"]


def test_frozen_leaves_are_stacked_once_and_only_if_layers_are_scanned():
    net, mesh = network("prompt", Layout(scan_layers=True)), sharding.make_mesh(2, 4)
    base, overlay = overlay_of("prompt")
    frozen, _ = trees.split(base, lambda path: path not in trees.flatten(overlay))
    rules = sharding.make_rules(FSDP)
    found = trees.flatten(states.frozen_leaves(net, frozen, mesh, rules, "bfloat16"))
    path = "encoder/layers/mlp/wi_0/kernel"
    assert found[path].dtype == jnp.bfloat16 and found[path].shape == (3, 32, 64)
    assert {shard.data.shape for shard in found[path].addressable_shards} == {(3, 16, 16)}
    alone = trees.flatten(frozen)
    expected = np.stack([alone[f"encoder/layers_{index}/mlp/wi_0/kernel"] for index in range(3)])
    assert np.array_equal(found[path], expected.astype(jnp.bfloat16))
    assert found["encoder/relpos_bias/rel_embedding"].dtype == np.float32
    # From leaves that are on the mesh already, and as shapes alone, the same.
    on_mesh = sharding.put_tree(frozen, states.shardings_of_params(net, frozen, mesh, rules))
    again = trees.flatten(states.frozen_leaves(net, on_mesh, mesh, rules, "bfloat16"))
    shapes = states.frozen_leaves(net, states.abstract(frozen), mesh, rules, "bfloat16")
    assert trees.first_difference(trees.unflatten(found), shapes) is None
    for name, leaf in found.items():
        assert np.array_equal(leaf, again[name]) and leaf.sharding == again[name].sharding, name
    plain = states.frozen_leaves(network("prompt"), frozen, mesh, rules)
    assert trees.first_difference(plain, frozen) is None


@pytest.mark.slow
def test_a_base_in_bfloat16_trains_the_same_overlay_within_its_rounding():
    found, expected = losses("prompt", dtype="bfloat16"), losses("prompt")
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert found != expected
    rounded = spec("prompt", Layout(), "bfloat16")
    held = {path: dtype for path, _, dtype in rounded.frozen}
    assert {dtype for path, dtype in held.items() if path.endswith("/kernel")} == {"bfloat16"}
    assert {dtype for _, _, dtype in rounded.overlay} == {"float32"}


def test_a_stacked_leaf_has_the_axes_of_its_layers_and_layers_are_counted_in_order():
    net = network("dataset")
    assert net.axes_of("encoder/layers/mlp/wo/kernel") == ("layers", "mlp", "embed")
    assert net.axes_of("encoder/layers_1/mlp/wo/kernel") == ("mlp", "embed")
    assert net.axes_of("encoder/layers/nothing") is None
    names = layer_stack.stacked_names(f"decoder/layers_{index}/mlp/wo/kernel" for index in range(11))
    assert names == {"decoder/layers/mlp/wo/kernel":
                     [f"decoder/layers_{index}/mlp/wo/kernel" for index in range(11)]}


@pytest.mark.parametrize("wrong", [{"remat": "all"}, {"scan_layers": 1}])
def test_a_layout_that_does_not_exist_is_refused(wrong):
    with pytest.raises(InputError):
        Layout(**wrong)
