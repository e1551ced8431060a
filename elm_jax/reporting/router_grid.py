"""The table of routers of a study as printable cells, and what it says in words."""

from collections.abc import Mapping
from typing import Any

from elm_jax.reporting.report import fraction

ROUNDING = 1e-9
"""By how much shares may differ that are sums of the same numbers."""


def routers_content(table: Mapping[str, Any] | None) -> dict[str, Any]:
    """What pages show of the table of routers: ``grid``, ``lines``, and numbers; empty without a table."""
    if table is None:
        return {}
    return {"grid": routers_grid(table), "lines": routers_sentences(table), "priors": table["priors"],
            "num_datasets": table["num_datasets"]}


def routers_grid(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of routers as printable cells."""
    rows = []
    for row in table["routers"]:
        name = row["router"] + (" (default)" if row["router"] == table["default"] else "")
        asked = f"{row['queries']} + {row['rows']} rows" if row["rows"] else str(row["queries"])
        rows.append([name, asked, *_scores(row), *map(fraction, (row["seen"], row["home"], row["new_home"]))])
    rows += [[row["name"], "", *_scores({**row, "difference": None}), fraction(row["seen"]), "–", "–"]
             for row in table["references"]]
    return {"columns": ["router", "Q", "unseen mean", "– votes", "regret", "gap closed", "seen mean",
                        "seen home", "new prompts home"], "rows": rows}


def _scores(row: Mapping[str, Any]) -> list[str]:
    return [_estimate(row["unseen"]), _estimate(row["difference"], "+"), _estimate(row["regret"], "+"),
            _estimate(row["gap_closed"])]


def _estimate(estimate: Mapping[str, Any] | None, sign: str = "") -> str:
    """``value [low, high]`` in percent, the value alone where there is no interval, a dash for nothing."""
    if estimate is None:
        return "–"
    value, *ends = (None if estimate[name] is None else f"{100 * estimate[name]:{sign}.1f}"
                    for name in ("value", "low", "high"))
    return value if None in ends else f"{value} [{', '.join(ends)}]"


def routers_sentences(table: Mapping[str, Any]) -> list[str]:
    """What the table says of seen tasks, and which routers it lacks."""
    known = [row for row in table["routers"] if row["home_by_votes"] is not None and row["home"] is not None]
    less: dict[str, list[str]] = {}
    for row in known:
        if row["home"] < row["home_by_votes"] - ROUNDING:
            less.setdefault(row["router"], []).append(str(row["queries"]))
    lines = []
    if known:
        named = ", ".join(f"{name} (Q = {', '.join(counts)})" for name, counts in less.items())
        lines.append(f"Seen tasks go home less often than by votes, with: {named}; with all others at least "
                     f"as often." if less else
                     "Every router sends seen tasks home at least as often as votes do.")
    lines += [f"Not compared: {one['router']} at Q = {one['queries']}: {one['reason']}."
              for one in table["left_out"]]
    return lines
