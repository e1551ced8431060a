"""Loads of the experts of sparse layers in reports: tables, heat maps, and a page of runs by themselves."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console

from elm_jax.errors import InputError, describe
from elm_jax.reporting.page import RUNS_HTML, RUNS_MARKDOWN
from elm_jax.reporting.page_parts import Made, html_page, markdown_of
from elm_jax.reporting.plots import MOST_NAMED, png_of, short_name
from elm_jax.reporting.report import fraction, markdown_table
from elm_jax.runtime import storage
from elm_jax.runtime.terminal.text_tables import Column, document
from elm_jax.training.router_log import FILE, LayerLoad, read_loads

Runs = Mapping[str, Sequence[LayerLoad]]
"""Layers by the name of the run."""
PLACES = (FILE, f"*/{FILE}", f"*/*/{FILE}")
LOGS = {FILE, "metrics.jsonl"}
MOST_RUNS = 12
"""Runs that have pictures; the table has all."""
MOST_NUMBERED, WIDEST = 32, 13.0
"""Experts up to which cells hold numbers, and inches of a picture's cells at most."""
EVEN = "#d1622b"
RANKS = {"steps": 4, "least": 2, "z": 5, "balance": 3, "entropy": 1}
"""Columns that a narrow terminal lacks, the highest first."""


@dataclasses.dataclass(frozen=True)
class LoadsReport:
    """A written page, and its table to print."""

    report_path: epath.Path
    grid: Mapping[str, Any]

    def print_table(self, console: Console) -> None:
        """Prints every layer, one a line."""
        columns = [Column(name, RANKS.get(name.split(",")[0], 0), "number" if place >= self.grid["labels"]
                          else "name") for place, name in enumerate(self.grid["columns"])]
        width = console.width if console.is_terminal else None
        lines = document(columns, self.grid["rows"], width, cure="the report has all")
        console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def runs_in(place: storage.PathLike) -> dict[str, epath.Path]:
    """The logs of routers that a path names: that file, a run's folder, or a folder of runs.

    Returns:
        By the name of the run; none where the folder holds results, or no run of a sparse network.
    """
    path = storage.as_path(place)
    if path.name == FILE and path.exists():
        return {storage.absolute(path).parent.name: path}
    if not path.is_dir() or any(file.suffix == ".jsonl" and file.name not in LOGS for file in path.iterdir()):
        return {}
    found = [file for pattern in PLACES for file in sorted(path.glob(pattern))]
    whole = storage.absolute(path)
    return {"/".join(storage.absolute(file).parent.parts[len(whole.parts):]) or whole.name: file
            for file in found}


def write_loads_report(place: storage.PathLike, *, made: Made | None = None,
                       experts: Sequence[storage.PathLike] = ()) -> LoadsReport:
    """Writes ``router.html``, ``router.md`` and pictures of the routers of runs, beside their logs.

    Args:
        place: what `runs_in` takes.
        made: when and by which command; by default now, by Python code.
        experts: none: a run's page shows no cards.

    Raises:
        InputError: there is no run of a sparse network, its log is damaged, or experts are named.
    """
    if experts:
        raise InputError(describe("The page of runs shows no cards of experts", where="experts",
                                  got=", ".join(map(str, experts)), cure="leave --experts out"))
    runs = {name: loads for name, file in runs_in(place).items() if (loads := read_loads(file))}
    if not runs:
        raise InputError(describe("There is no run of a sparse network here", where=place,
                                  expected=f"a run's folder with lines in {FILE}, or a folder of such"))
    path = storage.as_path(place)
    folder = path if path.is_dir() else path.parent
    content, pictures = loads_content(runs), draw_loads(runs)
    page = {"title": f"Router loads: {storage.absolute(folder).name}",
            "summary": [(made or Made()).sentence()], "loads": content}
    for name, picture in pictures.items():
        storage.write_bytes(folder / name, picture)
    texts = {".md": markdown_of(RUNS_MARKDOWN, pictures, table=markdown_table, **page),
             ".html": html_page(RUNS_HTML, pictures, **page)}
    for suffix, text in texts.items():
        storage.write_text(folder / f"router{suffix}", text)
    return LoadsReport(folder / "router.html", content["grid"])


def loads_content(runs: Runs) -> dict[str, Any]:
    """What the templates of `page` say of runs: a table, pictures' captions by file; empty without runs."""
    if not runs:
        return {}
    return {"grid": loads_grid(runs), "plots": [(name, caption) for name, caption, *_ in _plots(runs)],
            "left": max(0, len(runs) - MOST_RUNS),
            "informed": any(layer.by_task for layers in runs.values() for layer in layers)}


def loads_grid(runs: Runs) -> dict[str, Any]:
    """Every layer of every run, one a line; loads as multiples of an even one."""
    rows = []
    for name, layers in runs.items():
        for layer in layers:
            count, means, information = len(layer.load), layer.means, layer.information
            rows.append([name, layer.layer, f"{layer.steps[0]} to {layer.steps[1]}",
                         f"{count * layer.load.max():.2f}", f"{count * layer.load.min():.2f}",
                         fraction(means["dropped"]), fraction(means["entropy_share"]),
                         "–" if information is None else f"{information:.3f}",
                         f"{means['balance']:.3f}", f"{means['z']:.2f}"])
    return {"columns": ["run", "layer", "steps", "largest, × even", "least, × even", "dropped, %",
                        "entropy, % of log E", "information, nats", "balance", "z"],
            "rows": rows, "labels": 3}


def draw_loads(runs: Runs) -> dict[str, bytes]:
    """Draws heat maps of at most `MOST_RUNS` runs; returns PNG by the name of its file."""
    return {name: draw(title, layers) for name, title, draw, layers in _plots(runs)}


def _plots(runs: Runs) -> list[tuple[str, str, Any, Sequence[LayerLoad]]]:
    """File, caption, function and layers of every picture."""
    plots: list[tuple[str, str, Any, Sequence[LayerLoad]]] = []
    for number, (run, layers) in enumerate(list(runs.items())[:MOST_RUNS], start=1):
        plots.append((f"router_{number}.png", f"{run}: load of experts by layer", layer_map, layers))
        known = [layer for layer in layers if layer.by_task]
        if known:
            plots.append((f"router_{number}_tasks.png", f"{run}: load of experts by task", task_maps, known))
    return plots


def layer_map(title: str, layers: Sequence[LayerLoad]) -> bytes:
    """Draws layers by experts as PNG."""
    count = max(len(layer.load) for layer in layers)
    shares = np.full((len(layers), count), np.nan)
    for row, layer in zip(shares, layers, strict=True):
        row[:len(layer.load)] = layer.load
    return _maps(title, [("", [layer.layer for layer in layers], shares)])


def task_maps(title: str, layers: Sequence[LayerLoad]) -> bytes:
    """Draws tasks by experts as PNG, a panel a layer."""
    panels = []
    for layer in layers:
        counts = np.asarray(list(layer.by_task.values()))
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)
        panels.append((f"{layer.layer}: {layer.information:.3f} nats of task and expert",
                       list(layer.by_task), shares))
    return _maps(title, panels)


def _maps(title: str, panels: Sequence[tuple[str, Sequence[str], np.ndarray]]) -> bytes:
    """Draws panels (title, names of rows, shares f64[rows, E]) of one scale, from 0, with the even share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = max(shares.shape[1] for _, _, shares in panels)
    cells = min(0.4 * max(count, 6), WIDEST)
    columns = max(1, min(len(panels), int(WIDEST // (cells + 2))))
    rows = -(-len(panels) // columns)
    height = sum(0.6 + min(0.26 * max(map(len, (names for _, names, _ in panels[at:at + columns]))), 12.0)
                 for at in range(0, len(panels), columns))
    figure = Figure(figsize=(columns * (cells + 2.0) + 1.0, max(height + 0.9, 2.4)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    top = max(float(np.nanmax(shares)) for _, _, shares in panels) or 1.0
    for axes, (name, names, shares) in zip(grid.ravel(), panels, strict=False):
        picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100 * top, aspect="auto",
                              interpolation="nearest")
        axes.set_title(short_name(name, 60), fontsize=8, pad=3)
        step = -(-len(names) // MOST_NAMED)
        axes.set_yticks(range(0, len(names), step), [short_name(each, 34) for each in names[::step]],
                        fontsize=7)
        axes.set_xticks(range(0, shares.shape[1], -(-shares.shape[1] // MOST_NUMBERED)))
        axes.tick_params(length=2, labelsize=7)
        if count <= MOST_NUMBERED:
            _write_shares(axes, shares, top)
    for axes in grid.ravel()[len(panels):]:
        axes.set_visible(False)
    figure.suptitle(short_name(title, 90), fontsize=9)
    figure.supxlabel("expert", fontsize=8)
    bar = figure.colorbar(picture, ax=grid, fraction=0.03, pad=0.01, aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.ax.axhline(100 / count, color=EVEN, lw=2)
    bar.set_label(f"percent of choices; line: even, {100 / count:.3g}", fontsize=8)
    return png_of(figure)


def _write_shares(axes: Any, shares: np.ndarray, top: float) -> None:
    """Writes percentages into cells, white on strong colours."""
    for (row, column), value in np.ndenumerate(shares):
        if not np.isnan(value):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if value > 0.6 * top else "black")
