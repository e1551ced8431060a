"""The report holds the table's numbers, opens by itself, and says no more than the numbers do."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from matplotlib import image
from synthetic_study import facts_and_matrix

from elm_jax.evaluation import report
from elm_jax.evaluation.study_table import study_table
from elm_jax.workflows.report import draw, oracle_ranks


class Page(html.parser.HTMLParser):
    """Collects the text of all cells, the pictures, and tags left open."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def made() -> tuple[dict, dict, dict]:
    facts, matrix = facts_and_matrix(60)
    table = study_table(facts, matrix)
    pictures = draw(facts, matrix, table)
    return table, pictures, report.render(facts, table, oracle_ranks(facts, matrix), pictures)


def numbers(table: dict) -> list[str]:
    """Every number of table.json that belongs to the table, as the report prints it."""
    found = []
    for row in table["rows"]:
        for estimate in row["values"].values():
            found += [f"{100 * estimate['value']:.1f}",
                      f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"]
        if row["name"] != "multitask":
            found.append(report.with_interval(row["difference"], sign=True))
    for row in table["own"]:
        found.append(f"{100 * row['value']['value']:.1f}")
    return found


def test_html_opens_by_itself_and_holds_every_number(made: tuple[dict, dict, dict]) -> None:
    table, pictures, texts = made
    page = Page()
    page.feed(texts["html"])
    page.close()
    assert page.open == []
    cells = " | ".join(page.cells)
    assert [number for number in numbers(table) if number not in cells] == []
    assert len(page.sources) == 2 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    inside = {base64.b64decode(source.split(",")[1]) for source in page.sources}
    assert inside == set(pictures.values())


def test_markdown_holds_every_number_and_names_the_picture_files(made: tuple[dict, dict, dict]) -> None:
    table, _, texts = made
    assert [number for number in numbers(table) if number not in texts["markdown"]] == []
    assert "(bars.png)" in texts["markdown"] and "(heat_map.png)" in texts["markdown"]


def test_what_comes_from_names_is_escaped_in_html(made: tuple[dict, dict, dict]) -> None:
    assert "Made-up &lt;study&gt;" in made[2]["html"] and "<study>" not in made[2]["html"]


def test_the_table_is_json(made: tuple[dict, dict, dict]) -> None:
    assert json.loads(json.dumps(made[0], allow_nan=False)) == made[0]


def test_pictures_are_pngs_that_are_not_blank(made: tuple[dict, dict, dict]) -> None:
    for picture in made[1].values():
        pixels = image.imread(io.BytesIO(picture))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(np.round(255 * pixels[::7, ::7, 0]))) > 20


def table_with(base: float, half: float, better: float = 0.0) -> dict:
    """A table in which every row has one unseen mean and interval; `better` is RoE's difference."""
    def row(name: str, difference: float) -> dict:
        return {"name": name, "values": {"unseen mean": {
            "value": base, "low": base - half, "high": base + half}},
            "difference": {"value": difference, "low": difference - 0.01, "high": difference + 0.01}}

    return {"rows": [row("base", 0.0), row("multitask", 0.0), row("RoE top-1", better),
                     row("best single expert (x)", 0.2), row("oracle", 0.3),
                     row("split-half oracle", 0.0)],
            "columns": ["unseen mean"], "chance": {"unseen mean": 0.5}, "own": []}


def test_summary_says_near_chance_exactly_when_the_interval_covers_it() -> None:
    assert "Near chance" in " ".join(report.summary(table_with(0.53, 0.04)))
    assert "Near chance" not in " ".join(report.summary(table_with(0.55, 0.04)))
    below = " ".join(report.summary(table_with(0.40, 0.04)))
    assert "Near chance" not in below and "Below chance" in below


def test_summary_never_counts_rows_chosen_on_the_test_as_better() -> None:
    line = next(line for line in report.summary(table_with(0.6, 0.01)) if line.startswith("Better"))
    assert "beyond the paired interval: none; worse: none" in line
    line = next(line for line in report.summary(table_with(0.6, 0.01, 0.05)) if line.startswith("Better"))
    assert "beyond the paired interval: RoE top-1; worse: none" in line
