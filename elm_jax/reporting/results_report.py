"""The report of any results that `elm evaluate` wrote: models by tasks, intervals, answers, pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.cells import cell_len
from rich.console import Console

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.answers import Answers, is_constant, read_answers
from elm_jax.evaluation.results import ResultsStore, kept_results
from elm_jax.reporting import plots, samples
from elm_jax.reporting.cells import Cell, paired_difference
from elm_jax.reporting.curve_plots import learning_curves
from elm_jax.reporting.expert_cards import FoundExpert, find_experts
from elm_jax.reporting.page import RESULTS_HTML, RESULTS_MARKDOWN
from elm_jax.reporting.page_parts import Made, html_page, markdown_of
from elm_jax.reporting.report import Extras, fraction, legend, markdown_table, marked, with_interval
from elm_jax.reporting.router_loads import draw_loads, loads_content
from elm_jax.runtime import storage
from elm_jax.runtime.terminal.text_tables import Column, document, visible, wrapped

BASE = "base"
INTERVALS = {"wilson": "Wilson's score interval"}
OWN_ANSWERS = ("acc_norm", "acc_norm_tokens")
"""Metrics by whose scores other choices may be chosen than the predictions hold."""
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
        predictions: of the model on the task; none where the results came without them.
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
    def constant(self) -> bool:
        """Whether the model gave one and the same answer on all rows; False where it is not known."""
        if self.row["metric"] in OWN_ANSWERS:
            return False
        if self.answers is not None:
            return self.answers.constant
        return is_constant(self.row.get("top_answer_share"), self.row["num_instances"])

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
        if marks := legend(self.grid):
            lines += wrapped(visible(f"{marks}."), width or max(map(cell_len, lines)))
        console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def write_results_report(place: storage.PathLike, *, made: Made | None = None,
                         experts: Sequence[storage.PathLike] = ()) -> ResultsReport:
    """Writes ``report.md``, ``report.html``, ``table.json`` and pictures beside results.

    Args:
        place: a folder with ``results.jsonl``, or with one other file of results; or such a file.
        made: when and by which command; by default now, by Python code.
        experts: folders of experts, beside those that lie near the results.

    Raises:
        InputError: there are no results here, or they are damaged, or a given folder holds no expert.
    """
    path = find_results(place)
    with kept_results(path.parent):
        return _write(path, made or Made(), experts)


def _write(path: epath.Path, made: Made, experts: Sequence[storage.PathLike]) -> ResultsReport:
    """Does as `write_results_report`, in a folder that no other process writes."""
    store = ResultsStore(path.parent, path.name)
    scores = [_score(store, row) for row in store.rows()]
    if not scores:
        raise InputError(describe("The file holds no results", where=path,
                                  cure="write them by `elm evaluate --output`"))
    folder = storage.absolute(path.parent)
    wanted = {score.row["expert"]: score.row.get("model") for score in scores if score.row["expert"] != BASE}
    found = find_experts(wanted, [folder, folder.parent], experts)
    runs = {name: expert.loads for name, expert in found.items() if expert.loads}
    grid, pictures = scores_grid(scores), draw_scores(scores, found) | draw_loads(runs)
    extras = Extras(made, pictures, found, samples_grid(scores, store), matrix_grid(scores),
                    loads=loads_content(runs))
    texts = _render(path, scores, grid, extras)
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
    place = row["expert"], row["task"], row["split"]
    predictions = store.predictions(*place) if store.has_predictions(*place) else []
    return Score(row, predictions, read_answers(predictions) if predictions else None)


def _models(scores: Sequence[Score]) -> list[str]:
    """Names of the models, the base first."""
    names = dict.fromkeys(score.row["expert"] for score in scores)
    return sorted(names, key=lambda name: name != BASE)


def _interval(row: Mapping[str, Any]) -> str:
    return with_interval({"value": row["value"], "low": row["ci95_low"], "high": row["ci95_high"]})


def _marked(text: str, score: Score) -> str:
    return marked(text, score.constant)


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
    rows = [[model, *(_marked(fraction(known[model, place].row["value"]), known[model, place])
                      if (model, place) in known else "–" for place in places)]
            for model in _models(scores)]
    return {"columns": ["model", *_heads(places)], "rows": rows}


def _heads(places: Sequence[tuple[str, str, str]]) -> list[str]:
    """Names of columns: of the task, and of split and metric where these differ."""
    several = len({place[1] for place in places}) > 1
    return [f"{task}{f' {split}' if several else ''}{'' if metric == 'accuracy' else f' ({metric})'}"
            for task, split, metric in places]


def samples_grid(scores: Sequence[Score], store: ResultsStore) -> dict[str, Any]:
    """Answers of all models on a right and a wrong row of each task, as the first expert's answers are."""
    lines: list[list[Any]] = []
    for task, split in dict.fromkeys(score.place[:2] for score in scores):
        models = {score.row["expert"]: score.predictions for score in scores
                  if score.place[:2] == (task, split) and score.predictions}
        if models:
            ordered = {name: models[name] for name in _models(scores) if name in models}
            by = next((name for name in ordered if name != BASE), BASE)
            lines += samples.samples_of_task(task, ordered, store.prompts(task, split), by)
    return samples.samples_table(lines)


def draw_scores(scores: Sequence[Score], experts: Mapping[str, FoundExpert]) -> dict[str, bytes]:
    """Draws bars of each task, the heat map if all models were scored on all of them, and learning curves.

    Returns:
        PNG by the name of its file.
    """
    pictures = {}
    places = list(dict.fromkeys(score.place for score in scores))
    for number, place in enumerate(places[:MOST_PICTURES], start=1):
        own = sorted((score for score in scores if score.place == place),
                     key=lambda score: score.row["expert"] != BASE)
        pictures[f"scores_{number}.png"] = plots.score_bars(
            f"{place[0]}, {place[2]}", [_marked(score.row["expert"], score) for score in own],
            [(score.row["value"], score.row["ci95_low"], score.row["ci95_high"]) for score in own],
            own[0].row["chance"])
    models = [name for name in _models(scores) if name != BASE]
    known = {(score.row["expert"], score.place): score for score in scores}
    if models and len(places) > 1 and len(known) == (len(models) + 1) * len(places) and (
            BASE, places[0]) in known:
        cells = [[known[model, place] for place in places] for model in models]
        pictures["heat_map.png"] = plots.heat_map(
            models, _heads(places), np.asarray([[score.row["value"] for score in row] for row in cells]),
            np.asarray([known[BASE, place].row["value"] for place in places]), {},
            constant=np.asarray([[score.constant for score in row] for row in cells]))
    losses = {name: found.losses for name, found in experts.items() if found.losses}
    return pictures | ({"learning_curves.png": learning_curves(losses)} if losses else {})


def _summary(path: epath.Path, scores: Sequence[Score]) -> list[str]:
    models, tasks = _models(scores), {score.row["task"] for score in scores}
    rows = sum(score.row["num_instances"] for score in scores)
    cut = sum(score.row.get("num_cut") or 0 for score in scores)
    lines = [f"{len(models)} model{'s' * (len(models) != 1)} on {len(tasks)} task{'s' * (len(tasks) != 1)}, "
             f"{rows:,} scored rows in all, of {path.name}."]
    kinds = sorted({score.row["interval"] for score in scores if "interval" in score.row})
    if kinds:
        words = ", ".join(INTERVALS.get(kind, kind) for kind in kinds)
        lines.append(f"Kind of interval: {words}; of differences, paired bootstrap.")
    if cut:
        lines.append(f"{cut:,} inputs were longer than what was read of them, and lost their end.")
    return lines


def _render(path: epath.Path, scores: Sequence[Score], grid: Mapping[str, Any], extras: Extras
            ) -> dict[str, str]:
    everywhere = list(dict.fromkeys(score.place for score in scores))
    places, skipped = everywhere[:MOST_PICTURES], len(everywhere) - MOST_PICTURES
    plotted = {f"scores_{number}.png": f"{task}, {metric}"
               for number, (task, _, metric) in enumerate(places, start=1)}
    plotted |= {"heat_map.png": "Models by tasks"} if "heat_map.png" in extras.pictures else {}
    content = {"title": "Results", "summary": [extras.made.sentence(), *_summary(path, scores)],
               "scores": grid, "about": ABOUT, "legend": legend(extras.matrix, grid),
               "plots": list(plotted.items()),
               "skipped": f"{skipped} more tasks and metrics have no bars here." if skipped > 0 else "",
               "sampled": "all models say", **extras.content()}
    return {"markdown": markdown_of(RESULTS_MARKDOWN, extras.pictures, table=markdown_table, **content),
            "html": html_page(RESULTS_HTML, extras.pictures, **content)}
