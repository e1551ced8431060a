"""Stacks of prompt experts against solo steps: speed, memory an expert, compile time.

    python benchmarks/stacked.py --shapes tiny --experts 1,4,16,64
    python benchmarks/stacked.py --shapes xl --dtype bfloat16 --experts 1,16,64 --rows 4

The solo step is the one that `elm train` runs for one expert; the stack takes as many rows an expert. Rounds
take turns, so that a busy moment hits all alike. Tokens a second for each operation that the compiler
counts is the measure: a stack that only does more at once scores 1. Random arrays, no SeqIO, no TensorFlow.
MFU is as in accelerator.py, of the ceiling that a large matrix product reaches on this device.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from accelerator import SHAPES, Shapes, ceilings, make_batch, step_flops
from train_step import SMALL, machine

from elm_jax.experts.overlay import trained_leaves
from elm_jax.models import AdapterConfig, T5Network
from elm_jax.models.t5.network import role_of
from elm_jax.runtime import sharding, trees
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.stack import stacked_step
from elm_jax.training.state import create_state
from elm_jax.training.step import StepConfig, StepSpec, compile_step, make_spec
from elm_jax.types import Params

ALL_SHAPES = {**SHAPES, "small": Shapes(SMALL, rows=4, source=256, target=64, product=2048, copy_bytes=2**28)}
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=1e-4, clip_norm=1.0)


@dataclasses.dataclass
class Program:
    """One compiled step, ready to run.

    Attributes:
        name: ``solo`` or ``E=16``.
        experts: E.
        run: takes one step.
        compile_seconds: tracing and compiling.
        flops: that the compiler counts, of one step.
        state_bytes: of overlay and optimiser, an expert.
        working_bytes: of what a step needs beside its arguments, an expert.
    """

    name: str
    experts: int
    run: Callable[[], object]
    compile_seconds: float
    flops: float
    state_bytes: float
    working_bytes: float


def parameters(shapes: Shapes, dtype: str) -> tuple[StepSpec, Params, Params]:
    """The spec of the solo step, the overlay and the frozen base."""
    config = dataclasses.replace(shapes.config, dtype=dtype).with_adapter(AdapterConfig())
    network = T5Network(config)
    overlay, frozen = trees.split(jax.jit(network.init)(jax.random.key(0)),
                                  trained_leaves(role_of, "adapter"))
    spec = make_spec(StepConfig(network, OPTIMIZER), frozen, overlay, make_batch(shapes),
                     sharding.make_mesh(1, 1, 1))
    return spec, overlay, frozen


def solo(spec: StepSpec, overlay: Params, frozen: Params, shapes: Shapes) -> Program:
    """The step of one expert alone."""
    start = time.perf_counter()
    step = compile_step(spec)
    seconds = time.perf_counter() - start
    held = [jax.jit(lambda tree: create_state(tree, OPTIMIZER))(overlay)]
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))
    batch = jax.device_put(make_batch(shapes))

    def run() -> object:
        held[0], metrics = step(frozen, held[0], batch, np.uint32(0), np.int32(1000))
        return metrics["loss"]

    return Program("solo", 1, run, seconds, step.cost_analysis()["flops"], state_bytes,
                   step.memory_analysis().temp_size_in_bytes)


def stack(spec: StepSpec, overlay: Params, frozen: Params, shapes: Shapes, experts: int,
          at_once: int | None = None) -> Program:
    """The step of E experts in one program."""
    whole = stacked_step.make_stack_spec(spec, experts, at_once)
    start = time.perf_counter()
    programs = stacked_step.compile_stack(whole)
    seconds = time.perf_counter() - start
    state = stacked_step.empty_stack(whole)
    for number in range(experts):
        state = programs.enter(state, overlay, np.int32(number))
    held = [state]
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / experts
    batch = stacked_step.put_stacked([make_batch(shapes)] * experts, whole)
    slots = jax.device_put(stacked_step.Slots(
        np.arange(experts, dtype=np.uint32), np.full(experts, 1000, np.int32),
        np.full(experts, 1e-4, np.float32), np.ones(experts, bool)))

    def run() -> object:
        held[0], metrics = programs.step(frozen, held[0], batch, slots)
        return metrics["loss"]

    turns = experts // whole.at_once  # XLA counts a loop's body once
    return Program(f"E={experts}", experts, run, seconds,
                   programs.step.cost_analysis()["flops"] * turns, state_bytes,
                   programs.step.memory_analysis().temp_size_in_bytes / experts)


def measure(programs: list[Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step an expert, by name; every round runs all programs, each about as long."""
    most = max(program.experts for program in programs)
    found: dict[str, list[float]] = {program.name: [] for program in programs}
    for program in programs:
        jax.block_until_ready(program.run())
    for _ in range(rounds):
        for program in programs:
            repeats = max(1, min(8, most // program.experts))
            start = time.perf_counter()
            for _ in range(repeats):
                value = program.run()
            jax.block_until_ready(value)
            found[program.name].append((time.perf_counter() - start) / repeats / program.experts)
    return found


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=ALL_SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="activations")
    parser.add_argument("--experts", default="1,4,16,64", help="sizes of stacks, separated by commas")
    parser.add_argument("--at_once", type=int, help="experts computed at once, the others in turn")
    parser.add_argument("--rows", type=int, help="rows of a training step, an expert")
    parser.add_argument("--rounds", type=int, default=10)
    flags = parser.parse_args()
    shapes = ALL_SHAPES[flags.shapes]
    shapes = dataclasses.replace(shapes, rows=flags.rows or shapes.rows)
    products, _ = ceilings(shapes, flags.dtype, flags.rounds)
    print(f"{jax.devices()[0].device_kind}; {machine()}")
    print(f"{flags.shapes}, {flags.dtype}, {shapes.rows} rows of {shapes.source} + {shapes.target} tokens an "
          f"expert; ceiling {products / 1e12:.3f} TFLOP/s")
    spec, overlay, frozen = parameters(shapes, flags.dtype)
    programs = [solo(spec, overlay, frozen, shapes)]
    programs += [stack(spec, overlay, frozen, shapes, int(size), flags.at_once)
                 for size in flags.experts.split(",")]
    seconds, table = measure(programs, flags.rounds), {}
    tokens = shapes.rows * (shapes.source + shapes.target)
    needed = step_flops(spec.network.config, shapes.rows, shapes.source, shapes.target)
    alone = statistics.median(seconds["solo"])
    for program in programs:
        median = statistics.median(seconds[program.name])
        per_flop = tokens / median / (program.flops / program.experts)
        base = tokens / alone / programs[0].flops
        table[program.name] = {
            "median_seconds": median, "seconds": seconds[program.name],
            "compile_seconds": program.compile_seconds, "flops_per_expert": program.flops / program.experts,
            "state_bytes_per_expert": program.state_bytes, "working_bytes_per_expert": program.working_bytes,
            "tokens_per_second": tokens / median, "per_flop_of_solo": per_flop / base,
            "mfu": needed / median / products}
        print(f"{program.name:6s} {median * 1e3:9.2f} ms a step an expert   "
              f"{tokens / median:10,.0f} tokens/s   "
              f"tokens/s per FLOP of solo {per_flop / base:5.3f}   MFU {table[program.name]['mfu']:5.3f}   "
              f"state {program.state_bytes / 2**20:8.2f} MiB   "
              f"working {program.working_bytes / 2**20:8.2f} MiB   "
              f"compiled in {program.compile_seconds:5.1f} s")
    print(json.dumps({"machine": machine(), "device": jax.devices()[0].device_kind, "shapes": flags.shapes,
                      "dtype": flags.dtype, "rows": shapes.rows, "at_once": flags.at_once,
                      "measured": table}))


if __name__ == "__main__":
    main()
