"""A stack takes the steps of its experts' solo runs: same losses, same weights, same dropout."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_stack

from elm_jax.errors import InputError
from elm_jax.models import AdapterConfig
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps
from elm_jax.training.stack import stacked_step

RELATIVE = 1e-6
"""Of a step. Not to the bit: XLA's products of E * B rows, and its sums, group their terms in another way."""
SEEDS, RATES, LENGTHS = (3, 9, 1, 0), (1e-3, 3e-3, 2e-3, 7e-4), (20, 30, 10, 15)
OPTIMIZERS = {"adamw": tiny_stack.OPTIMIZER, "adafactor": tiny_run.ADAFACTOR}


def everything(path: str) -> bool:
    return True


def split(network, kind: str) -> tuple[dict, dict]:
    """(overlay, frozen)."""
    return trees.split(tiny_run.parameters(network),
                       everything if kind == "dataset" else tiny_run.is_prompt_leaf)


def spec_of(optimizer: str = "adamw", *, dropout: float = 0.1, mesh: tuple[int, int, int] = (1, 1, 1),
            num_microbatches: int = 1, kind: str = "prompt") -> steps.StepSpec:
    net = tiny_run.network(dropout=dropout, adapter=kind == "prompt")
    if kind == "lora":
        net = dataclasses.replace(net, config=net.config.with_adapter(AdapterConfig(kind="lora", rank=3)))
    overlay, frozen = split(net, kind)
    data, experts, model = mesh
    config = steps.StepConfig(net, OPTIMIZERS[optimizer], num_microbatches=num_microbatches)
    return steps.make_spec(config, frozen, overlay, tiny_run.stream().batch(0),
                           sharding.make_mesh(data, model, experts))


def parameters(spec: steps.StepSpec, kind: str) -> tuple[list[dict], dict]:
    """Overlays of four experts, and the base that they share."""
    overlay, frozen = split(spec.network, kind)
    overlays = [jax.tree.map(lambda leaf, by=1 + 0.01 * number: leaf * np.float32(by), overlay)
                for number in range(4)]
    return overlays, frozen


def batch_of(expert: int, step: int) -> dict:
    return tiny_run.stream(seed=expert).batch(step)


def run_stack(spec: steps.StepSpec, num_steps: int, *, kind: str = "prompt", active=(True,) * 4,
              at_once: int | None = None):
    """(states after each step, metrics of each step) of four experts in one program."""
    overlays, frozen = parameters(spec, kind)
    stack = stacked_step.make_stack_spec(spec, 4, at_once)
    programs = stacked_step.compile_stack(stack)
    frozen = sharding.put_tree(
        frozen, states.shardings_of_params(spec.network, frozen, spec.mesh, spec.rules))
    state = stacked_step.empty_stack(stack)
    places = states.shardings_of_params(spec.network, overlays[0], spec.mesh, spec.rules)
    for number, overlay in enumerate(overlays):
        state = programs.enter(state, sharding.put_tree(overlay, places), np.int32(number))
    slots = stacked_step.Slots(np.array(SEEDS, np.uint32), np.array(LENGTHS, np.int32),
                               np.array(RATES, np.float32), np.array(active))
    found = []
    for step in range(num_steps):
        batch = stacked_step.put_stacked([batch_of(number, step) for number in range(4)], stack)
        state, metrics = programs.step(frozen, state, batch, slots)
        found.append(jax.device_get((state, metrics)))
    return found


def solo_step(spec: steps.StepSpec, frozen: dict):
    """The solo step with its own static learning rate, for each expert."""
    return [jax.jit(functools.partial(
        steps.train_step,
        spec.config._replace(optimizer=dataclasses.replace(spec.optimizer, learning_rate=rate)), frozen))
        for rate in RATES]


@functools.cache
def run_solo(optimizer: str, dropout: float, num_microbatches: int, kind: str, num_steps: int,
             experts: tuple[int, ...]) -> dict[int, list]:
    spec = spec_of(optimizer, dropout=dropout, num_microbatches=num_microbatches, kind=kind)
    overlays, frozen = parameters(spec, kind)
    functions, found = solo_step(spec, frozen), {}
    for number in experts:
        state, found[number] = states.create_state(overlays[number], spec.optimizer), []
        for step in range(num_steps):
            state, metrics = functions[number](
                state, batch_of(number, step), np.uint32(SEEDS[number]), np.int32(LENGTHS[number]))
            found[number].append(jax.device_get((state, metrics)))
    return found


def assert_same(stack: list, solo: dict[int, list], relative: float = RELATIVE) -> None:
    for number, expected in solo.items():
        for step, ((state, metrics), (own, own_metrics)) in enumerate(zip(stack, expected, strict=True)):
            allowed = relative * (step + 1)
            for name, value in own_metrics.items():
                np.testing.assert_allclose(metrics[name][number], value, rtol=allowed * 5, err_msg=name)
            np.testing.assert_allclose(metrics["loss"][number], own_metrics["loss"], rtol=allowed)
            assert state.step[number] == own.step == step + 1
            leaves = zip(jax.tree.leaves(state.overlay), jax.tree.leaves(own.overlay), strict=True)
            for whole, leaf in leaves:
                # Relative to the leaf: AdamW's first update is a sign, whatever size the gradient has. Of a
                # gradient that is all rounding even that sign may turn: of an element in a thousand, by a
                # small part of a step.
                limit = allowed * 5 * max(1.0, np.abs(leaf).max())
                apart = np.abs(whole[number] - leaf)
                assert np.mean(apart > limit) <= 1e-3 and apart.max() <= 10 * limit, apart.max() / limit


CASES = [("adamw", 0.1, 1, "prompt"), ("adafactor", 0.1, 2, "prompt"), ("adafactor", 0.0, 1, "dataset"),
         ("adamw", 0.0, 1, "dataset"), ("adamw", 0.1, 4, "prompt"), ("adamw", 0.1, 1, "lora"),
         ("adafactor", 0.0, 2, "lora")]


@pytest.mark.slow  # the default suite has one of them: one at a time, to the bit
def test_each_expert_takes_its_solo_steps():
    for optimizer, dropout, parts, kind in CASES:
        spec = spec_of(optimizer, dropout=dropout, num_microbatches=parts, kind=kind)
        assert_same(run_stack(spec, 3, kind=kind), run_solo(optimizer, dropout, parts, kind, 3, (0, 3)))


MESHES = [(2, 2, 2), (1, 4, 1), (4, 2, 1), (1, 4, 2), (2, 1, 4)]


@pytest.mark.slow
def test_every_mesh_gives_the_steps_of_one_device():
    """(data, experts, model) of eight devices."""
    expected = run_solo("adamw", 0.1, 1, "prompt", 3, (0, 3))
    for mesh in MESHES:
        assert_same(run_stack(spec_of("adamw", mesh=mesh), 3), expected, 5 * RELATIVE)


@pytest.mark.slow
def test_experts_in_turn_take_the_same_steps():
    expected = run_solo("adamw", 0.1, 1, "prompt", 3, (0, 3))
    for mesh, at_once in (((1, 1, 1), 1), ((1, 1, 1), 2), ((1, 1, 1), 3), ((2, 2, 2), 1), ((1, 2, 1), 1)):
        spec = spec_of(mesh=mesh)
        divisor = {3: 2}.get(at_once, at_once)
        assert stacked_step.make_stack_spec(spec, 4, at_once).at_once == divisor
        assert_same(run_stack(spec, 3, at_once=at_once), expected)


@pytest.mark.slow  # the default suite has experts that leave and enter, each to the bit
@pytest.mark.parametrize(("optimizer", "dropout", "parts", "kind"), CASES)
def test_one_at_a_time_they_are_the_solo_steps_to_the_bit(optimizer, dropout, parts, kind):
    spec = spec_of(optimizer, dropout=dropout, num_microbatches=parts, kind=kind)
    found = run_stack(spec, 3, kind=kind, at_once=1)
    for number, expected in run_solo(optimizer, dropout, parts, kind, 3, (0, 3)).items():
        for (state, metrics), (own, own_metrics) in zip(found, expected, strict=True):
            assert {name: value[number] for name, value in metrics.items()} == own_metrics
            for whole, leaf in zip(jax.tree.leaves(state.overlay), jax.tree.leaves(own.overlay), strict=True):
                np.testing.assert_array_equal(whole[number], leaf)


@pytest.mark.slow
def test_in_turn_a_step_needs_the_memory_of_those_at_once():
    spec = spec_of()
    programs = {at_once: stacked_step.compile_stack(stacked_step.make_stack_spec(spec, 8, at_once)).step
                for at_once in (1, 8)}
    memory = {at_once: program.memory_analysis().temp_size_in_bytes for at_once, program in programs.items()}
    assert memory[1] < memory[8] / 3


def test_an_inactive_slot_keeps_its_state_to_the_bit_and_harms_nobody():
    spec, idle = spec_of("adamw"), (True, False, True, True)
    found, everybody = run_stack(spec, 3, active=idle), run_stack(spec, 3)
    for leaf, later in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[2][0]), strict=True):
        np.testing.assert_array_equal(leaf[1], later[1])
    start = parameters(spec, "prompt")[0][1]
    for leaf, first in zip(jax.tree.leaves(found[2][0].overlay), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(leaf[1], first)
    for leaf, other in zip(jax.tree.leaves(found[2][0]), jax.tree.leaves(everybody[2][0]), strict=True):
        np.testing.assert_array_equal(leaf[[0, 2, 3]], other[[0, 2, 3]])


def test_dropout_is_each_experts_own():
    """Two slots of equal weights and data differ by their seed alone."""
    spec = spec_of("adamw")
    overlays, frozen = parameters(spec, "prompt")
    stack = stacked_step.make_stack_spec(spec, 2)
    programs = stacked_step.compile_stack(stack)

    def losses(seeds: tuple[int, int]) -> np.ndarray:
        state = stacked_step.empty_stack(stack)
        for number in range(2):
            state = programs.enter(state, overlays[0], np.int32(number))
        slots = stacked_step.Slots(np.array(seeds, np.uint32), np.full(2, 9, np.int32),
                                   np.full(2, 1e-3, np.float32), np.ones(2, bool))
        batch = stacked_step.put_stacked([batch_of(0, 0)] * 2, stack)
        return np.asarray(programs.step(frozen, state, batch, slots)[1]["loss"])

    same, other = losses((4, 4)), losses((4, 5))
    assert same[0] == same[1] == other[0] != other[1]


def test_the_base_is_multiplied_once_for_all_experts():
    """A product with a weight of the base has the rows of all experts, not E products of one expert's."""
    spec = spec_of("adamw")
    programs = {size: stacked_step.compile_stack(stacked_step.make_stack_spec(spec,
                                                                              size)).step for size in (2, 4)}
    flops = {size: program.cost_analysis()["flops"] for size, program in programs.items()}
    assert flops[4] == pytest.approx(2 * flops[2], rel=0.02)
    counts, largest = {}, {}
    for size, program in programs.items():
        products = re.findall(r"f32\[([\d,]+)\]\S* dot\(", program.as_text())
        counts[size] = len(products)
        largest[size] = max(np.prod([int(part) for part in one.split(",")]) for one in products)
    assert counts[4] <= 1.05 * counts[2]
    assert largest[4] == 2 * largest[2]


def test_rates_and_lengths_of_unlike_experts_compile_nothing():
    spec = spec_of("adamw")
    run_stack(spec, 1)
    before = stacked_step.num_programs()
    other = spec._replace(optimizer=dataclasses.replace(spec.optimizer, learning_rate=0.5))
    assert stacked_step.compile_stack(stacked_step.make_stack_spec(other, 4)) is stacked_step.compile_stack(
        stacked_step.make_stack_spec(spec, 4))
    assert stacked_step.num_programs() == before


def test_a_device_holds_its_experts_and_its_part_of_the_base():
    sizes = {}
    for mesh in ((1, 1, 1), (1, 4, 1)):
        stack = stacked_step.abstract_stack(stacked_step.make_stack_spec(spec_of("adamw", mesh=mesh), 4))
        sizes[mesh] = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(stack))
    assert 4 * sizes[1, 4, 1] == sizes[1, 1, 1]


def test_a_stack_that_does_not_divide_is_an_input_error():
    with pytest.raises(InputError, match=r"got: 6 experts[\s\S]*multiple of 4"):
        stacked_step.make_stack_spec(spec_of("adamw", mesh=(1, 4, 2)), 6)


def test_an_expert_that_is_not_a_number_stays_alone():
    spec = spec_of("adamw")
    overlays, frozen = parameters(spec, "prompt")
    stack = stacked_step.make_stack_spec(spec, 4)
    programs, found = stacked_step.compile_stack(stack), []
    for poisoned in (False, True):
        state = stacked_step.empty_stack(stack)
        for number, overlay in enumerate(overlays):
            bad = jax.tree.map(lambda leaf: leaf * jnp.nan, overlay)
            state = programs.enter(state, bad if poisoned and number == 2 else overlay, np.int32(number))
        slots = stacked_step.Slots(np.array(SEEDS, np.uint32), np.array(LENGTHS, np.int32),
                                   np.array(RATES, np.float32), np.ones(4, bool))
        batch = stacked_step.put_stacked([batch_of(number, 0) for number in range(4)], stack)
        found.append(jax.device_get(programs.step(frozen, state, batch, slots)))
    for clean, dirty in zip(*(jax.tree.leaves(one) for one in found), strict=True):
        np.testing.assert_array_equal(clean[[0, 1, 3]], dirty[[0, 1, 3]])
    assert np.isnan(found[1][1]["loss"][2])
