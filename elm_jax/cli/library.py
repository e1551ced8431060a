"""The verbs `elm library ...`, and the choice of experts for `elm merge --library`."""

import argparse
from typing import Any

from elm_jax.cli.printing import Column, print_json, print_lines, print_table
from elm_jax.cli.registries import modules_of, task_data
from elm_jax.errors import InputError, describe
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.routed_library import generality_in
from elm_jax.reporting import library_report
from elm_jax.reporting.page_parts import Made
from elm_jax.workflows import build_library
from elm_jax.workflows.merge import in_memory as merging
from elm_jax.workflows.name_patterns import chosen
from elm_jax.workflows.route import RouteConfig


def library_build(arguments: argparse.Namespace) -> None:
    """Runs `elm library build`."""
    library = build_library.build_library(
        arguments.library, arguments.experts, task_data(arguments), encoder=arguments.encoder,
        text_format=arguments.text_format, instances_per_expert=arguments.instances, means=arguments.means,
        seed=arguments.seed)
    keys = "keys" if library.means is None else "means as keys and no training text"
    print_lines(f"{len(library)} experts, {len(library.index)} {keys}, encoder {library.encoder.name}")


def library_add(arguments: argparse.Namespace) -> None:
    """Runs `elm library add`."""
    library = ExpertLibrary.open(arguments.library)
    build_library.add_experts(library, arguments.experts, task_data(arguments), arguments.seed)
    print_lines(f"{len(library)} experts, {len(library.index)} keys")


def library_remove(arguments: argparse.Namespace) -> None:
    """Runs `elm library remove`."""
    library = ExpertLibrary.open(arguments.library)
    library.remove(arguments.experts)
    print_lines(f"{len(library)} experts, {len(library.index)} keys")


SCORING = ("rows", "tasks_per_dataset", "source_length", "max_new_tokens", "stack_experts", "mesh_data",
           "mesh_model", "mesh_experts")
"""Flags of `elm library calibrate` that are fields of its config."""


def library_calibrate(arguments: argparse.Namespace) -> None:
    """Runs `elm library calibrate`; prints each expert's prior, the most general first, and what it cost."""
    from elm_jax.workflows.calibrate import calibrate_library as calibrating  # late: it alone scores models

    found = calibrating.calibrate_library(calibrating.CalibrateConfig(
        arguments.library, arguments.results, arguments.base, tuple(arguments.task),
        modules=modules_of(arguments), prepared_dir=arguments.prepared,
        **{name: getattr(arguments, name) for name in SCORING}))
    if arguments.json:
        print_json(found.to_dict())
        return
    table, cost, priors = found.table, found.cost, found.generality.prior_means()
    scored = {name: sum(score is not None for score in one.scores)
              for name, one in found.generality.experts.items()}
    columns = (Column("expert"), Column("prior", kind="number", show="{:+.3f}".format),
               Column("data sets", 1, "number"))
    print_table(
        columns, [(name, priors[name], scored[name]) for name in sorted(
            priors, key=lambda name: (priors[name] is None, -(priors[name] or 0)))], wide=arguments.wide,
        title=f"{len(table.library)} experts x {len(table.tasks)} tasks of "
        f"{len({kin.dataset for kin in table.kin})} data sets",
        notes=[f"{cost.pairs:,} pairs of an expert and a task, {cost.reused:,} of them scored before; "
               f"{cost.rows:,} rows scored in {cost.seconds:.1f} s. Copies of older experts, which have "
               f"their scores: {table.num_copies}.",
               "A prior is the mean normal score over data sets that the expert was not trained on; routers "
               "leave out the target's data set and family too."])


def library_list(arguments: argparse.Namespace) -> None:
    """Runs `elm library list`."""
    library = ExpertLibrary.open(arguments.library)
    names = chosen("expert", arguments.experts, library.entries)
    known = generality_in(library)
    if arguments.json:
        calibrated = known.only(names).to_dict()
        print_json({"encoder": library.facts["encoder"], "text_format": library.text_format,
                    "means_per_expert": library.means,
                    "experts": [{"card": entry.card.to_dict(), "num_keys": entry.num_keys}
                                for name, entry in library.entries.items() if name in names],
                    **({"generality": calibrated} if calibrated else {})})
        return
    columns = (Column("expert"), Column("kind", 2), Column("dataset", 4), Column("tasks", 1, "number"),
               Column("keys", 1, "number"), Column("steps", 3, "number"),
               Column("prior", 2, "number", "{:+.3f}".format))
    cards = {name: entry.card for name, entry in library.entries.items()}
    priors = known.prior_means()
    print_table(columns, [
        (cards[name].id, cards[name].kind, cards[name].dataset or "several", len(cards[name].tasks),
         library.entries[name].num_keys, cards[name].training.get("steps"), priors.get(name))
        for name in names],
        wide=arguments.wide, title=f"{library.encoder.name}, {library.text_format}"
        + ("" if library.means is None else ", keys are means"))


def library_verify(arguments: argparse.Namespace) -> int:
    """Runs `elm library verify`; returns status 1 if a fault was found."""
    library = ExpertLibrary.open(arguments.library)
    faults = library.verify()
    if arguments.json:
        print_json({"experts": len(library), "faults": faults})
    else:
        print_lines(*(faults or [f"{len(library)} experts are whole"]))
    return 1 if faults else 0


def library_report_page(arguments: argparse.Namespace) -> None:
    """Runs `elm library report`."""
    page = library_report.write_library_report(
        arguments.library, arguments.output, results=arguments.results, verify=arguments.verify,
        made=Made(arguments.command))
    print_lines(f"report: {page}")


def best_of_library(arguments: argparse.Namespace) -> tuple[list[str], Any]:
    """Chooses the experts for `elm merge --library`: folders of a task's best experts, and their weights."""
    if not arguments.task or arguments.models:
        raise InputError(describe("Merging from a library needs --task and no folders",
                                  got=f"--task {arguments.task}, {len(arguments.models)} folders"))
    config = RouteConfig(  # no seed: a merge's seed is for its random masks
        library=arguments.library, task=arguments.task, num_queries=arguments.queries,
        modules=modules_of(arguments), prepared_dir=arguments.prepared)
    return merging.best_of_library(config, arguments.top_k, arguments.weights)
