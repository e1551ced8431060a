"""The report of a study: Markdown, self-contained HTML, and the words that the numbers allow."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from elm_jax.evaluation.page import HTML, MARKDOWN
from elm_jax.evaluation.study_table import chosen_on_the_test

SELECTED = "chosen on these very scores"

def percent(estimate: Mapping[str, float] | None) -> str:
    """A fraction as percent with one decimal; a dash where there is none."""
    if estimate is None or math.isnan(estimate["value"]):
        return "–"
    return f"{100 * estimate['value']:.1f}"


def with_interval(estimate: Mapping[str, float], sign: bool = False) -> str:
    """``value [low, high]`` in percent."""
    mark = "+" if sign else ""
    return (f"{100 * estimate['value']:{mark}.1f} "
            f"[{100 * estimate['low']:{mark}.1f}, {100 * estimate['high']:{mark}.1f}]")


def results_grid(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the study as names and printable values."""
    columns = ["", *table["columns"], "unseen – multitask"]
    rows = []
    for row in table["rows"]:
        difference = "–" if row["name"] == "multitask" else with_interval(row["difference"], sign=True)
        rows.append([row["name"], *(percent(row["values"][name]) for name in table["columns"]), difference])
    chance = ["chance", *("–" if value is None else f"{100 * value:.1f}"
                          for value in table["chance"].values()), ""]
    return {"columns": columns, "rows": [*rows, chance]}


def intervals_grid(table: Mapping[str, Any]) -> dict[str, Any]:
    """The same table with the 95% interval of every cell."""
    return {"columns": ["", *table["columns"]],
            "rows": [[row["name"], *(_interval(row["values"][name]) for name in table["columns"])]
                     for row in table["rows"]]}


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def summary(table: Mapping[str, Any]) -> list[str]:
    """What the numbers allow to be said, and no more."""
    rows = {row["name"]: row for row in table["rows"]}
    unseen = {name: row["values"]["unseen mean"] for name, row in rows.items()}
    chance = table["chance"]["unseen mean"]
    near = [name for name, value in unseen.items() if value["low"] <= chance <= value["high"]]
    below = [name for name, value in unseen.items() if value["high"] < chance]
    fair = {name: row["difference"] for name, row in rows.items() if not chosen_on_the_test(name)}
    better = [name for name, value in fair.items() if value["low"] > 0]
    worse = [name for name, value in fair.items() if value["high"] < 0]
    lines = [f"Unseen data sets: the frozen base scores {with_interval(unseen['base'])} percent; "
             f"guessing would give {100 * chance:.1f}."]
    if near:
        lines.append(f"Near chance on the unseen mean (the 95% interval covers it): {', '.join(near)}.")
    if below:
        lines.append(f"Below chance on the unseen mean, beyond the interval: {', '.join(below)}.")
    lines.append(
        f"Better than the multitask baseline on the unseen mean, beyond the paired interval: "
        f"{', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}. Rows that are "
        f"{SELECTED} (oracle, best single expert) are left out of this comparison.")
    oracle, honest = unseen["oracle"]["value"], unseen["split-half oracle"]["value"]
    verb = "becomes" if honest >= oracle else "shrinks to"
    lines.append(f"The oracle's {100 * oracle:.1f} {verb} {100 * honest:.1f} when it is chosen on "
                 f"one half of the instances and scored on the other.")
    return lines


def own_grids(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(prompt experts, dataset experts, sentence) about experts on their own tasks."""
    prompts = [row for row in table["own"] if row["kind"] == "prompt"]
    datasets = [row for row in table["own"] if row["kind"] != "prompt"]
    beats = sum(row["beats_base"] for row in prompts)
    return (
        {"columns": ["prompt expert", "metric", "expert", "base", "expert – base", "chance"],
         "rows": [[row["expert"], row["metric"], percent(row["value"]), percent(row["base"]),
                   with_interval(row["difference"], sign=True), _chance(row)] for row in prompts]},
        {"columns": ["dataset expert", "task", "metric", "value", "chance"],
         "rows": [[row["expert"], row["task"], row["metric"], with_interval(row["value"]), _chance(row)]
                  for row in datasets]},
        f"{beats} of {len(prompts)} prompt experts beat the frozen base on their own task's validation "
        f"rows, the 95% interval of the paired difference above zero.")


def _chance(row: Mapping[str, Any]) -> str:
    return "–" if row["chance"] is None else f"{100 * row['chance']:.1f}"


def markdown_table(grid: Mapping[str, Any]) -> str:
    """A grid as a Markdown table."""
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(grid["columns"])
    return "\n".join([line(grid["columns"]), rule, *(line(row) for row in grid["rows"])])


def render(facts: Mapping[str, Any], table: Mapping[str, Any], ranks: Mapping[str, str],
           pictures: Mapping[str, bytes]) -> dict[str, str]:
    """The report's texts.

    Args:
        facts: what the study wrote beside the results.
        table: of `study_table`.
        ranks: unseen task -> words on where the oracle's expert stands in the routing.
        pictures: ``heat_map`` and ``bars`` as PNG.

    Returns:
        ``markdown`` (with the pictures as files beside it) and ``html`` (with the pictures inside).
    """
    own, own_datasets, beats = own_grids(table)
    seconds = facts["stage_seconds"]
    programs = facts["programs"]
    content = {
        "title": facts["title"], "summary": summary(table), "results": results_grid(table),
        "intervals": intervals_grid(table),
        "num_experts": len(facts["experts"]), "own": own, "own_datasets": own_datasets, "beats": beats,
        "num_queries": facts["config"]["num_queries"],
        "routing": {"columns": ["keys", "text format", "queries from", "same data set", "tasks"],
                    "rows": [[row["encoder"], row["text_format"], row["queries"],
                              f"{100 * row['same_dataset']:.0f}%", str(row["num_tasks"])]
                             for row in facts["routing_figures"]]},
        "decisions": {"columns": ["task", "routed to", "votes", "oracle's expert, and its routing rank"],
                      "rows": [[task, facts["decisions"][task]["ranking"][0]["expert"],
                                f"{facts['decisions'][task]['ranking'][0]['votes']} of "
                                f"{facts['decisions'][task]['num_queries']}", ranks[task]]
                               for task in (*facts["unseen_tasks"], *facts["generative_tasks"])]},
        "stages": {"columns": ["stage", "seconds"],
                   "rows": [*([name, f"{value:.0f}"] for name, value in seconds.items()),
                            ["all", f"{sum(seconds.values()):.0f}"]]},
        "programs": f"The last session of this study compiled {programs['count']} programs in "
                    f"{programs['seconds']:.0f} s.",
        "versions": "Versions: " + ", ".join(f"{name} {v}" for name, v in facts["versions"].items()) + ".",
    }
    plain = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    safe = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    inline = {name: "data:image/png;base64," + base64.b64encode(picture).decode()
              for name, picture in pictures.items()}
    return {
        "markdown": plain.from_string(MARKDOWN).render(
            **content, table=markdown_table, bars="bars.png", heat_map="heat_map.png"),
        "html": safe.from_string(HTML).render(**content, **inline),
    }
