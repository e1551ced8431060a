"""The report of a study: writes its results as table, Markdown, HTML and pictures."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluator import ResultsStore
from elm_jax.reporting import plots, report
from elm_jax.reporting.answers import read_answers
from elm_jax.reporting.cells import Cell, Matrix, cell_of
from elm_jax.reporting.groups import BENCHMARKS, METRICS
from elm_jax.reporting.study_facts import read_facts
from elm_jax.reporting.study_table import study_table, target_tasks
from elm_jax.runtime import storage


@dataclasses.dataclass(frozen=True)
class ReportOutcome:
    """The folder of a written report, and the table to print."""

    report_path: epath.Path
    table: dict[str, Any]

    def print_table(self, console: Console) -> None:
        """Prints the study's table."""
        grid = report.results_grid(self.table)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False,
                      title="percent; last column: paired difference, 95% interval (paired bootstrap)")
        for number, name in enumerate(grid["columns"]):
            outer = number in (0, len(grid["columns"]) - 1)
            table.add_column(name, justify="right" if number else "left", no_wrap=outer,
                             overflow="fold", width=None if outer else 6)
        for name, *values in grid["rows"]:
            table.add_row(name.split(" (")[0], *values)
        natural = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        console.width = max(console.width, natural)  # a narrower one would cut numbers
        console.print(table)
        for line in (*report.summary(self.table), report.own_grids(self.table)[2]):
            console.print(line)


def is_study(folder: storage.PathLike) -> bool:
    """Whether a folder holds a study's results: its facts stand beside them."""
    return (storage.as_path(folder) / "study.json").exists()


def write_report(folder: storage.PathLike, store: ResultsStore | None = None) -> ReportOutcome:
    """Writes ``report.md``, ``report.html``, ``table.json`` and the pictures into a results folder.

    Raises:
        InputError: no study was finished here, or a cell of the matrix is missing.
    """
    folder = storage.as_path(folder)
    if not is_study(folder):
        raise InputError(describe("There are no results of a study here", where=folder,
                                  expected="a folder with study.json and results.jsonl",
                                  cure="`elm report` of other results says what `elm evaluate` found"))
    facts = read_facts(folder)
    matrix = read_matrix(store or ResultsStore(folder))
    table = study_table(facts, matrix)
    pictures = draw(facts, matrix, table)
    texts = report.render(facts, table, oracle_ranks(facts, matrix), pictures)
    for name, picture in pictures.items():
        with storage.guard_writes(folder):
            (folder / f"{name}.png").write_bytes(picture)
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
    """Draws the report's pictures; returns PNG by name."""
    experts = [expert["id"] for expert in facts["experts"]]
    groups = [facts[name] for name in ("seen_tasks", "unseen_tasks", "generative_tasks")]
    groups += [facts.get(name, ()) for name in BENCHMARKS.values()]
    tasks = [task for group in groups for task in group]
    values = np.asarray([[cell_of(matrix, expert, task).values.mean() for task in tasks]
                         for expert in experts])
    base = np.asarray([cell_of(matrix, facts["base"], task).values.mean() for task in tasks])
    seen = {expert["id"]: expert["tasks"] for expert in facts["experts"]}
    return {"heat_map": plots.heat_map(experts, tasks, values, base, seen, list(map(len, groups))),
            "bars": plots.bars(table["rows"], "unseen mean", {
                name: table[name]["unseen mean"] for name in ("chance", "majority")})}


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
