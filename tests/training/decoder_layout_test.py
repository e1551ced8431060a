"""Layouts, meshes, dtypes and stacks of experts on decoder-only networks: the losses of the plain step."""

import dataclasses
import functools

import family_rows as made
import jax
import numpy as np
import pytest
import weights

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.experts.overlay import leaves_to_train
from elm_jax.models import AdapterConfig, families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.network import REMAT, Layout
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.stack import stacked_step

NUM_STEPS, ROWS = 3, 8
ROOM = {"inputs": 20, "targets": 12}
FSDP = (("embed", "data"),)
BOTH = (("embed", "data"), ("length", "model"))
ADAMW = OptimizerConfig("adamw", learning_rate=3e-3, weight_decay=0.01, clip_norm=1.0)
LLAMA = DecoderConfig(64, 32, 8, 2, 4, 64, 3, 64, dropout_rate=0.1, rope_base=100.0, tied_head=True)
CONFIGS = {
    "llama": LLAMA,  # fewer heads of keys than parts of some meshes
    "qwen": dataclasses.replace(LLAMA, qk_norm=True, qkv_bias=True, tied_head=False),
    "gpt2": dataclasses.replace(LLAMA, num_kv_heads=8, norm="layer", position="learned", dense_bias=True,
                                mlp_activations=("gelu_tanh",)),
}
LORA = AdapterConfig(kind="lora", rank=4, alpha=8, targets="all")
KINDS = {"full": None, "prompt": AdapterConfig(8), "lora": LORA,
         "upper": dataclasses.replace(LORA, layers="upper 2"),
         "gaps": AdapterConfig(8, layers=(0, 2))}
"""Adapters by name; those of `full` are none, and every leaf trains."""


@functools.cache
def parts_of(name: str, kind: str, layout: Layout, dtype: str = "float32"):
    """A network, its overlay and its frozen leaves, none of them zero."""
    config = dataclasses.replace(CONFIGS[name].with_adapter(KINDS[kind]), dtype=dtype)
    network = families.network_of(config, layout)
    params = weights.drawn(families.network_of(dataclasses.replace(config, dtype="float32")))
    trains = leaves_to_train(network, "full" if kind == "full" else "adapter", kind != "lora")
    return network, *trees.split(params, trains)


@functools.cache
def batches() -> list[dict]:
    """Packed rows: several examples in each."""
    form, pairs = form_of(families.network_of(LLAMA)), made.examples(LLAMA, 60 * NUM_STEPS)
    rows = form.pack(((len(inputs), len(targets)) for inputs, targets in pairs), ROOM)
    packed = [[pairs[number] for number in row] for row in rows]
    return [form.make_packed(packed[ROWS * step:ROWS * (step + 1)], ROOM, ROWS)
            for step in range(NUM_STEPS)]


@functools.cache
def spec_of(name, kind, layout=Layout(), mesh=(1, 1), rules=(), parts=1,  # noqa: B008
            dtype="float32", base_dtype=None):
    network, overlay, frozen = parts_of(name, kind, layout, dtype)
    mesh, rules = sharding.make_mesh(*mesh), sharding.make_rules(rules)
    frozen = states.frozen_leaves(network, frozen, mesh, rules, base_dtype)
    config = steps.StepConfig(network, ADAMW, num_microbatches=parts)
    return steps.make_spec(config, frozen, overlay, batches()[0], mesh, rules), frozen, overlay


@functools.cache
def run(*arguments, **options):
    """(loss of each step, overlay after the last)."""
    spec, frozen, overlay = spec_of(*arguments, **options)
    places = states.shardings_of_state(spec.network, overlay, ADAMW, spec.mesh, spec.rules)
    state = sharding.put_tree(states.create_state(overlay, ADAMW), places)
    step, losses = steps.compile_step(spec), []
    for batch in batches():
        state, metrics = step(frozen, state, sharding.put_batch(batch, spec.mesh), np.uint32(3),
                              np.int32(NUM_STEPS))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.overlay)


def check_losses(name, kind, layout, mesh, rules=(), parts=1):
    """A layout's losses are those of the plain layout; a mesh adds up in another order."""
    expected, found = run(name, kind)[0], run(name, kind, layout, mesh, rules, parts)[0]
    if parts > 1:  # another noise
        expected = run(name, kind, parts=parts)[0]
    assert expected[0] != expected[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-6 if mesh == (1, 1) else 2e-5,
                               err_msg=f"{name} {kind} {layout} {mesh}")


def test_a_scan_on_a_mesh_has_the_losses_of_the_plain_layout():
    """Dropout is on, rows are packed."""
    check_losses("llama", "upper", Layout("layer", True), (2, 4), FSDP)


@pytest.mark.slow
def test_every_layout_has_the_losses_of_the_plain_one():
    check_losses("llama", "lora", Layout("dots", True), (1, 1), parts=2)
    check_losses("llama", "full", Layout("dots", True), (4, 2), BOTH)
    check_losses("qwen", "full", Layout("layer", True), (4, 2), FSDP, 2)
    check_losses("qwen", "gaps", Layout("none", True), (1, 8))
    check_losses("gpt2", "full", Layout("dots", False), (8, 1), FSDP)


@pytest.mark.slow
def test_a_trained_tree_has_one_folder_a_layer_whatever_the_layout():
    found, expected = (run("llama", "upper", layout)[1] for layout in (Layout("layer", True), Layout()))
    assert trees.first_difference(found, expected) is None
    for path, leaf in trees.flatten(expected).items():
        np.testing.assert_allclose(trees.flatten(found)[path], leaf, rtol=0, atol=1e-5, err_msg=path)
    carriers = {path.split("/")[1] for path in trees.flatten(found) if "_adapter/" in path}
    assert carriers == {"layers_1", "layers_2"}


@pytest.mark.slow
def test_less_is_kept_where_more_is_computed_again():
    kept = {remat: steps.compile_step(spec_of("llama", "full", Layout(remat, True))[0])
            .memory_analysis().temp_size_in_bytes for remat in REMAT}
    assert kept["layer"] < kept["dots"] < kept["none"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(), Layout("layer", True)], ids=str)
def test_bfloat16_trains_the_same_within_its_rounding(layout):
    expected = run("llama", "lora")[0]
    for options in ({"base_dtype": "bfloat16"}, {"base_dtype": "bfloat16", "dtype": "bfloat16"}):
        spec, _, _ = spec_of("llama", "lora", layout, **options)
        held = {dtype for path, _, dtype in spec.frozen if path.endswith(("/kernel", "/embedding"))}
        assert held == {"bfloat16"} and {dtype for _, _, dtype in spec.overlay} == {"float32"}
        found = run("llama", "lora", layout, **options)[0]
        np.testing.assert_allclose(found, expected, rtol=0.02)
        assert found != expected


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh"), [("lora", (1, 1, 1)), ("upper", (2, 2, 2))], ids=str)
def test_a_stack_of_experts_takes_solo_steps_through_a_scan_of_layers(kind, mesh):
    layout, (data, experts, model) = Layout("layer", True), mesh
    network, overlay, frozen = parts_of("llama", kind, layout)
    place = sharding.make_mesh(data, model, experts)
    frozen = states.frozen_leaves(network, frozen, place)
    spec = steps.make_spec(steps.StepConfig(network, ADAMW), frozen, overlay, batches()[0], place)
    stack = stacked_step.make_stack_spec(spec, 2)
    programs, state = stacked_step.compile_stack(stack), stacked_step.empty_stack(stack)
    where = states.shardings_of_params(network, overlay, place, spec.rules)
    for slot in range(2):
        state = programs.enter(state, sharding.put_tree(overlay, where), np.int32(slot))
    slots = stacked_step.Slots(np.full(2, 3, np.uint32), np.full(2, NUM_STEPS, np.int32),
                               np.full(2, ADAMW.learning_rate, np.float32), np.ones(2, bool))
    expected = run("llama", kind)[0]
    for step, own in enumerate(expected):
        # The second expert sees the first one's next batch: it takes steps of its own.
        rows = [batches()[step], batches()[(step + 1) % NUM_STEPS]]
        state, metrics = programs.step(frozen, state, stacked_step.put_stacked(rows, stack), slots)
        assert float(metrics["loss"][0]) == pytest.approx(own, rel=2e-5)
        assert float(metrics["loss"][1]) != pytest.approx(own, rel=1e-4)
