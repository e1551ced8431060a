"""What a step must send: by hand, and against what XLA makes of it on eight simulated devices."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run

from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.t5.network import Layout, T5Network
from elm_jax.planning import hlo, traffic
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps

LAYERS, ROWS, SOURCE, TARGET = 3, 16, 32, 16
SCANNED = Layout("layer", True)


TIGHT = SparseConfig(8, experts_per_token=2, capacity_factor=0.75, min_capacity=1, step=1)
APART = (("batch", ("data", "experts")),
         *((name, None) for name in ("vocab", "mlp", "expert_mlp", "heads", "joined_kv")))


def network(kind: str, layout: Layout = SCANNED) -> T5Network:
    config = tiny_run.network(adapter=kind == "prompt", dropout=0.0).config
    return T5Network(dataclasses.replace(
        config, emb_dim=64, num_heads=8, mlp_dim=128, vocab_size=256, num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS, sparse=TIGHT if kind == "sparse" else None), layout)


def step_of(kind: str, mesh: tuple[int, ...], rules: tuple, parts: int = 1, layout: Layout = SCANNED):
    net, where, rules = network(kind, layout), sharding.make_mesh(*mesh), sharding.make_rules(rules)
    is_trained = tiny_run.is_prompt_leaf if kind == "prompt" else (lambda path: True)
    overlay, frozen = trees.split(net.abstract_params(), is_trained)
    frozen = states.frozen_leaves(net, frozen, where, rules)
    tokens = {"encoder_input_tokens": SOURCE, "decoder_input_tokens": TARGET, "decoder_target_tokens": TARGET}
    batch = {name: jax.ShapeDtypeStruct((ROWS, size), np.int32) for name, size in tokens.items()}
    batch["decoder_loss_weights"] = jax.ShapeDtypeStruct((ROWS, TARGET), np.float32)
    config = steps.StepConfig(net, tiny_run.ADAMW, num_microbatches=parts)
    spec = steps.make_spec(config, frozen, overlay, batch, where, rules)
    shape = traffic.StepShape(where, rules, ROWS, SOURCE, TARGET, parts)
    return spec, {need.what: need for need in traffic.needs(net, frozen, overlay, shape)}


FSDP = (("embed", "data"), *((name, None) for name in ("vocab", "mlp", "heads", "joined_kv", "bottleneck")))
GATHERED = "weights gathered for the layers that use them"
SCATTERED = "gradients summed where parameters are split"
SUMMED = "gradients summed where parameters are whole"


def test_fsdp_by_hand():
    """Layers twice a microbatch, the head and the last norms once; of the embedding the looked-up rows."""
    _, needs = step_of("dataset", (8, 1), FSDP, parts=2)
    embed, mlp, joined, vocab = 64, 128, 64, 256
    attention, feed = 4 * embed * joined, 3 * embed * mlp
    layers = LAYERS * (attention + feed + 2 * embed) + LAYERS * (2 * attention + feed + 3 * embed)
    alone = embed * vocab + 2 * embed
    rows = ROWS / 8 * (SOURCE + TARGET) * embed
    expected = 4 * 7 / 8 * (2 * (2 * layers + alone) + rows)
    assert needs[GATHERED].bytes == pytest.approx(expected)
    assert needs[SCATTERED].bytes == pytest.approx(4 * 7 / 8 * 2 * (layers + alone + vocab * embed))
    assert needs[SUMMED].bytes == pytest.approx(2 * 7 / 8 * 4 * 2 * 8 * 32)  # relative positions: no embed


@pytest.mark.slow
def test_a_prompt_expert_on_a_whole_base_sends_its_gradients_and_nothing_else():
    spec, needs = step_of("prompt", (8, 1), FSDP[1:])
    trained = sum(int(np.prod(shape)) for _, shape, _ in spec.overlay)
    assert list(needs) == [SUMMED]
    assert needs[SUMMED].bytes == pytest.approx(2 * 7 / 8 * 4 * trained)
    found = hlo.by_kind(hlo.collectives_of(steps.compile_step(spec).as_text(), 8))
    assert found["all-reduce"]["bytes"] == pytest.approx(needs[SUMMED].bytes, rel=0.01)
    assert set(found) == {"all-reduce"}


def test_fsdp_sends_what_it_must():
    """XLA for CPUs has no reduce-scatter of its own: gradients are summed whole, twice the bytes."""
    spec, needs = step_of("dataset", (8, 1), FSDP)
    found = hlo.by_kind(hlo.collectives_of(steps.compile_step(spec).as_text(), 8))
    moved = sum(found[kind]["bytes"] for kind in ("all-gather", "all-to-all") if kind in found)
    assert 0.98 < moved / needs[GATHERED].bytes < 1.05
    reduced = sum(found[kind]["bytes"] for kind in ("all-reduce", "reduce-scatter") if kind in found)
    assert 1.95 < reduced / needs[SCATTERED].bytes < 2.1


@pytest.mark.slow
def test_tensor_parallelism_sends_what_it_must():
    """XLA for CPUs sums the gradients by queries, keys and values one by one: bytes by hand."""
    spec, needs = step_of("dataset", (1, 4), ())
    found = hlo.by_kind(hlo.collectives_of(steps.compile_step(spec).as_text(), 4))
    source, target = (ROWS * length * 64 * 4 for length in (SOURCE, TARGET))
    # Beyond one sum: two more of self-attention's three; one of keys and values; one of two gates.
    apart = LAYERS * (2 * source + 2 * target + source + source + target)
    total = sum(need.bytes for need in needs.values()) + 2 * 3 / 4 * apart
    assert 0.98 < found["all-reduce"]["bytes"] / total < 1.02


def test_rows_that_move_to_their_experts_by_hand():
    """Eight places a device's row and expert: two choices a token, a factor of 3/4."""
    _, needs = step_of("sparse", (2, 1, 4), APART)
    places = 8 * (LAYERS * (SOURCE * 2 * 3 // 4 // 8) + LAYERS * (TARGET * 2 * 3 // 4 // 8))
    once = 3 / 4 * ROWS / 8 * places * 64 * 4
    found = [needs[what].bytes for what in needs if needs[what].kind == "all-to-all"]
    assert found == [pytest.approx(2 * once)] * 3  # forward, again, backward
    config, flat = network("sparse").config, trees.flatten(network("sparse").abstract_params())
    experts = sum(int(np.prod(leaf.shape)) for path, leaf in flat.items() if "/expert/" in path)
    assert experts == 2 * LAYERS * 8 * 3 * 64 * config.mlp_dim
    others = sum(int(np.prod(leaf.shape)) for leaf in flat.values()) - experts
    assert needs[SUMMED].bytes == pytest.approx(4 * (2 * 7 / 8 * others + 2 / 2 * experts / 4))


@pytest.mark.parametrize(("mesh", "rules"), [((2, 1, 4), APART), ((2, 2, 2), APART[:1]), ((2, 1, 4), ())])
def test_operations_do_not_depend_on_the_mesh(mesh, rules):
    """Those of experts are traced for one device's rows; a router's sums may be made on several devices."""
    alone, spread = (traffic.flops_of(steps.trace_step(step_of("sparse", *where)[0]).jaxpr)
                     for where in (((1, 1), ()), (mesh, rules)))
    assert spread == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(), SCANNED], ids=str)
def test_expert_parallelism_sends_what_it_must(layout):
    spec, needs = step_of("sparse", (2, 1, 4), APART, layout=layout)
    found = hlo.by_kind(hlo.collectives_of(steps.compile_step(spec).as_text(), 8))
    moved = sum(need.bytes for need in needs.values() if need.kind == "all-to-all")
    assert found["all-to-all"]["bytes"] == pytest.approx(moved, rel=0.01)
    assert found["all-to-all"]["count"] == 2 * LAYERS * (4 if layout == Layout() else 6)
    # XLA sums some gradients of what is whole on every device in two parts.
    assert 0.95 < found["all-reduce"]["bytes"] / needs[SUMMED].bytes < 1.2
    assert set(found) == {"all-to-all", "all-reduce"}


@pytest.mark.slow
def test_operations_are_those_that_xla_counts():
    """Without loops, which XLA counts once; it counts elementwise work too."""
    spec, _ = step_of("dataset", (1, 1), (), layout=Layout())
    counted = steps.compile_step(spec).cost_analysis()["flops"]
    plain = traffic.flops_of(steps.trace_step(spec).jaxpr)
    assert 0.75 < plain / counted < 1.02
    scanned, _ = step_of("dataset", (1, 1), (), layout=Layout("none", True))
    assert traffic.flops_of(steps.trace_step(scanned).jaxpr) == pytest.approx(plain, rel=1e-6)
    again, _ = step_of("dataset", (1, 1), ())
    assert 1.2 < traffic.flops_of(steps.trace_step(again).jaxpr) / plain < 1.4
