"""The report of any results that `elm evaluate` wrote: models by tasks, intervals, answers, pictures."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from rich.console import Console

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.results import ResultsStore
from elm_jax.reporting import plots
from elm_jax.reporting.answers import Answers, read_answers
from elm_jax.reporting.cells import Cell, paired_difference
from elm_jax.reporting.markdown_text import Written, markdown_page
from elm_jax.reporting.page import RESULTS_HTML, RESULTS_MARKDOWN
from elm_jax.reporting.report import CONSTANT, fraction, legend, markdown_table, with_interval
from elm_jax.runtime import storage
from elm_jax.runtime.text_tables import Column, document

BASE = "base"
SAMPLES, LONGEST_SAMPLE = 3, 300
"""Answers that are shown of each model on each task, and characters of each."""
RANKS = {"metric": 2, "rows": 3, "over the base": 1, "majority": 4, "chance": 5, "split": 6}
"""Columns that a narrow terminal lacks, the highest first."""
MOST_PICTURES = 20
"""Tasks of which bars are drawn; the heat map shows all."""
ABOUT = ("Each value is over the scored rows, in percent, with the 95% interval that the results "
         "hold. Majority: always the most frequent right answer of these rows. Over the base: the paired "
         "difference on the same rows.")


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of the results, with the answers behind it.

    Attributes:
        row: of ``results.jsonl``.
        predictions: of the model on the task.
        answers: their statistics; None without predictions.
    """

    row: Mapping[str, Any]
    predictions: Sequence[Mapping[str, Any]]
    answers: Answers | None

    @property
    def values(self) -> np.ndarray | None:
        """Per-instance values f64[n] of this metric; None where the predictions do not hold them."""
        key = "correct" if self.row["metric"] == "accuracy" else self.row["metric"]
        held = [found.get(key) for found in self.predictions]
        if not held or any(type(value) not in (int, float) for value in held):
            return None  # BLEU, for one, is no mean of values of rows
        return np.asarray(held, np.float64)

    @property
    def place(self) -> tuple[str, str, str]:
        """Task, split and metric."""
        return self.row["task"], self.row["split"], self.row["metric"]

    def cell(self) -> Cell | None:
        """The values as a cell, for a paired difference."""
        if self.values is None:
            return None
        return Cell(self.values, np.asarray([found["index"] for found in self.predictions]),
                    self.row["metric"], self.row["dataset"], self.row["chance"])


@dataclasses.dataclass(frozen=True)
class ResultsReport:
    """A written report, and the scores that it shows."""

    report_path: epath.Path
    grid: Mapping[str, Any]

    def print_table(self, console: Console) -> None:
        """Prints every score, one a line."""
        columns = [Column(name, RANKS.get(name, 0)) for name in self.grid["columns"]]
        width = console.width if console.is_terminal else None
        lines = document(columns, self.grid["rows"], width, cure="the report has all")
        console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def write_results_report(place: storage.PathLike) -> ResultsReport:
    """Writes ``report.md``, ``report.html``, ``table.json`` and pictures beside results.

    Args:
        place: a folder with ``results.jsonl``, or with one other file of results; or such a file.

    Raises:
        InputError: there are no results here, or they are damaged.
    """
    path = find_results(place)
    store = ResultsStore(path.parent, path.name)
    scores = [_score(store, row) for row in store.rows()]
    if not scores:
        raise InputError(describe("The file holds no results", where=path,
                                  cure="write them by `elm evaluate --output`"))
    grid = scores_grid(scores)
    pictures = draw_scores(scores)
    texts = _render(path, scores, grid, pictures)
    for name, picture in pictures.items():
        storage.write_bytes(path.parent / name, picture)
    storage.write_json(path.parent / "table.json", {
        "schema_version": 1, "results": [dict(score.row) for score in scores]})
    storage.write_text(path.parent / "report.md", texts["markdown"])
    storage.write_text(path.parent / "report.html", texts["html"])
    return ResultsReport(path.parent / "report.html", grid)


def find_results(place: storage.PathLike) -> epath.Path:
    """Finds the file of results that a path names, or that lies in a folder.

    Raises:
        InputError: there is none, or there are several.
    """
    path = storage.as_path(place)
    if not path.exists():
        raise InputError(describe("There are no results here", where=path, got=storage.what_is_there(path),
                                  cure="give the folder or the file that `elm evaluate --output` wrote"))
    if not path.is_dir() and (path.parent / "study.json").exists():
        raise InputError(describe("These results are a study's, which has a report of its own", where=path,
                                  cure=f"give the folder: elm report {path.parent}"))
    if not path.is_dir():
        return path
    if (path / "results.jsonl").exists():
        return path / "results.jsonl"
    found = sorted(file for file in path.iterdir() if file.suffix == ".jsonl" and not file.is_dir())
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or ", ".join(
            sorted(file.name for file in path.iterdir())[:20]) or "an empty folder"
        raise InputError(describe("There are no results here" if not found else
                                  "Which file holds the results?", where=path, got=names,
                                  expected="results.jsonl, as `elm evaluate` writes it, or study.json",
                                  cure="name the file" if found else "give the folder of results"))
    return found[0]


def _score(store: ResultsStore, row: Mapping[str, Any]) -> Score:
    predictions = store.predictions(row["expert"], row["task"], row["split"])
    return Score(row, predictions, read_answers(predictions) if predictions else None)


def _models(scores: Sequence[Score]) -> list[str]:
    """Names of the models, the base first."""
    names = dict.fromkeys(score.row["expert"] for score in scores)
    return sorted(names, key=lambda name: name != BASE)


def _interval(row: Mapping[str, Any]) -> str:
    return with_interval({"value": row["value"], "low": row["ci95_low"], "high": row["ci95_high"]})


def _marked(text: str, score: Score) -> str:
    return f"{text} {CONSTANT}" if score.answers is not None and score.answers.constant else text


def scores_grid(scores: Sequence[Score]) -> dict[str, Any]:
    """Every score, one a line: task, model, metric, rows, interval, majority, chance, over the base."""
    bases = {score.place: score for score in scores if score.row["expert"] == BASE}
    order = {name: number for number, name in enumerate(_models(scores))}
    places = {place: number for number, place in enumerate(dict.fromkeys(score.place for score in scores))}
    rows = [[score.row["task"], score.row["split"], score.row["expert"], score.row["metric"],
             str(score.row["num_instances"]), _marked(_interval(score.row), score), _majority(score),
             fraction(score.row["chance"]), _over_base(score, bases.get(score.place))]
            for score in sorted(scores, key=lambda one: (places[one.place], order[one.row["expert"]]))]
    return {"columns": ["task", "split", "model", "metric", "rows", "percent", "majority", "chance",
                        "over the base"], "rows": rows, "labels": 4}


def _majority(score: Score) -> str:
    majority = None if score.answers is None else score.answers.majority
    return "–" if majority is None or score.row["metric"] != "accuracy" else fraction(float(majority.mean()))


def _over_base(score: Score, base: Score | None) -> str:
    """Words on the paired difference from the base; a dash where both were not scored on the same rows."""
    own, other = score.cell(), None if base is None or base is score else base.cell()
    if own is None or other is None or not np.array_equal(own.indices, other.indices):
        return "–"
    return with_interval(dataclasses.asdict(paired_difference({"": own}, {"": other})), sign=True)


def matrix_grid(scores: Sequence[Score]) -> dict[str, Any]:
    """Models as rows, tasks (with split and metric where these differ) as columns, percent."""
    places = list(dict.fromkeys(score.place for score in scores))
    known = {(score.row["expert"], score.place): score for score in scores}
    several = len({place[1] for place in places}) > 1
    heads = [f"{task}{f' {split}' if several else ''}{'' if metric == 'accuracy' else f' ({metric})'}"
             for task, split, metric in places]
    rows = [[model, *(_marked(fraction(known[model, place].row["value"]), known[model, place])
                      if (model, place) in known else "–" for place in places)]
            for model in _models(scores)]
    return {"columns": ["model", *heads], "rows": rows}


def samples_grid(scores: Sequence[Score]) -> dict[str, Any]:
    """The first answers of each model on each task, beside what is right."""
    seen, rows = set(), []
    for score in scores:
        key = (score.row["task"], score.row["split"], score.row["expert"])
        if key in seen:
            continue
        seen.add(key)
        rows += [[score.row["task"], str(found["index"]), score.row["expert"], _cut(found["prediction"]),
                  _cut(found["target"]), _verdict(found)] for found in score.predictions[:SAMPLES]]
    rows.sort(key=lambda row: row[0])
    return {"columns": ["task", "row", "model", "answer", "right answer", "right"], "rows": rows, "labels": 6}


def _verdict(found: Mapping[str, Any]) -> str:
    if "correct" in found:
        return "yes" if found["correct"] else "no"
    return f"ROUGE-L {fraction(found['rouge_l'])}" if "rouge_l" in found else "–"


def _cut(text: Any) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE - 1] + "…"


def draw_scores(scores: Sequence[Score]) -> dict[str, bytes]:
    """Draws bars of each task, and the heat map of models by tasks if the base was scored on all of them.

    Returns:
        PNG by the name of its file.
    """
    pictures = {}
    places = list(dict.fromkeys(score.place for score in scores))
    for number, place in enumerate(places[:MOST_PICTURES], start=1):
        own = sorted((score for score in scores if score.place == place),
                     key=lambda score: score.row["expert"] != BASE)
        pictures[f"scores_{number}.png"] = plots.score_bars(
            f"{place[0]}, {place[2]}", [score.row["expert"] for score in own],
            [(score.row["value"], score.row["ci95_low"], score.row["ci95_high"]) for score in own],
            own[0].row["chance"])
    models = [name for name in _models(scores) if name != BASE]
    known = {(score.row["expert"], score.place): score.row["value"] for score in scores}
    if models and len(places) > 1 and len(known) == (len(models) + 1) * len(places) and (
            BASE, places[0]) in known:
        pictures["heat_map.png"] = plots.heat_map(
            models, [place[0] for place in places],
            np.asarray([[known[model, place] for place in places] for model in models]),
            np.asarray([known[BASE, place] for place in places]), {})
    return pictures


def _summary(path: epath.Path, scores: Sequence[Score]) -> list[str]:
    models, tasks = _models(scores), {score.row["task"] for score in scores}
    rows = sum(score.row["num_instances"] for score in scores)
    cut = sum(score.row.get("num_cut") or 0 for score in scores)
    lines = [f"{len(models)} model{'s' * (len(models) != 1)} on {len(tasks)} task{'s' * (len(tasks) != 1)}, "
             f"{rows:,} scored rows in all, of {path.name}; written {storage.utc_now()}."]
    kinds = sorted({score.row["interval"] for score in scores if "interval" in score.row})
    if kinds:
        lines.append(f"Kind of interval: {', '.join(kinds)}.")
    if cut:
        lines.append(f"{cut:,} inputs were longer than what was read of them, and lost their end.")
    return lines


def _render(path: epath.Path, scores: Sequence[Score], grid: Mapping[str, Any],
            pictures: Mapping[str, bytes]) -> dict[str, str]:
    matrix, samples = matrix_grid(scores), samples_grid(scores)
    content = {"title": "Results", "summary": _summary(path, scores), "matrix": matrix, "scores": grid,
               "samples": samples, "about": ABOUT, "legend": legend(matrix)}
    safe = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    inline = [(name, "data:image/png;base64," + base64.b64encode(picture).decode())
              for name, picture in pictures.items()]
    return {"markdown": markdown_page(RESULTS_MARKDOWN, **content, table=markdown_table,
                                      pictures=[(name, Written(name)) for name in pictures]),
            "html": safe.from_string(RESULTS_HTML).render(**content, pictures=inline)}
