"""What `elm merge --search` does: reads flags, finds weights, merges with them, prints the result."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from elm_jax.errors import InputError, describe
from elm_jax.printing import print_json, print_table
from elm_jax.task_commands import modules_of
from elm_jax.workflows.merge_search import SEARCHES, SearchConfig, search_and_merge

FLAGS = {"search_split": "split", "search_seed": "seed", **{name: name for name in (
    "num_examples", "steps", "population", "at_once", "learning_rate", "l1", "max_rows", "source_length",
    "max_new_tokens")}}
"""Flags that are fields of the search's config."""
DEFAULTS = {field.name: field.default for field in dataclasses.fields(SearchConfig)}


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `elm merge` that belong to a search; ``--base``, ``--task``, ``--output`` are shared."""
    group = parser.add_argument_group(
        "search for weights", "found on a few instances of --task, compared with equal ones on others")
    group.add_argument("--search", choices=SEARCHES, help="gradient (Adam) or evolution (a population)")
    group.add_argument("--search_split", metavar="SPLIT",
                       help="whose rows are searched on: train (default), or validation, of which these rows "
                       "are then held back; never a test split")
    group.add_argument("--num_examples", type=int, metavar="N", help=_default("instances", "num_examples"))
    group.add_argument("--unlabelled", action="store_true",
                       help="use no answers: make the entropy of the choices small")
    group.add_argument("--steps", type=int, metavar="N", help=_default("updates, or generations", "steps"))
    group.add_argument("--population", type=int, metavar="P", help=_default("of a generation", "population"))
    group.add_argument("--at_once", type=int, metavar="P", help="so many of them side by side (default: all)")
    group.add_argument("--learning_rate", type=float, metavar="X", help=_default("of Adam", "learning_rate"))
    group.add_argument("--l1", type=float, metavar="X", help=_default("factor of the weights' size", "l1"))
    group.add_argument("--search_seed", type=int, metavar="N",
                       help="of the drawn rows and of the population (default: 0)")
    group.add_argument("--max_rows", type=int, metavar="N",
                       help="a seeded random subset of at most N validation rows (default: all rows)")
    group.add_argument("--source_length", type=int, metavar="S", help=_default("of inputs", "source_length"))
    group.add_argument("--max_new_tokens", type=int, metavar="T",
                       help=_default("of generations and targets", "max_new_tokens"))


def _default(text: str, name: str) -> str:
    return f"{text} (default: {DEFAULTS[name]})"


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of a search's flags that the command line has, ``--search`` left out."""
    given = {flag: getattr(arguments, flag) for flag in FLAGS if getattr(arguments, flag) is not None}
    return {**given, **({"unlabelled": True} if arguments.unlabelled else {})}


def merge_search(arguments: argparse.Namespace, models: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """`elm merge --search`: finds weights, writes the merged expert.

    Args:
        arguments: flags of `add_search_flags`, and base, task, output, method, id, json, module, prepared.
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
    print(arguments.output)


def _print(report: Mapping[str, Any]) -> None:
    objective = report["objective"]
    table = Table("expert", "weight", "alone", title=f"{objective['name']} on {len(report['rows'])} rows of "
                  f"{report['task']} {report['split']}")
    for expert, alone in zip(report["experts"], objective["alone"], strict=True):
        table.add_row(expert["id"], f"{expert['weight']:.4f}", f"{alone:.4f}")
    print_table(table)
    print(f"uniform mean {objective['uniform_mean']:.4f}, found {objective['found']:.4f}")
    held = report.get("held_back")
    if held is None:
        print("not compared with the uniform mean on other rows")
        return
    shares = {name: f"{100 * held[name]['value']:.1f} [{100 * held[name]['ci95_low']:.1f}, "
              f"{100 * held[name]['ci95_high']:.1f}]" for name in ("uniform_mean", "found", "difference")}
    print(f"{held['metric']} on {held['num_rows']} other rows ({held['split']}): uniform mean "
          f"{shares['uniform_mean']}, found {shares['found']}, difference {shares['difference']}")
