"""The verb `elm methods`: prints the table of merging methods."""

import argparse
import json
import sys
from typing import Any

from elm_jax.cli.printing import Column, print_document, print_json, print_table, say
from elm_jax.merging.methods.method_table import METHODS

COLUMNS = (Column("method"), Column("what it does", kind="text"), Column("needs", 1, "text"),
           Column("parameters", 2, "text"), Column("equation", where="scripts"),
           Column("source", where="scripts"))
EQUATIONS = (Column("method"), Column("equation", kind="text"), Column("source", 1))
LETTERS = "x_i: the experts; d_i = x_i - base; w_i: weights; m_i: 1 where the sign is the sum's, else 0."


def list_methods(arguments: argparse.Namespace) -> None:
    """Runs `elm methods`: prints the table of merging methods."""
    if arguments.json:
        print_json([{"name": method.name, "summary": method.summary, "equation": method.equation,
                     "source": method.source, "needs_base": method.needs_base,
                     "num_experts": method.num_experts, "normalize": method.normalize,
                     "parameters": [{"name": each.name, "range": each.range, "default": each.default,
                                     "per_expert": each.per_expert, "help": each.help}
                                    for each in method.parameters]} for method in METHODS.values()])
        return
    rows = []
    for method in METHODS.values():
        needs = [*(["a base"] if method.needs_base else []),
                 f"{method.num_experts} experts" if method.num_experts else "any number"]
        taken = [f"{each.name}={_word(each.default)}" for each in method.parameters]
        rows.append((method.name, method.summary, needs, " ".join(taken), method.equation, method.source))
    print_table(COLUMNS, rows, wide=arguments.wide)
    if sys.stdout.isatty():
        print()
        print_document(EQUATIONS, [(method.name, method.equation, method.source)
                                   for method in METHODS.values()], wide=arguments.wide)
    say(LETTERS)


def _word(value: Any) -> str:
    return "" if value is None else json.dumps(value).strip('"')
