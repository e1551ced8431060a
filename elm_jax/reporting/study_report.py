"""The report of a study: writes its results as table, Markdown, HTML and pictures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.cells import cell_len
from rich.console import Console

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.answers import read_answers
from elm_jax.evaluation.results import ResultsStore, kept_results
from elm_jax.reporting import plots, report, samples
from elm_jax.reporting.cells import Cell, Matrix, cell_of
from elm_jax.reporting.curve_plots import learning_curves
from elm_jax.reporting.expert_cards import find_experts
from elm_jax.reporting.groups import BENCHMARKS, METRICS
from elm_jax.reporting.page_parts import Made
from elm_jax.reporting.plots import CONSTANT
from elm_jax.reporting.router_comparison import read_picks, router_comparison
from elm_jax.reporting.router_grid import routers_content
from elm_jax.reporting.router_loads import draw_loads, loads_content
from elm_jax.reporting.study_facts import read_facts
from elm_jax.reporting.study_table import study_table, target_tasks
from elm_jax.runtime import storage
from elm_jax.runtime.terminal.text_tables import Column, document, visible, wrapped
from elm_jax.training.router_log import FILE, read_loads

TITLE = "percent; last column: paired difference, 95% interval (paired bootstrap)"

MOST_CELLS = 5_000
"""Cells of the heat map up to which HTML also has it as a table."""


@dataclasses.dataclass(frozen=True)
class ReportOutcome:
    """The folder of a written report, and the table to print."""

    report_path: epath.Path
    table: dict[str, Any]

    def print_table(self, console: Console) -> None:
        """Prints the study's table."""
        grid = report.results_grid(self.table)
        first, *others, last = grid["columns"]
        columns = [Column(first), *(Column(name, _rank(name), "number") for name in others),
                   Column(last, 3, "number")]
        rows = [(name.split(" (")[0], *(value.replace(f" {CONSTANT}", CONSTANT) for value in values))
                for name, *values in grid["rows"]]
        width = console.width if console.is_terminal else None
        lines = [*document(columns, rows, width, cure="the report has all", title=TITLE), ""]
        marks = report.legend(grid)
        for line in (*([f"{marks}."] if marks else ()), *report.summary(self.table),
                     report.own_grids(self.table)[2]):
            lines += wrapped(visible(line), width or max(map(cell_len, lines)))
        console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def _rank(column: str) -> int:
    """When a narrow terminal loses a column of the study's table: data sets first, then other means."""
    return {"unseen mean": 1, "seen mean": 2}.get(column, 4 if " " in column or column == "ROUGE-L" else 5)


def is_study(folder: storage.PathLike) -> bool:
    """Whether a folder holds a study's results: its facts stand beside them."""
    return (storage.as_path(folder) / "study.json").exists()


def write_report(folder: storage.PathLike, store: ResultsStore | None = None, *, made: Made | None = None,
                 experts: Sequence[storage.PathLike] = ()) -> ReportOutcome:
    """Writes ``report.md``, ``report.html``, ``table.json`` and the pictures into a results folder.

    Args:
        folder: of a study's results.
        store: of these results, if it is open.
        made: when and by which command; by default now, by Python code.
        experts: folders of experts, beside those of the study's own folder.

    Raises:
        InputError: no study was finished here, a cell of the matrix is missing, or a given folder holds no
            expert.
    """
    folder = storage.as_path(folder)
    if not is_study(folder):
        raise InputError(describe("There are no results of a study here", where=folder,
                                  expected="a folder with study.json and results.jsonl",
                                  cure="`elm report` of other results says what `elm evaluate` found"))
    with kept_results(folder):
        return _write(folder, store or ResultsStore(folder), made or Made(), experts)


def _write(folder: epath.Path, store: ResultsStore, made: Made, experts: Sequence[storage.PathLike]
           ) -> ReportOutcome:
    """Does as `write_report`, in a folder that no other process writes."""
    facts = read_facts(folder)
    matrix = read_matrix(store)
    table, picks = study_table(facts, matrix), read_picks(folder, facts)
    if picks is not None:
        table["routers"] = router_comparison(facts, matrix, picks)
    wanted = {row["expert"]: row.get("model") for row in store.rows() if row["expert"] != facts["base"]}
    found = find_experts(wanted, [storage.absolute(folder).parent], experts)
    pictures = draw(facts, matrix, table)
    losses = {name: expert.losses for name, expert in found.items() if expert.losses}
    if losses:
        pictures["learning_curves.png"] = learning_curves(losses)
    of_base = read_loads(storage.absolute(folder).parent / "base" / FILE)
    runs = {name: loads for name, loads in (
        (facts["base"], of_base), *((name, expert.loads) for name, expert in found.items())) if loads}
    pictures |= draw_loads(runs)
    extras = report.Extras(made, pictures, found, study_samples(facts, matrix, store),
                           heat_map_grid(facts, matrix), routers_content(table.get("routers")),
                           loads_content(runs))
    texts = report.render(facts, table, oracle_ranks(facts, matrix), extras)
    for name, picture in pictures.items():
        storage.write_bytes(folder / name, picture)
    storage.write_json(folder / "table.json", {"schema_version": 1, **table})
    storage.write_text(folder / "report.md", texts["markdown"])
    storage.write_text(folder / "report.html", texts["html"])
    return ReportOutcome(folder / "report.html", table)


def read_report(folder: storage.PathLike) -> ReportOutcome:
    """Reads the report that `write_report` wrote."""
    folder = storage.as_path(folder)
    table = storage.read_json(folder / "table.json", kind="study's table", schema_version=1)
    return ReportOutcome(folder / "report.html", table)


def read_matrix(store: ResultsStore) -> Matrix:
    """Reads all cells of a results folder, with their per-instance values."""
    matrix = {}
    for row in store.rows():
        if row["metric"] not in METRICS:
            continue  # what a task is scored by beside accuracy or ROUGE-L
        predictions = store.predictions(row["expert"], row["task"], row["split"])
        key = "correct" if row["metric"] == "accuracy" else "rouge_l"
        found = read_answers(predictions)
        matrix[row["expert"], row["task"]] = Cell(
            np.asarray([prediction[key] for prediction in predictions], np.float64),
            np.asarray([prediction["index"] for prediction in predictions]),
            row["metric"], row["dataset"], row["chance"], majority=found.majority,
            by_position=found.by_position, constant=found.constant, num_cut=row.get("num_cut"))
    return matrix


def draw(facts: dict[str, Any], matrix: Matrix, table: dict[str, Any]) -> dict[str, bytes]:
    """Draws the pictures of the scores; returns PNG by the name of its file."""
    experts, groups = _experts_and_groups(facts)
    tasks = [task for group in groups for task in group]
    cells = [[cell_of(matrix, expert, task) for task in tasks] for expert in experts]
    values, constant = (np.asarray([[get(cell) for cell in row] for row in cells])
                        for get in (lambda cell: cell.values.mean(), lambda cell: cell.constant))
    base = np.asarray([cell_of(matrix, facts["base"], task).values.mean() for task in tasks])
    seen = {expert["id"]: expert["tasks"] for expert in facts["experts"]}
    sizes = list(map(len, groups))
    return {"heat_map.png": plots.heat_map(experts, tasks, values, base, seen, sizes, constant),
            "bars.png": plots.bars(table["rows"], "unseen mean", {
                name: table[name]["unseen mean"] for name in ("chance", "majority")})}


def _experts_and_groups(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Rows of the heat map, and its columns in groups."""
    groups = [facts[name] for name in ("seen_tasks", "unseen_tasks", "generative_tasks")]
    groups += [facts.get(name, []) for name in BENCHMARKS.values()]
    return [expert["id"] for expert in facts["experts"]], groups


def heat_map_grid(facts: dict[str, Any], matrix: Matrix) -> dict[str, Any]:
    """The heat map as a grid, the base first; no rows if it has more than `MOST_CELLS`."""
    experts, groups = _experts_and_groups(facts)
    tasks = [task for group in groups for task in group]
    if len(tasks) * (1 + len(experts)) > MOST_CELLS:
        return {"columns": [], "rows": []}
    rows = []
    for expert in (facts["base"], *experts):
        cells = [cell_of(matrix, expert, task) for task in tasks]
        rows.append([expert, *(report.marked(report.fraction(cell.values.mean()), cell.constant)
                               for cell in cells)])
    return {"columns": ["", *tasks], "rows": rows}


def study_samples(facts: dict[str, Any], matrix: Matrix, store: ResultsStore) -> dict[str, Any]:
    """Sample answers of the base, the baseline and the routed experts, on target tasks and then on seen ones.

    The rows are chosen by the answers of the expert that the task is routed to.
    """
    lines: list[list[Any]] = []
    for task in (*target_tasks(facts), *facts["seen_tasks"]):
        decision = facts["decisions"].get(task)
        routed = {} if decision is None else {
            decision["top_k"][0]: "the task is routed to it", decision["merged"]: "merged"}
        words = {facts["base"]: "", facts["multitask"]: "", **routed}
        split = next(row["split"] for row in store.rows() if row["task"] == task)
        names = {name: f"{name} ({word})" if word else name for name, word in words.items()
                 if (name, task) in matrix and store.has_predictions(name, task, split)}
        if not names:
            continue
        lines += samples.samples_of_task(
            task, {shown: store.predictions(name, task, split) for name, shown in names.items()},
            store.prompts(task, split), next((names[name] for name in routed if name in names),
                                             next(iter(names.values()))))
    return samples.samples_table(lines)


def oracle_ranks(facts: dict[str, Any], matrix: Matrix) -> dict[str, str]:
    """For each unseen task: the library's best expert by its own score, and its rank in the routing."""
    words = {}
    for task in target_tasks(facts):
        library = facts["library"]
        scores = [cell_of(matrix, expert, task).values.mean() for expert in library]
        best = library[int(np.argmax(scores))]
        ranking = [line["expert"] for line in facts["decisions"][task]["ranking"]]
        words[task] = f"{best} ({ranking.index(best) + 1} of {len(ranking)})"
    return words
