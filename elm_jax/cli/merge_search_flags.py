"""The flags of `elm merge` that configure a weight search."""

import argparse
import dataclasses
from typing import Any

from elm_jax.workflows.choices import SEARCHES
from elm_jax.workflows.merge.search_config import SearchConfig

FLAGS = {"search_split": "split", "search_seed": "seed", **{name: name for name in (
    "num_examples", "steps", "population", "at_once", "learning_rate", "l1", "max_rows", "source_length",
    "max_new_tokens")}}
"""Flags that are fields of the search's config."""
DEFAULTS = {field.name: field.default for field in dataclasses.fields(SearchConfig)}


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a weight search to `elm merge`; ``--base``, ``--task``, ``--output`` are shared."""
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
    """Names of the search flags on the command line, without ``--search``."""
    given = {flag: getattr(arguments, flag) for flag in FLAGS if getattr(arguments, flag) is not None}
    return {**given, **({"unlabelled": True} if arguments.unlabelled else {})}
