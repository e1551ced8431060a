"""The verb `elm upcycle`: reads flags, calls one workflow, prints its result."""

import argparse
from collections.abc import Mapping
from typing import Any

from elm_jax.cli.printing import Column, print_document, print_json, print_lines, print_sentences
from elm_jax.errors import InputError, describe
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.workflows.upcycle import step_zero_loss
from elm_jax.workflows.upcycle.upcycle_base import EXPERTS, UpcycleConfig, upcycle_folders

SPARSE = ("experts_per_token", "normalize_gates", "capacity_factor", "step", "offset", "dense_sublayer")
"""Flags that are settings of the sparse layers."""
FIELDS = ("base", "output", "rest", "noise", "seed", "loss_on", "rows", "split", "source_length")
"""Flags that are fields of the config."""
COLUMNS = (Column("loss at step 0"), Column("nats", kind="number", show="{:.4f}".format),
           Column("jump", kind="number", show=lambda value: f"{round(value, 4) + 0.0:+.4f}"),  # never -0.0
           Column("written", 1))


def upcycle(arguments: argparse.Namespace) -> None:
    """Runs `elm upcycle`: prints what was written, or the whole report as one JSON object."""
    experts = tuple(arguments.experts)
    number = arguments.num_experts or len(experts) or None
    if number is None:
        raise InputError(describe("A sparse base needs a number of experts, or experts",
                                  expected="--num_experts E, or --experts DIR ...", cure="--num_experts 8"))
    sparse = SparseConfig(num_experts=number, **{name: getattr(arguments, name) for name in SPARSE})
    report = upcycle_folders(UpcycleConfig(
        sparse=sparse, experts=experts, modules=tuple(arguments.module) if arguments.module else None,
        **{name: getattr(arguments, name) for name in FIELDS}))
    if arguments.json:
        print_json(report)
        return
    print_lines(*_summary(report))
    if "loss" in report:
        _print_loss(report["loss"])
    print_lines(report["output"])


def _summary(report: Mapping[str, Any]) -> list[str]:
    """What was written, in a few lines."""
    sparse, made, seconds = report["sparse"], report["upcycled"], max(report["seconds"], 1e-3)
    layers = "; ".join(f"{', '.join(map(str, numbers))} of the {stack}"
                       for stack, numbers in report["sparse_layers"].items())
    of = ("copies of the base's feed-forwards" if made["method"] != EXPERTS else
          f"feed-forwards of {', '.join(each['id'] for each in made['experts'])}; the rest: {made['rest']}")
    return [
        f"{sparse['num_experts']} experts, {sparse['experts_per_token']} a token, in layers {layers}",
        f"experts: {of}",
        f"{report['num_parameters']:,} parameters ({report['active_parameters']:,} a token), "
        f"dense {report['dense_parameters']:,}",
        f"{report['num_leaves']} leaves, {report['num_bytes'] / 1e9:.2f} GB in {seconds:.1f} s "
        f"({report['num_bytes'] / 1e6 / seconds:.0f} MB/s)"]


def _print_loss(loss: Mapping[str, Any]) -> None:
    names = {step_zero_loss.DENSE: "dense base", step_zero_loss.RAW: "sparse, raw gates",
             step_zero_loss.NORMALISED: "sparse, normalised gates"}
    rows = [(names[name], value, loss["jump"].get(name), name == loss["gates"] or None)
            for name, value in loss["nats_per_token"].items()]
    title = (f"{loss['task']}, {loss['split']}: {loss['rows']} rows, nats a token of {loss['tokens']} in "
             "targets")
    print_document(COLUMNS, rows, title=title)
    print_sentences(loss["why"])
