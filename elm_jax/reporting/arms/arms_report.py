"""Writes the report of a study of arms: Markdown, HTML, ``verdicts.json`` and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich.cells import cell_len
from rich.console import Console

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.results import ResultsStore, kept_results
from elm_jax.reporting.arms.arm_cells import ArmScores
from elm_jax.reporting.arms.arm_tables import Section, arms_section, grid_section, time_section
from elm_jax.reporting.arms.arms_page import ARMS_HTML, ARMS_MARKDOWN
from elm_jax.reporting.arms.flan_tables import FlanResults
from elm_jax.reporting.arms.gain_plots import gain_curves
from elm_jax.reporting.arms.task_moe_tables import TaskMoeResults
from elm_jax.reporting.arms.verdicts import Verdict
from elm_jax.reporting.page_parts import Made, html_page, markdown_of
from elm_jax.reporting.report import markdown_table
from elm_jax.runtime import storage
from elm_jax.runtime.terminal.text_tables import Column, document, visible, wrapped

FACTS = "arms.json"
RESULTS = {"flan": FlanResults, "task": TaskMoeResults}
"""By kind of study, what makes its sections and verdicts."""


@dataclasses.dataclass(frozen=True)
class ArmsOutcome:
    """The folder of a written report, and what a terminal shows of it.

    Attributes:
        report_path: of the HTML.
        verdicts: on the study's claims.
        section: the table of mean scores.
    """

    report_path: epath.Path
    verdicts: Sequence[Verdict]
    section: Section

    def print_table(self, console: Console) -> None:
        """Prints the mean scores and the verdicts."""
        first, second, *others = self.section.grid["columns"]
        columns = [Column(first, kind="text"), Column(second, kind="text"),
                   *(Column(name, len(others) - place, "number") for place, name in enumerate(others))]
        width = console.width if console.is_terminal else None
        lines = [*document(columns, [tuple(row) for row in self.section.grid["rows"]], width,
                           cure="the report has all", title=self.section.title), ""]
        for one in self.verdicts:
            lines += wrapped(visible(one.sentence()), width or max(map(cell_len, lines)))
        console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def is_arms(folder: storage.PathLike) -> bool:
    """Whether a folder holds the results of a study of arms: its facts stand beside them."""
    return (storage.as_path(folder) / FACTS).exists()


def write_arms_report(folder: storage.PathLike, store: ResultsStore | None = None, *,
                      made: Made | None = None) -> ArmsOutcome:
    """Writes ``report.md``, ``report.html``, ``verdicts.json`` and pictures into a results folder.

    Args:
        folder: of a study's results.
        store: of these results, if it is open.
        made: when and by which command; by default now, by Python code.

    Raises:
        InputError: no study was finished here, or a score is missing.
    """
    folder = storage.as_path(folder)
    facts = storage.read_json(folder / FACTS, kind="facts of a study of arms", schema_version=1)
    if facts.get("kind") not in RESULTS:
        raise InputError(describe("The facts are of no known kind of study", where=folder / FACTS,
                                  got=facts.get("kind"), expected=list(RESULTS)))
    with kept_results(folder):
        return _write_arms(folder, facts, ArmScores(store or ResultsStore(folder)), made or Made())


def _write_arms(folder: epath.Path, facts: Mapping[str, Any], scores: ArmScores, made: Made) -> ArmsOutcome:
    results = RESULTS[facts["kind"]](facts, scores)
    verdicts = results.verdicts()
    sections = [arms_section(facts), *results.sections(), grid_section(scores, facts["arms"]),
                time_section(facts)]
    pictures = {"gains.png": gain_curves(results.counts, results.gains)} if any(
        "gains.png" in part.pictures for part in sections) else {}
    run_by = [f"The study was run by: {facts['command']}"] if facts.get("command") else []
    content = {"title": facts["title"], "sections": sections,
               "summary": [*(one.sentence() for one in verdicts), *run_by, made.sentence()]}
    texts = {"report.md": markdown_of(ARMS_MARKDOWN, pictures, table=markdown_table, **content),
             "report.html": html_page(ARMS_HTML, pictures, **content)}
    for name, picture in pictures.items():
        storage.write_bytes(folder / name, picture)
    storage.write_json(folder / "verdicts.json", {
        "schema_version": 1, "verdicts": [one.to_dict() for one in verdicts]})
    for name, text in texts.items():
        storage.write_text(folder / name, text)
    return ArmsOutcome(folder / "report.html", verdicts, sections[1])
