"""The report of a study: Markdown, self-contained HTML, and sentences that the numbers support."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.reporting.curve_plots import MOST_PANELS
from elm_jax.reporting.expert_cards import FoundExpert, cards_grid
from elm_jax.reporting.markdown_text import Written, markdown_text
from elm_jax.reporting.page import HTML, MARKDOWN
from elm_jax.reporting.page_parts import Made, html_page, markdown_of
from elm_jax.reporting.plots import CONSTANT
from elm_jax.reporting.study_table import chosen_on_the_test, target_tasks

SELECTED = "chosen on these very scores"
BY_POSITION = "‡"
MARKS = {
    CONSTANT: "one and the same answer on all rows, of each task that the cell is made of",
    BY_POSITION: "the position of the right choice: the choices differ from row to row",
}
WORST_CUT = 5
MOST_NAMES = 5
"""Most names of data sets in a sentence; if there are more, it gives their number."""
METRIC_NAMES = {"accuracy": "accuracy", "rouge_l": "ROUGE-L"}


def percent(estimate: Mapping[str, float]) -> str:
    """An estimate's value as percent with one decimal; a dash where there is none."""
    return fraction(estimate["value"])


def fraction(value: float | None) -> str:
    """A fraction as percent with one decimal; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def with_interval(estimate: Mapping[str, float], sign: bool = False) -> str:
    """``value [low, high]`` in percent."""
    mark = "+" if sign else ""
    return (f"{100 * estimate['value']:{mark}.1f} "
            f"[{100 * estimate['low']:{mark}.1f}, {100 * estimate['high']:{mark}.1f}]")


def results_grid(table: Mapping[str, Any]) -> dict[str, Any]:
    """The study's table as printable cells."""
    columns = ["", *table["columns"], "unseen – multitask"]
    rows = []
    for row in table["rows"]:
        difference = "–" if row["name"] == "multitask" else with_interval(row["difference"], sign=True)
        rows.append([row["name"], *(marked(percent(row["values"][name]), row["constant"][name])
                                    for name in table["columns"]), difference])
    references = [[name, *map(fraction, table[key].values()), ""]
                  for name, key in (("majority answer", "majority"), ("chance", "chance"))]
    return {"columns": columns, "rows": [*rows, *references]}


def intervals_grid(table: Mapping[str, Any]) -> dict[str, Any]:
    """The study's table as printable cells with 95% intervals."""
    return {"columns": ["", *table["columns"]],
            "rows": [[row["name"], *(marked(_interval(row["values"][name]), row["constant"][name])
                                     for name in table["columns"])]
                     for row in table["rows"]]}


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def category_grid(table: Mapping[str, Any]) -> dict[str, Any]:
    """The study's table on seen tasks, one column for each category and metric."""
    groups = table["by_category"]
    heads = [f"{group['label'].replace('_', ' ')}{' ROUGE-L' if group['metric'] == 'rouge_l' else ''} "
             f"({group['num_datasets']})" for group in groups]
    rows = [[row["name"], *(_of_group(group, row["name"]) for group in groups)] for row in table["rows"]]
    rows += [[name, *(fraction(group[key]) for group in groups)]
             for name, key in (("majority answer", "majority"), ("chance", "chance"))]
    return {"columns": ["", *heads], "rows": rows if groups else []}


def _of_group(group: Mapping[str, Any], name: str) -> str:
    return marked(with_interval(group["values"][name]), group["constant"][name])


def groups_grid(table: Mapping[str, Any], key: str, category: str,
                absent: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
    """A grid of data sets as rows and the table's rows as columns, long rather than wide.

    Args:
        table: of `study_table`.
        key: ``by_dataset`` or ``benchmarks``.
        category: what heads the categories' column.
        absent: data sets that had no data; the reason replaces the metric.
    """
    names = [row["name"] for row in table["rows"]]
    columns = ["data set", category, "metric", *(name.split(" (")[0] for name in names), "majority", "chance"]
    rows = [[group["label"], group["category"].replace("_", " "), METRIC_NAMES[group["metric"]],
             *(_of_group(group, name) for name in names), fraction(group["majority"]),
             fraction(group["chance"])] for group in table[key]]
    missing = [[row["dataset"], row["benchmark"], f"absent: {row['reason']}", *"–" * (len(names) + 2)]
               for row in absent]
    return {"columns": columns, "rows": rows + missing, "labels": 3}


def summary(table: Mapping[str, Any]) -> list[str]:
    """The sentences about the results that the numbers support."""
    rows = {row["name"]: row for row in table["rows"]}
    unseen = {name: row["values"]["unseen mean"] for name, row in rows.items()}
    chance = table["chance"]["unseen mean"]
    near = [name for name, value in unseen.items() if value["low"] <= chance <= value["high"]]
    below = [name for name, value in unseen.items() if value["high"] < chance]
    fair = {name: row["difference"] for name, row in rows.items() if not chosen_on_the_test(name)}
    better = [name for name, value in fair.items() if value["low"] > 0]
    worse = [name for name, value in fair.items() if value["high"] < 0]
    lines = [table["selection_note"]] if table["selection_note"] else []
    lines.append(f"Unseen data sets: the frozen base scores {with_interval(unseen['base'])} percent; "
                 f"guessing would give {100 * chance:.1f}.")
    if near:
        lines.append(f"Near chance on the unseen mean (the 95% interval covers it): {', '.join(near)}.")
    if below:
        lines.append(f"Below chance on the unseen mean, beyond the interval: {', '.join(below)}.")
    if table["majority"]["unseen mean"] is not None:
        above = [name for name, row in rows.items()
                 if not chosen_on_the_test(name) and row["over_majority"]["low"] > 0]
        lines.append(
            f"Always giving each task's most frequent right answer would give "
            f"{fraction(table['majority']['unseen mean'])} on the unseen mean; better than that, beyond "
            f"the paired interval: {', '.join(above) or 'none'}.")
    lines.append(
        f"Better than the multitask baseline on the unseen mean, beyond the paired interval: "
        f"{', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}. Rows that are "
        f"{SELECTED} (oracle, best single expert) are left out of this comparison.")
    absent = table.get("absent", ())  # tables of older versions have none
    if absent:
        reasons = "; ".join(f"{row['dataset']}: {row['reason']}" for row in absent)
        lines.append(f"Not scored: {reasons}.")
    oracle, honest = unseen["oracle"]["value"], unseen["split-half oracle"]["value"]
    verb = "becomes" if honest >= oracle else "shrinks to"
    lines.append(f"The oracle's {100 * oracle:.1f} {verb} {100 * honest:.1f} when it is chosen on "
                 f"one half of the instances and scored on the other.")
    return lines


def own_grids(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(grid of prompt experts, grid of dataset experts, sentence) about experts on their own tasks."""
    prompts = [row for row in table["own"] if row["kind"] == "prompt"]
    datasets = [row for row in table["own"] if row["kind"] != "prompt"]
    return (
        {"columns": ["prompt expert", "metric", "expert", "base", "expert – base", "majority", "chance"],
         "rows": [[row["expert"], row["metric"], marked(percent(row["value"]), row["constant"]),
                   marked(percent(row["base"]), row["base_constant"]),
                   with_interval(row["difference"], sign=True), _majority(row), fraction(row["chance"])]
                  for row in prompts], "labels": 2},
        {"columns": ["dataset expert", "task", "metric", "value", "majority", "chance"],
         "rows": [[row["expert"], row["task"], row["metric"],
                   marked(with_interval(row["value"]), row["constant"]), _majority(row),
                   fraction(row["chance"])] for row in datasets], "labels": 3},
        _wins(prompts))


def _wins(prompts: Sequence[Mapping[str, Any]]) -> str:
    wins = [row for row in prompts if row["beats_base"]]
    ranked = [row for row in wins if row["metric"] == "accuracy"]
    beats = sum(row["beats_majority"] is True for row in ranked)
    unknown = sum(row["beats_majority"] is None for row in ranked)
    sentence = (f"{len(wins)} of {len(prompts)} prompt experts beat the frozen base on their own task's "
                f"validation rows, the 95% interval of the paired difference above zero.")
    if ranked:
        sentence += (f" Of the {len(ranked)} of them that classify, {beats} also beat the majority answer "
                     f"in that way{f', of {unknown} it is not known' if unknown else ''}; generations "
                     f"have none.")
    return sentence


def marked(text: str, constant: bool) -> str:
    """The text of a cell, with the mark of a constant answer if it is one."""
    return f"{text} {CONSTANT}" if constant else text


def _majority(row: Mapping[str, Any]) -> str:
    text = fraction(row["majority"])
    return f"{text} {BY_POSITION}" if row["by_position"] and row["majority"] is not None else text


def legend(*grids: Mapping[str, Any]) -> str:
    """Explains the marks in the grids."""
    cells = [str(cell) for grid in grids for row in grid["rows"] for cell in row]
    return "; ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items()
                     if any(cell.endswith(mark) for cell in cells))


def by_position(table: Mapping[str, Any]) -> str:
    """A sentence on the data sets whose majority answer is a position; empty if there are none."""
    names = table["majority_by_position"]
    datasets = f"{len(names)} data sets" if len(names) > MOST_NAMES else " and ".join(names)
    return (f" The choices of {datasets} differ from row to row: there it is the position of the right "
            f"choice." if datasets else "")


def _multitask(facts: Mapping[str, Any]) -> str:
    """A sentence on the tasks of the multitask baseline; empty if the study did not keep them."""
    tasks = facts.get("multitask_tasks", ())
    return f" Multitask: one model, trained on {len(tasks)} tasks together." if tasks else ""


def inputs_grid(table: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(sentence, grid of the tasks with the most cut inputs) about rows and lengths at evaluation."""
    rows = config["max_eval_rows"]
    drawn = "" if rows is None else ", drawn at random with a fixed seed"
    sentence = (f"{'All rows' if rows is None else f'At most {rows} rows'} of a task's validation split, or "
                f"of the only one that it has{drawn}. "
                f"Inputs are cut at {config['eval_source_length']} tokens, generations at "
                f"{config['max_new_tokens']}. ")
    known = [row for row in table["inputs"] if row["num_cut"] is not None]
    cut = sorted((row for row in known if row["num_cut"]),
                 key=lambda row: (-row["num_cut"] / row["num_instances"], row["task"]))
    if len(known) < len(table["inputs"]):
        sentence += "Cut inputs: – (results of an older version did not count them)."
    else:
        total, number = (sum(row[name] for row in known) for name in ("num_instances", "num_cut"))
        sentence += (f"So {number} of {total} inputs ({100 * number / total:.1f}%), of {len(cut)} of "
                     f"{len(known)} tasks, were cut.")
        sentence += f" The {min(WORST_CUT, len(cut))} tasks that lost most:" if cut else ""
    return sentence, {"columns": ["task", "inputs", "cut", "share"],
                      "rows": [[row["task"], str(row["num_instances"]), str(row["num_cut"]),
                                f"{100 * row['num_cut'] / row['num_instances']:.1f}%"]
                               for row in cut[:WORST_CUT]]}


def markdown_table(grid: Mapping[str, Any]) -> Written:
    """A grid as a Markdown table; every cell is shown as it is."""
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_text, cells)) + " |"

    rule = "|" + "---|" * len(grid["columns"])
    return Written("\n".join([line(grid["columns"]), rule, *(line(row) for row in grid["rows"])]))


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a report shows beside its scores.

    Attributes:
        made: when and by which command.
        pictures: PNG by the name of its file.
        experts: that were found, by id.
        samples: of `samples.samples_table`.
        matrix: grid of experts by tasks, as the heat map draws it.
        routers: of `router_grid.routers_content`; empty without a comparison of routers.
        loads: of `router_loads.loads_content`; empty without sparse layers.
    """

    made: Made
    pictures: Mapping[str, bytes]
    experts: Mapping[str, FoundExpert]
    samples: Mapping[str, Any]
    matrix: Mapping[str, Any]
    routers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loads: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Values of the templates of `page`."""
        curves = sum(bool(found.losses) for found in self.experts.values())
        return {"samples": self.samples, "matrix": self.matrix, "routers": self.routers, "loads": self.loads,
                "curves_left": max(0, curves - MOST_PANELS),
                "cards": cards_grid(found.card for found in self.experts.values())}


def render(facts: Mapping[str, Any], table: Mapping[str, Any], ranks: Mapping[str, str],
           extras: Extras) -> dict[str, str]:
    """Renders the report's texts from a study's facts and its table.

    Args:
        facts: the facts that the study wrote beside the results.
        table: of `study_table`.
        ranks: unseen task -> words on the rank of the oracle's expert in the routing.
        extras: with the pictures ``heat_map.png``, ``bars.png`` and perhaps ``learning_curves.png``.

    Returns:
        ``markdown`` (with the pictures as files beside it) and ``html`` (with the pictures inside).
    """
    own, own_datasets, beats = own_grids(table)
    results, by_category = results_grid(table), category_grid(table)
    by_dataset = groups_grid(table, "by_dataset", "category")
    benchmarks = groups_grid(table, "benchmarks", "benchmark", table["absent"])
    inputs, worst_cut = inputs_grid(table, facts["config"])
    content = {
        "title": facts["title"], "summary": [*_run_of(facts), extras.made.sentence(), *summary(table)],
        "results": results, "intervals": intervals_grid(table), "by_category": by_category,
        "by_dataset": by_dataset, "benchmarks": benchmarks, "multitask": _multitask(facts),
        "num_experts": len(facts["experts"]), "own": own, "own_datasets": own_datasets, "beats": beats,
        "legend": legend(results, by_category, by_dataset, benchmarks, own, own_datasets, extras.matrix),
        "by_position": by_position(table), "note": table["selection_note"], "inputs": inputs,
        "worst_cut": worst_cut, "num_queries": facts["config"]["num_queries"],
        "routing": {"columns": ["keys", "text format", "queries from", "same data set", "tasks"],
                    "rows": [[row["encoder"], row["text_format"], row["queries"],
                              f"{100 * row['same_dataset']:.0f}%", str(row["num_tasks"])]
                             for row in facts["routing_figures"]]},
        "decisions": {"columns": ["task", "routed to", "votes", "oracle's expert, and its routing rank"],
                      "rows": [[task, facts["decisions"][task]["ranking"][0]["expert"],
                                f"{facts['decisions'][task]['ranking'][0]['votes']} of "
                                f"{facts['decisions'][task]['num_queries']}", ranks[task]]
                               for task in target_tasks(facts)]},
        "sampled": "base, multitask baseline and routed experts say", **_times(facts), **extras.content(),
    }
    return {"markdown": markdown_of(MARKDOWN, extras.pictures, table=markdown_table, **content),
            "html": html_page(HTML, extras.pictures, **content)}


def _run_of(facts: Mapping[str, Any]) -> list[str]:
    """A sentence on the command of the study; none if the study did not keep it, or Python code ran it."""
    return [f"The study was run by: {facts['command']}"] if facts.get("command") else []


def _times(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates say of a study's stages, programs and versions."""
    seconds, programs = facts["stage_seconds"], facts["programs"]
    return {
        "stages": {"columns": ["stage", "seconds"],
                   "rows": [*([name, f"{value:.0f}"] for name, value in seconds.items()),
                            ["all", f"{sum(seconds.values()):.0f}"]]},
        "programs": f"The last session of this study compiled {programs['count']} programs in "
                    f"{programs['seconds']:.0f} s.",
        "versions": "Versions: " + ", ".join(f"{name} {v}" for name, v in facts["versions"].items()) + ".",
    }
