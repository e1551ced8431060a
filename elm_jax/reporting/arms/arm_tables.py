"""Tables that all studies of arms have: the arms and their costs, scores by set-up, the grid, the time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.evaluation import intervals
from elm_jax.evaluation.intervals import Estimate
from elm_jax.reporting.arms.arm_cells import ACCURACY, LOSS, ArmScores
from elm_jax.reporting.arms.verdicts import amount, number

NONE = "–"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report: a heading, a text, a table, pictures.

    Attributes:
        title: heading.
        text: below it.
        grid: ``columns``, ``rows`` and perhaps ``labels``, as the page's tables take it.
        pictures: names of their files.
    """

    title: str
    text: str
    grid: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"columns": [], "rows": []})
    pictures: Sequence[str] = ()


def arms_section(facts: Mapping[str, Any]) -> Section:
    """What the arms are and cost, and the settings that they chose."""
    arms = facts["arms"]
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm["choices"]))
    rows = [[arm["name"], arm["origin"], *costs(arm, arms[0]),
             *(_choice(arm["choices"].get(kind)) for kind in kinds)] for arm in arms]
    lengths = facts["lengths"]
    return Section("Arms", (
        f"Every arm is pretrained for the same steps on the same rows. Active parameters and operations are "
        f"those that a token uses: of a sparse layer the router and its own experts. Operations are those of "
        f"the forward pass, a token of a row of {lengths['inputs']} + {lengths['targets']} tokens. Rate and "
        f"batch size are chosen for each arm on held-out rows that no score uses."),
        {"columns": ["arm", "begins", *COSTS, *(f"{kind}: rate, batch" for kind in kinds)], "rows": rows,
         "labels": 2})


COSTS = ("parameters", "active", "MFLOPs a token", "of dense")


def costs(arm: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
    """An arm's parameters and operations, as cells."""
    return [f"{arm['total'] / 1e6:.2f} M", f"{arm['active'] / 1e6:.2f} M", f"{arm['flops'] / 1e6:.2f}",
            f"{arm['flops'] / dense['flops']:.3f}"]


def _choice(point: Mapping[str, Any] | None) -> str:
    return NONE if point is None else f"{point['rate']:g}, {point['batch_size']}"


def level(values: Mapping[str, np.ndarray], metric: str) -> Estimate:
    """Mean over tasks of scores f64[n], with the interval of their rows; a loss has its own sign again."""
    if metric == ACCURACY:
        parts = [intervals.mean_with_interval(own) for own in values.values()]
        return intervals.combined(parts, sum(part.n for part in parts))
    known = [-own[~np.isnan(own)] for own in values.values()]
    value = float(np.mean([own.mean() for own in known]))
    error = math.sqrt(sum(own.var(ddof=1) / len(own) for own in known if len(own) > 1)) / len(known)
    return Estimate(value, value - intervals.Z95 * error, value + intervals.Z95 * error,
                    sum(map(len, known)))


def levels_section(title: str, scores: ArmScores, arms: Sequence[Mapping[str, Any]],
                   setups: Sequence[tuple[str, Sequence[str], Mapping[str, Any]]]) -> Section:
    """Mean scores of every arm in every set-up, with what a token costs beside them.

    Args:
        title: heading.
        scores: of the study.
        arms: of the facts.
        setups: words, tasks and tags of each.
    """
    rows = []
    for words, tasks, tags in setups:
        for arm in arms:
            found = [task for task in tasks if scores.has(task, arm=arm["name"], **tags)]
            if not found:
                continue
            cells = []
            for metric in (ACCURACY, LOSS):
                values = scores.values(metric, found, arm=arm["name"], **tags)
                cells.append(amount(level(values, metric), metric, sign=False) if values else NONE)
            rows.append([words, arm["name"], *cells, chance_of(scores, found, arm["name"], tags),
                         *costs(arm, arms[0])])
    return Section(title, (
        "Means over tasks, with the 95% interval of their rows: accuracy by rank in percent, and the loss of "
        "the target in nats a token (less is better)."),
        {"columns": ["set-up", "arm", "accuracy", "target loss", "chance", *COSTS], "rows": rows,
         "labels": 2})


def chance_of(scores: ArmScores, tasks: Sequence[str], arm: str, tags: Mapping[str, Any]) -> str:
    """Mean over tasks of the accuracy of guessing, as a cell."""
    known = [scores.cell(task, arm=arm, **tags).chance for task in tasks]
    known = [chance for chance in known if chance is not None]
    return number(float(np.mean(known)), ACCURACY) if known else NONE


def tasks_section(scores: ArmScores, arms: Sequence[Mapping[str, Any]],
                  setups: Sequence[tuple[str, Sequence[str], Mapping[str, Any]]]) -> Section:
    """Scores of each task: accuracy and target loss of every arm."""
    rows = []
    for words, tasks, tags in setups:
        for task in tasks:
            cells = []
            for arm in arms:
                if not scores.has(task, arm=arm["name"], **tags):
                    cells.append(NONE)
                    continue
                cell = scores.cell(task, arm=arm["name"], **tags)
                loss = number(float(-np.nanmean(cell.values[LOSS])), LOSS)
                right = cell.values.get(ACCURACY)
                cells.append(loss if right is None else f"{number(right.mean(), ACCURACY)}, {loss}")
            if any(cell != NONE for cell in cells):
                rows.append([words, task, *cells])
    return Section("Scores by task", (
        "Accuracy in percent (of ranked answers) and target loss in nats a token."),
        {"columns": ["set-up", "task", *(arm["name"] for arm in arms)], "rows": rows, "labels": 2})


def grid_section(scores: ArmScores, arms: Sequence[Mapping[str, Any]]) -> Section:
    """The grid: held-out loss of every point, and which one each arm chose."""
    found: dict[tuple[str, str, float, int], list[float]] = {}
    for row in scores.rows:
        if row["setup"].startswith("grid "):
            key = row["setup"].removeprefix("grid "), row["arm"], row["learning_rate"], row["batch_size"]
            found.setdefault(key, []).append(row["value"])
    chosen = {(kind, arm["name"], point["rate"], point["batch_size"]) for arm in arms
              for kind, point in arm["choices"].items()}
    rows = [[kind, arm, f"{rate:g}", str(size), number(float(np.mean(losses)), LOSS),
             "chosen" if (kind, arm, rate, size) in chosen else ""]
            for (kind, arm, rate, size), losses in found.items()]
    return Section("Choice of rate and batch size", (
        "Target loss on held-out rows of the train splits, the mean over the tasks of the grid. Runs of all "
        "batch sizes see as many rows." if rows else "There was nothing to choose."),
        {"columns": ["runs", "arm", "rate", "batch", "held-out loss", ""], "rows": rows, "labels": 2})


def time_section(facts: Mapping[str, Any]) -> Section:
    """Seconds of the stages, programs and versions."""
    seconds, programs = facts["stage_seconds"], facts["programs"]
    rows = [*([name, f"{value:.0f}"] for name, value in seconds.items()),
            ["all", f"{sum(seconds.values()):.0f}"]]
    return Section("Time and programs", (
        f"The last session compiled {programs['count']} programs in {programs['seconds']:.0f} s. Versions: "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + "."),
        {"columns": ["stage", "seconds"], "rows": rows})
