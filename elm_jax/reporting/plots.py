"""Plots of a report: the heat map of experts by tasks, and the bars of the unseen mean."""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.reporting.study_table import chosen_on_the_test
from elm_jax.runtime.terminal.text_tables import visible

COLOURS = {"reference": "#9aa5b1", "choice of experts": "#3d6f9e", "chosen on these scores": "#d9a441"}
LINES = ("--", ":")
CONSTANT = "†"
"""Marks one and the same answer on all of a task's rows, in tables and in the heat map."""
MOST_NUMBERED, MOST_NAMED = 30, 60
MOST_COLUMNS = 42
"""Most columns of one panel of the heat map; more would be too wide to read."""


def heat_map(experts: Sequence[str], tasks: Sequence[str], values: np.ndarray, base: np.ndarray,
             seen: Mapping[str, Sequence[str]], sizes: Sequence[int] = (),
             constant: np.ndarray | None = None) -> bytes:
    """Draws the matrix as PNG: numbers in percent, colours for the difference from the base.

    Many tasks are spread over panels, one below the other (see `panels_of`).

    Args:
        experts: row names.
        tasks: column names.
        values: f64[len(experts), len(tasks)], fractions.
        base: f64[len(tasks)], the base's own values.
        seen: expert -> the tasks that it was trained on; their cells are framed.
        sizes: numbers of tasks that belong together, in the order of `tasks`; empty for one group.
        constant: bool[len(experts), len(tasks)], where one and the same answer was given on all rows; these
            cells are hatched and carry `CONSTANT`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    difference = 100 * (values - base[None])
    limit = max(1.0, float(np.abs(difference).max()))
    constant = np.zeros(values.shape, bool) if constant is None else constant
    panels = panels_of(sizes or [len(tasks)])
    height = 3.2 + 0.27 * len(experts)
    figure = Figure(figsize=(3.5 + 0.42 * max(map(len, panels)), height * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, columns in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        own = [tasks[column] for column in columns]
        picture = axes.imshow(difference[:, columns], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        _write_cells(axes, values[:, columns], abs(difference[:, columns]) > 0.65 * limit,
                     [[task in seen.get(expert, ()) for task in own] for expert in experts],
                     constant[:, columns])
        axes.set_xticks(range(len(own)), [short_name(task) for task in own], rotation=60, ha="right",
                        rotation_mode="anchor", fontsize=7)
        axes.set_yticks(range(len(experts)), [short_name(expert) for expert in experts], fontsize=7)
        bar = figure.colorbar(picture, ax=axes, fraction=0.025, pad=0.01)
        bar.set_label("points above the base", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    low, high = 100 * values.min(), 100 * values.max()
    signs = "; frame: trained on this task" if any(seen.values()) else ""
    signs += f"; {CONSTANT} and hatch: one and the same answer on all rows" if constant.any() else ""
    figure.suptitle(textwrap.fill(
        f"Experts (rows) on tasks (columns), percent from {low:.0f} to {high:.0f}; colour: difference from "
        f"the base{signs}", 130 if max(map(len, panels)) > 15 else 60), fontsize=9)
    return png_of(figure)


def panels_of(sizes: Sequence[int]) -> list[np.ndarray]:
    """Column numbers of each panel: groups stay together up to `MOST_COLUMNS`, larger ones are split.

    >>> [len(panel) for panel in panels_of([18, 9, 6, 14, 27])]
    [33, 41]
    """
    panels: list[list[int]] = []
    start = 0
    for size in sizes:
        parts = np.array_split(np.arange(start, start + size), max(1, -(-size // MOST_COLUMNS)))
        start += size
        for part in parts:
            if not panels or len(panels[-1]) + len(part) > MOST_COLUMNS:
                panels.append([])
            panels[-1].extend(part)
    return [np.asarray(panel) for panel in panels if panel]


def _write_cells(axes: Any, values: np.ndarray, strong: np.ndarray, framed: Sequence[Sequence[bool]],
                 constant: np.ndarray) -> None:
    """Writes percentages into cells, white on strong colours; frames seen tasks, hatches constant answers."""
    from matplotlib.patches import Rectangle

    for (row, column), value in np.ndenumerate(values):
        ink = "white" if strong[row, column] else "black"
        mark = CONSTANT if constant[row, column] else ""
        axes.text(column, row, f"{100 * value:.0f}{mark}", ha="center", va="center", fontsize=7, color=ink)
        if constant[row, column]:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=0, hatch="////",
                                     edgecolor=ink, alpha=0.22))
        if framed[row][column]:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=1.6))


def bars(rows: Sequence[Mapping[str, Any]], column: str,
         references: Mapping[str, float | None]) -> bytes:
    """Draws one column of the table as PNG: bars with 95% intervals.

    Args:
        rows: of the table.
        column: of the table.
        references: name -> value of a vertical line; None draws none. At most two.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    estimates = [row["values"][column] for row in rows]
    value = np.asarray([100 * estimate["value"] for estimate in estimates])
    errors = np.asarray([[100 * (e["value"] - e["low"]) for e in estimates],
                         [100 * (e["high"] - e["value"]) for e in estimates]])
    figure = Figure(figsize=(6.4, 1.1 + 0.34 * len(rows)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = [COLOURS["reference"] if row["name"] in ("base", "multitask", "random expert") else
               COLOURS["chosen on these scores"] if chosen_on_the_test(row["name"]) else
               COLOURS["choice of experts"] for row in rows]
    axes.barh(range(len(rows)), value, xerr=errors, color=colours, height=0.65,
              error_kw={"lw": 1, "capsize": 2})
    for place, (number, error) in enumerate(zip(value, errors[1], strict=True)):
        axes.text(number + error + 0.6, place, f"{number:.1f}", va="center", fontsize=8,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # over the lines
    axes.set_yticks(range(len(rows)), [short_name(row["name"], 60) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, min(108.0, 1.12 * (value + errors[1]).max() + 2))
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    for (name, reference), style in zip(references.items(), LINES, strict=False):
        if reference is not None:
            handles.append(axes.axvline(100 * reference, ls=style, lw=1, color="black",
                                        label=f"{name} {100 * reference:.1f}"))
    axes.legend(handles=handles, fontsize=7, ncols=3, frameon=False, loc="lower center",
                bbox_to_anchor=(0.5, 1.0))
    axes.set_xlabel(f"{column}, percent, with 95% interval", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    return png_of(figure)


def score_bars(task: str, models: Sequence[str], scores: Sequence[tuple[float, float, float]],
               chance: float | None) -> bytes:
    """Draws the scores of several models on one task as PNG: bars with their intervals.

    Args:
        task: the title.
        models: names of the bars.
        scores: value, low and high of each model, fractions.
        chance: value of a vertical line; None draws none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    value, low, high = 100 * np.asarray(scores, np.float64).T
    figure = Figure(figsize=(6.4, 1.1 + 0.34 * len(models)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(range(len(models)), value, color=COLOURS["choice of experts"], height=0.65, error_kw={
        "lw": 1, "capsize": 2}, xerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)])
    axes.set_yticks(range(len(models)), [short_name(name, 60) for name in models], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, min(108.0, 1.12 * high.max() + 2)))
    if chance is not None:
        axes.axvline(100 * chance, ls=LINES[0], lw=1, color="black")
    axes.set_title(short_name(task, 80), fontsize=9)
    axes.set_xlabel("percent, with 95% interval" + ("" if chance is None else f"; chance {100 * chance:.1f}"),
                    fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    return png_of(figure)


def routing_map(experts: Sequence[str], shares: np.ndarray) -> bytes:
    """Draws shares f64[E, E] of keys of each expert (rows) that go to each (columns) as PNG.

    Numbers are written for at most `MOST_NUMBERED` experts; names at most `MOST_NAMED` of them, evenly.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = max(len(experts), 1)
    side = 2.5 + min(0.36 * count, 9.0)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(100 * shares.reshape(count, -1) if len(experts) else np.zeros((1, 1)), cmap="Blues",
                          vmin=0, vmax=100, interpolation="nearest")
    named = range(0, len(experts), -(-count // MOST_NAMED))
    names = [short_name(experts[place], 30) for place in named]
    axes.set_xticks(named, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(named, names, fontsize=7)
    if len(experts) <= MOST_NUMBERED:
        for (row, column), value in np.ndenumerate(shares):
            if value >= 0.005:
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 0.6 else "black")
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("percent of the row's keys", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_ylabel("keys of", fontsize=8)
    axes.set_xlabel("go to", fontsize=8)
    return png_of(figure)


def short_name(name: str, length: int = 38) -> str:
    """A name for an axis or a title, cut at `length` characters; a dollar in it begins no formula."""
    name = visible(name)
    short = name if len(name) <= length else name[: length - 1] + "…"
    return short.replace("$", r"\$")


def png_of(figure: Any) -> bytes:
    """A Matplotlib figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of signs that no font here has, Chinese ones say: a box stands for them
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()
