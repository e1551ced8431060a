"""The step: what trains, what adds up, and what lies where on the mesh."""

import functools
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_rows
import tiny_run
from checkout import ROOT

from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.errors import InputError
from elm_jax.models.losses import LossConfig
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps
from elm_jax.training.loop import fit
from elm_jax.training.run_settings import RunConfig

MESHES = [(1, 1), (8, 1), (4, 2), (2, 4)]
RULES = {
    name: sharding.make_rules(rows) for name, rows in {
        "default": [],
        "fsdp": [("embed", "data")],
        "both axes": [("embed", ("data", "model")), ("mlp", "data"), ("vocab", None)],
        "lengths": [("length", "model")],
    }.items()
}


def everything(path: str) -> bool:
    return True


def base(adapter: bool) -> dict:
    return tiny_run.parameters(tiny_run.network(adapter=adapter))


def multitask_stream() -> TrainStream:
    sources = [tiny_run.CopySource(40, seed) for seed in range(3)]
    return TrainStream(
        MixtureSource(sources, caps=[40, 10, 20]), form=t5_rows.FORM, batch_size=8, lengths=tiny_run.LENGTHS,
        seed=1,
        pack=True,
    )


RUNS = {
    "prompt": (True, tiny_run.is_prompt_leaf, tiny_run.ADAMW, tiny_run.stream),
    "dataset": (False, everything, tiny_run.ADAFACTOR, tiny_run.stream),
    "multitask": (False, everything, tiny_run.ADAFACTOR, multitask_stream),
}


@functools.cache
def losses(kind: str, mesh: tuple[int, int], num_steps: int = 20, rules: str = "default",
           num_microbatches: int = 1, dropout: float = 0.1) -> list[float]:
    adapter, trained, optimizer, make_stream = RUNS[kind]
    overlay, _ = trees.split(base(adapter), trained)
    run = RunConfig(train_steps=num_steps, optimizer=optimizer, rules=RULES[rules], name=None,
                    num_microbatches=num_microbatches)
    result = fit(tiny_run.network(adapter=adapter, dropout=dropout), base(adapter), overlay, make_stream(),
                 run, sharding.make_mesh(*mesh))
    return [row["loss"] for row in result.rows]


@pytest.mark.slow  # the contract suite has two meshes, the loop goes on upon another one
@pytest.mark.parametrize("kind", ["prompt", "dataset"])
def test_every_mesh_gives_the_losses_of_one_device(kind):
    expected = losses(kind, (1, 1))
    assert len(expected) == 20 and expected[-1] < expected[0]
    for mesh in MESHES[1:]:
        np.testing.assert_allclose(losses(kind, mesh), expected, rtol=1e-5, err_msg=str(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "dataset"])
def test_every_rule_gives_the_losses_of_one_device(kind):
    """Microbatches too: of equal dropout masks there are equal losses, whatever lies where."""
    cases = {"dataset": [((2, 4), "fsdp", 2), ((8, 1), "fsdp", 1), ((2, 2), "both axes", 4)],
             "prompt": [((4, 2), "fsdp", 2), ((2, 4), "lengths", 1)]}
    for mesh, rules, parts in cases[kind]:
        found = losses(kind, mesh, 6, rules, parts)
        np.testing.assert_allclose(found, losses(kind, (1, 1), 6, "default", parts), rtol=1e-5,
                                   err_msg=f"{mesh} {rules} {parts}")


@pytest.mark.slow
def test_microbatches_give_the_losses_of_the_whole_batch_on_a_mesh():
    np.testing.assert_allclose(losses("dataset", (2, 2), 6, "fsdp", 4, 0.0),
                               losses("dataset", (1, 1), 6, "default", 1, 0.0), rtol=1e-5)


def spec_of(mesh: tuple[int, int], kind: str = "dataset", rules: str = "default", num_microbatches: int = 1
            ) -> steps.StepSpec:
    adapter, trained, optimizer, make_stream = RUNS[kind]
    overlay, frozen = trees.split(base(adapter), trained)
    config = steps.StepConfig(tiny_run.network(adapter=adapter), optimizer, num_microbatches=num_microbatches)
    return steps.make_spec(config, frozen, overlay, make_stream().batch(0), sharding.make_mesh(*mesh),
                           RULES[rules])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "dataset"])
def test_fsdp_holds_an_eighth_of_parameters_and_optimizer_state(kind):
    """Over the data axis alone: whatever has an embed dimension is cut, optimiser rows included."""
    bytes_of = {
        mesh: steps.compile_step(
            spec_of(mesh, kind, rules="fsdp")).memory_analysis().argument_size_in_bytes
        for mesh in ((1, 1), (8, 1))
    }
    batch = sum(array.nbytes for array in RUNS[kind][3]().batch(0).values())
    whole, split = bytes_of[1, 1] - batch, bytes_of[8, 1] - batch / 8
    # What stays whole: relative positions, and the factored rows of dimensions that are not cut.
    assert whole / 8 < split < 1.4 * whole / 8


def test_fsdp_gathers_weights_and_never_activations():
    """Every floating-point array that is gathered has the size of a parameter, never of an activation."""
    program = steps.compile_step(spec_of((8, 1), rules="fsdp")).as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", program)
    sizes = {int(np.prod([int(size) for size in shape.split(",")])) for shape in gathered}
    leaves = {leaf.size for leaf in trees.flatten(base(False)).values()}
    assert len(gathered) >= 10 and sizes <= leaves


@pytest.mark.parametrize("kind", [pytest.param("prompt", marks=pytest.mark.slow), "dataset"])
def test_compiled_program_holds_a_share_of_parameters_and_optimizer_state(kind):
    bytes_of = {
        mesh: steps.compile_step(spec_of(mesh, kind)).memory_analysis().argument_size_in_bytes
        for mesh in ((1, 1), (2, 4))
    }
    batch = sum(array.nbytes for array in RUNS[kind][3]().batch(0).values())
    whole, split = bytes_of[1, 1] - batch, bytes_of[2, 4] - batch / 2
    # A quarter, and what no axis divides: norms, biases, relative positions, factored rows.
    assert 0.25 * whole < split < 0.33 * whole


@pytest.mark.parametrize("optimizer", [tiny_run.ADAFACTOR, tiny_run.ADAMW])
def test_optimizer_state_is_split_as_its_parameters_are(optimizer):
    net, mesh = tiny_run.network(adapter=False), sharding.make_mesh(2, 4)
    shardings = states.shardings_of_state(net, base(False), optimizer, mesh)
    abstract = states.abstract_state(base(False), optimizer)
    flat = jax.tree_util.tree_flatten_with_path(shardings.opt_state)[0]
    shapes = [leaf.shape for leaf in jax.tree.leaves(abstract.opt_state)]
    table = {
        jax.tree_util.keystr(keys): (tuple(leaf.spec), leaf.shard_shape(shape))
        for (keys, leaf), shape in zip(flat, shapes, strict=True)
    }
    kernel = "['encoder']['layers_0']['mlp']['{}']['kernel']"
    wi, wo = kernel.format("wi_0"), kernel.format("wo")

    def found(field: str, path: str) -> tuple:
        return next(value for key, value in table.items() if key.endswith(f".{field}{path}"))

    if optimizer.name == "adamw":
        for field in ("mu", "nu"):
            assert found(field, wi) == ((None, "model"), (32, 16))
            assert found(field, wo) == (("model", None), (16, 32))
    else:
        # wi [embed 32, mlp 64]: rows average over mlp, columns over embed.
        assert found("v_row", wi) == ((None,), (32,))
        assert found("v_col", wi) == (("model",), (16,))
        assert found("v_row", wo) == ((None,), (32,))
        assert found("v_col", wo) == (("model",), (16,))
        assert found("v", "['encoder']['encoder_norm']['scale']")[1] == (32,)


def test_state_stays_split_after_a_step():
    overlay = base(False)
    run = RunConfig(train_steps=1, optimizer=tiny_run.ADAFACTOR, name=None)
    result = fit(tiny_run.network(adapter=False), overlay, overlay, tiny_run.stream(), run,
                 sharding.make_mesh(2, 4))
    kernel = result.overlay["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.shape == (32, 64)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 16)}


@pytest.mark.parametrize("kind", ["prompt", "dataset"])
def test_only_the_overlay_changes(kind):
    adapter, trained, optimizer, make_stream = RUNS[kind]
    before = base(adapter)
    overlay, frozen = trees.split(before, trained)
    run = RunConfig(train_steps=3, optimizer=optimizer, name=None)
    result = fit(tiny_run.network(adapter=adapter), before, overlay, make_stream(), run,
                 sharding.make_mesh(1, 1))
    after = trees.flatten(trees.merge(before, jax.device_get(result.overlay)))
    changed = {
        path for path, leaf in trees.flatten(before).items()
        if not np.array_equal(leaf, after[path])
    }
    assert changed == {path for path in after if trained(path)}
    assert changed.isdisjoint(trees.flatten(frozen))


def test_only_the_overlay_has_optimizer_state():
    overlay, _ = trees.split(base(True), tiny_run.is_prompt_leaf)
    abstract = states.abstract_state(overlay, tiny_run.ADAMW)
    moments = sum(leaf.size for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim)
    assert moments == 2 * trees.count(overlay) < trees.count(base(True))


def test_the_callers_overlay_is_not_donated_away():
    mesh = sharding.make_mesh(1, 1)
    overlay = sharding.put_tree(
        base(False),
        states.shardings_of_params(tiny_run.network(adapter=False), base(False), mesh),
    )
    run = RunConfig(train_steps=1, optimizer=tiny_run.ADAFACTOR, name=None)
    fit(tiny_run.network(adapter=False), overlay, overlay, tiny_run.stream(), run, mesh)
    assert trees.fingerprint(overlay) == trees.fingerprint(base(False))


def run_step(batch: dict, num_microbatches: int) -> tuple[dict, dict]:
    """One step without dropout from a fixed state: (leaves by path, metrics)."""
    overlay, mesh = base(False), sharding.make_mesh(1, 1)
    net, config = tiny_run.network(adapter=False, dropout=0.0), tiny_run.ADAMW
    step_config = steps.StepConfig(net, config, LossConfig(0.1, 1e-3), num_microbatches)
    spec = steps.make_spec(step_config, {}, overlay, batch, mesh)
    shardings = states.shardings_of_state(net, overlay, config, mesh)
    state = sharding.put_tree(
        states.create_state(jax.tree.map(jnp.array, overlay), config), shardings
    )
    state, metrics = steps.compile_step(spec)(
        {}, state, sharding.put_batch(batch, mesh), np.uint32(0), np.int32(10)
    )
    return trees.flatten(jax.device_get(state.overlay)), jax.device_get(metrics)


def test_accumulation_equals_the_large_batch():
    batch = dict(tiny_run.stream(pack=False).batch(0))
    batch["decoder_loss_weights"] = batch["decoder_loss_weights"].copy()
    batch["decoder_loss_weights"][:5, 1:] = 0.0  # microbatches of very unequal token counts
    whole, whole_metrics = run_step(batch, 1)
    found, metrics = run_step(batch, 4)
    for name in ("loss", "tokens", "grad_norm", "accuracy"):
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5)
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, whole[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_packing_leaves_loss_and_gradient_alone():
    examples = [tiny_run.CopySource().example(index) for index in range(8)]
    sizes = [(len(inputs), len(targets)) for inputs, targets in examples]
    rows = t5_rows.FORM.pack(sizes, tiny_run.LENGTHS)
    assert len(rows) < 8
    packed = t5_rows.make_packed_batch(
        [[examples[number] for number in row] for row in rows], tiny_run.LENGTHS, batch_size=8
    )
    expected = run_step(t5_rows.make_batch(examples, tiny_run.LENGTHS, batch_size=8), 1)[1]
    found = run_step(packed, 1)[1]
    for name in ("loss", "tokens", "accuracy", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


def test_dropout_depends_on_seed_and_step_and_on_nothing_else():
    overlay, frozen = trees.split(base(True), tiny_run.is_prompt_leaf)
    spec, mesh = spec_of((1, 1), "prompt"), sharding.make_mesh(1, 1)
    shardings = states.shardings_of_state(spec.network, overlay, spec.optimizer, mesh)
    frozen = sharding.put_tree(
        frozen, states.shardings_of_params(spec.network, frozen, mesh)
    )
    batch = sharding.put_batch(tiny_run.stream().batch(0), mesh)

    def loss(seed: int, step: int) -> float:
        state = states.create_state(jax.tree.map(jnp.array, overlay), spec.optimizer)
        state = sharding.put_tree(state.replace(step=jnp.int32(step)), shardings)
        run = steps.compile_step(spec)
        return float(run(frozen, state, batch, np.uint32(seed), np.int32(9))[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0), loss(1, 1)}) == 4


def test_a_batch_of_padding_changes_no_parameter_by_its_gradient():
    batch = {name: np.zeros_like(a) for name, a in tiny_run.stream(pack=False).batch(0).items()}
    _, metrics = run_step(batch, 1)
    assert metrics["tokens"] == 0 and metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_equal_shapes_compile_once():
    one = steps.compile_step(spec_of((1, 1)))
    before = steps.num_programs()
    assert steps.compile_step(spec_of((1, 1))) is one
    assert steps.num_programs() == before


def test_batch_that_does_not_divide_is_an_input_error():
    with pytest.raises(InputError, match=r"Batch size does not divide[\s\S]*got: 8[\s\S]*16 = 8"):
        spec_of((8, 1), num_microbatches=2)


def test_leaf_that_the_network_lacks_is_an_input_error():
    with pytest.raises(InputError, match="_adapter/"):
        states.shardings_of_params(
            tiny_run.network(adapter=False), base(True), sharding.make_mesh(1, 1)
        )


@pytest.mark.slow
def test_a_prompt_experts_step_needs_at_most_half_of_full_fine_tuning():
    """At T5 1.1 small's shapes, by the compiler's account of the step that `elm train` runs."""
    script = ROOT / "benchmarks" / "train_step.py"
    done = subprocess.run([sys.executable, str(script), "--memory"], capture_output=True, text=True,
                          timeout=900, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["ratio"] <= 0.5
