"""The verb `elm methods`: prints the table of merging methods."""

import argparse
import json
from typing import Any

from rich.table import Table

from elm_jax.cli.printing import print_json, print_table
from elm_jax.merging.methods.method_table import METHODS


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
    table = Table("method", "what it does", "needs", "parameters")
    for method in METHODS.values():
        needs = [*(["a base"] if method.needs_base else []),
                 f"{method.num_experts} experts" if method.num_experts else "any number"]
        taken = [f"{each.name}={_word(each.default)}" for each in method.parameters]
        table.add_row(method.name, method.summary, ", ".join(needs), " ".join(taken))
    print_table(table)
    width = max(map(len, METHODS))
    for method in METHODS.values():
        print(f"{method.name:{width}}  {method.equation}\n{'':{width}}  {method.source}")
    print("\nx_i: the experts; d_i = x_i - base; w_i: weights; m_i: 1 where the sign is the sum's, else 0.")


def _word(value: Any) -> str:
    return "" if value is None else json.dumps(value).strip('"')
