"""Runs `elm merge --search`: searches weights, merges with them, prints the result."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.cli.merge_search_flags import FLAGS, given_flags
from elm_jax.cli.printing import Column, print_document, print_json, print_lines, print_sentences
from elm_jax.cli.registries import modules_of
from elm_jax.errors import InputError, describe
from elm_jax.workflows.merge.search_config import SearchConfig
from elm_jax.workflows.merge.search_merge import search_and_merge


def merge_search(arguments: argparse.Namespace, models: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Runs `elm merge --search`: searches weights and writes the merged expert.

    Args:
        arguments: flags of `merge_search_flags.add_search_flags`, and base, task, output, method, id, json,
            module, prepared.
        models: folders of experts.
        parameters: of the method, checked by type.
    """
    for flag in ("base", "task", "output"):
        if getattr(arguments, flag) is None:
            raise InputError(describe(f"A search for weights needs --{flag}"))
    config = SearchConfig(
        experts=tuple(models), base=arguments.base, task=arguments.task, search=arguments.search,
        labelled=not arguments.unlabelled, method=arguments.method or "mean", parameters=dict(parameters),
        expert_id=arguments.id, modules=modules_of(arguments), prepared_dir=arguments.prepared,
        **{FLAGS[flag]: value for flag, value in given_flags(arguments).items() if flag in FLAGS})
    _, result = search_and_merge(config, arguments.output)
    if arguments.json:
        print_json({**result.report, "output": str(arguments.output)})
        return
    _print(result.report)
    print_lines(str(arguments.output))


def _print(report: Mapping[str, Any]) -> None:
    objective = report["objective"]
    columns = (Column("expert"), Column("weight", kind="number", show="{:.4f}".format),
               Column("alone", 1, "number", "{:.4f}".format))
    print_document(columns, [
        (expert["id"], expert["weight"], alone)
        for expert, alone in zip(report["experts"], objective["alone"], strict=True)],
        title=f"{objective['name']} on {len(report['rows'])} rows of {report['task']} {report['split']}")
    print_sentences(f"uniform mean {objective['uniform_mean']:.4f}, found {objective['found']:.4f}")
    held = report.get("held_back")
    if held is None:
        print_sentences("not compared with the uniform mean on other rows")
        return
    shares = {name: f"{100 * held[name]['value']:.1f} [{100 * held[name]['ci95_low']:.1f}, "
              f"{100 * held[name]['ci95_high']:.1f}]" for name in ("uniform_mean", "found", "difference")}
    print_sentences(
        f"{held['metric']} on {held['num_rows']} other rows ({held['split']}): uniform mean "
        f"{shares['uniform_mean']}, found {shares['found']}, difference {shares['difference']} "
        "(95% intervals: Wilson's, and the paired bootstrap's)")
