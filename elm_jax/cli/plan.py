"""Runs `elm train --plan` and `elm study --plan`: one plan for each run, as a table or JSON."""

import argparse

import jax
from rich.console import Console

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import run_config
from elm_jax.cli.printing import Column, print_document, print_json, print_sentences
from elm_jax.errors import InputError, describe
from elm_jax.formats import detect
from elm_jax.models.network import NetworkConfig
from elm_jax.planning import chips
from elm_jax.workflows.plan import study_plan
from elm_jax.workflows.plan.step_plan import StepPlan, plan_run
from elm_jax.workflows.train.train_config import TrainConfig

PLACES = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TASK", "WORKDIR")
"""Macros that a run requires and a plan does not: folders, and what is trained on."""
NOT_GIVEN = "(not given)"
GIGA = 1e9
COLUMNS = (Column("what", kind="text"), Column("figure", kind="text"), Column("remark", kind="text"))
"""Of one run's plan."""


def plan(arguments: argparse.Namespace) -> int:
    """Plans the runs that the flags describe and prints the plans; returns status 1 if a run does not fit."""
    if not arguments.plan:
        raise InputError(describe("--topology is of a plan", got=f"--topology {arguments.topology}",
                                  cure="add --plan; nothing is trained then"))
    if not arguments.topology:
        raise InputError(describe("A plan needs chips", where="--topology",
                                  expected="CHIP:SHAPE, for example v5e:4x4, v4:2x2x4, h200:8"))
    if jax.config.jax_platforms is None:  # planning for a TPU must not look for one
        jax.config.update("jax_platforms", "cpu")
    topology = chips.parse(arguments.topology)
    _parse(arguments)
    if config_lib.is_bound("train_stack.train"):
        raise InputError(describe(
            "A plan is of one expert's step", where="gin/experts/prompt_stack.gin",
            expected="gin/experts/prompt.gin", cure="plan one expert; a stack holds the frozen parameters "
            "once, overlay and optimiser state of all slots, and activations of those computed at once"))
    if config_lib.is_bound("study.workdir"):
        found = study_plan.plan_study(config_lib.build("study"), topology)
        plans = found.plans
    else:
        found, config = None, config_lib.build("train")
        plans = [plan_run(config, _network(config), topology)]
    if arguments.json:
        print_json(found.to_dict() if found else plans[0].to_dict())
    else:
        _print(plans, topology)
        if found:
            found.print_table(Console())
    return 0 if all(one.fits for one in plans) else 1


def _parse(arguments: argparse.Namespace) -> None:
    paths = config_lib.paths_of(arguments)
    read = run_config.read_study if arguments.verb == "study" else run_config.read_train
    read(arguments)
    bindings = list(arguments.gin_bindings)
    bindings += [f"{name}={NOT_GIVEN!r}" for name in config_lib.missing_macros() if name in PLACES]
    is_run = not config_lib.is_bound("study.workdir") and not config_lib.is_bound("pretrain.model_dir")
    sizes = config_lib.sized_networks()
    if is_run and sizes and not config_lib.is_bound("train.network"):
        bindings.append(f"train.network=@{sizes[0]}()")
    config_lib.parse(arguments.gin_file, bindings, paths)


def _network(config: TrainConfig) -> NetworkConfig:
    """The network's dimensions, from gin/models/ or else from the base that the config names."""
    if config.network is not None:
        return config.network
    if config.initial_checkpoint_path == NOT_GIVEN:
        raise InputError(describe("A plan needs the dimensions of a network", where="gin config",
                                  cure="add --gin_file gin/models/xl.gin, or give --base"))
    return detect.open_model(config.initial_checkpoint_path).config


def _print(plans: list[StepPlan], topology: chips.Topology) -> None:
    if not topology.is_compiled_for:
        print_sentences(
            f"No compiler for {topology.name} here. Parameters, overlay, optimiser state, operations and the "
            "bytes that the shardings need are exact; temporaries and collectives are those of the program "
            f"that XLA compiles for {topology.num_chips} CPU devices, which keeps many values in float32 "
            "that a GPU has in bfloat16: an estimate, mostly too high.")
    for one in plans:
        print_document(COLUMNS, rows_of(one), title=_title(one))


def _title(one: StepPlan) -> str:
    sizes = " x ".join(f"{name} {size}" for name, size in one.mesh.items() if size > 1) or "one device"
    return f"{one.title} on {one.topology}: mesh {sizes}"


def rows_of(one: StepPlan) -> list[tuple[str, str, str]]:
    """Formats one plan as table rows (what, figure, remark)."""
    rows = [
        ("parameters", f"{one.parameters / GIGA:.3f} B", f"{one.trained:,} train"
         + ("" if one.active == one.parameters else f", {one.active:,} a token")),
        ("global batch", f"{one.rows} rows", f"{one.lengths[0]} / {one.lengths[1]} tokens, "
         f"{one.num_microbatches} microbatches"),
    ]
    rows += [(name, f"{size / GIGA:.3f} GB", "a chip") for name, size in one.memory.items() if size]
    rows += [
        ("memory in all", f"{one.total / GIGA:.2f} GB",
         f"{'fits' if one.fits else 'DOES NOT FIT'} {one.capacity / GIGA:.0f} GB"),
        ("operations", f"{one.flops / 1e12:.1f} TFLOP a step",
         f"{one.flops / one.num_chips / 1e12:.2f} TFLOP a chip"),
    ]
    rows += [(kind, f"{entry['count']:,} a step", f"{entry['bytes'] / GIGA:.3f} GB sent by a chip")
             for kind, entry in one.collectives.items()]
    rows += [(f"need: {need.what}", need.kind, f"{need.bytes / GIGA:.3f} GB") for need in one.needed]
    low, high = one.step_seconds
    rows += [
        ("sent / needed", f"{one.ratio:.2f}", f"{one.sent / GIGA:.3f} / {one.must_send / GIGA:.3f} GB"),
        *_cut_row(one),
        ("step's bounds", ", ".join(f"{name} {1e3 * s:.1f}" for name, s in one.seconds.items()), "ms"),
        ("step", f"{1e3 * low:.0f} to {1e3 * high:.0f} ms", "all overlaps to nothing overlaps, at peak"),
    ]
    if one.device_hours:
        first, last = one.device_hours
        rows.append(("whole run", f"{first:,.1f} to {last:,.1f} chip-hours",
                     f"at most {one.steps:,} steps on {one.num_chips} chips"))
    rows.append(("compiling", f"{one.compile_seconds:.0f} s", f"for {one.compiled_for}"))
    return rows


def _cut_row(one: StepPlan) -> list[tuple[str, str, str]]:
    """Table row of the bytes that are sent too much because the compiler has no reduce-scatter."""
    if not one.cut_all_reduce:
        return []
    return [("with reduce-scatter", f"{one.asked_ratio:.2f}",
             f"{one.cut_all_reduce / GIGA:.3f} GB of all-reduce stand for half of that here")]
