"""The report holds the table's numbers, opens by itself, and says no more than the numbers do."""

import base64
import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
from matplotlib import image
from report_page import Page
from rich.console import Console
from synthetic_study import facts_and_matrix

from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.experts.card import ExpertCard
from elm_jax.reporting import report, samples
from elm_jax.reporting.curve_plots import learning_curves
from elm_jax.reporting.expert_cards import FoundExpert
from elm_jax.reporting.page_parts import Made
from elm_jax.reporting.study_report import ReportOutcome, draw, heat_map_grid, oracle_ranks, read_matrix
from elm_jax.reporting.study_table import study_table

CONSTANT_TASKS = ("super_glue_cb__gpt_3_style", "super_glue_cb__mnli_crowdsource", "anli_r1__gpt_3_style")
"""Tasks on which the multitask baseline gives one answer: both of the first data set, one of the second."""


@pytest.fixture(scope="module")
def made() -> tuple[dict, dict, dict]:
    facts, matrix = facts_and_matrix(60)
    for task in CONSTANT_TASKS:
        matrix["multitask", task] = dataclasses.replace(matrix["multitask", task], constant=True)
    card = ExpertCard("trec__gpt_3_style", "prompt", "adapter", {"name": "<base>", "fingerprint": "f"}, {},
                      tasks=("trec__gpt_3_style",), training={"steps": 1200, "examples": 4800, "seed": 3})
    experts = {card.id: FoundExpert(card, ((10, 2.5), (20, 0.5)))}
    table = study_table(facts, matrix)
    losses = learning_curves({card.id: experts[card.id].losses})
    pictures = {**draw(facts, matrix, table), "learning_curves.png": losses}
    prompts = {0: "Is it <b>so</b>?\n" + "very " * 99}
    sample = samples.samples_table(samples.samples_of_task("trec__gpt_3_style", {"base": [
        {"index": 0, "prediction": "no", "target": "yes", "correct": 0}]}, prompts, "base"))
    extras = report.Extras(Made("elm report 'my results'", "2026-01-02T03:04:05+00:00"), pictures, experts,
                           sample, heat_map_grid(facts, matrix))
    facts = {**facts, "command": "elm demo --workdir demo"}
    return table, pictures, report.render(facts, table, oracle_ranks(facts, matrix), extras)


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
    found += [f"{100 * value:.1f}" for value in table["majority"].values() if value is not None]
    return found


def test_html_opens_by_itself_and_holds_every_number(made: tuple[dict, dict, dict]) -> None:
    table, pictures, texts = made
    page = Page(texts["html"])
    assert page.open == []
    cells = " | ".join(page.cells)
    assert [number for number in numbers(table) if number not in cells] == []
    assert "The choices of winogrande_winogrande_xl differ from row to row" in page.text
    assert page.text.count("Chosen after a look at <these> rows.") == 2
    assert len(page.sources) == 3 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    inside = {base64.b64decode(source.split(",")[1]) for source in page.sources}
    assert inside == set(pictures.values())
    assert len(page.links) == 8 and page.links == [f"#{name}" for name in page.ids]


def test_a_report_says_who_made_it_and_shows_cards_and_prompts(made: tuple[dict, dict, dict]) -> None:
    page = Page(made[2]["html"])
    for text in (page.text, made[2]["markdown"].replace("\\", "")):
        assert "2026-01-02T03:04:05+00:00 by: elm report 'my results' (elm_jax 0.1.0, jax 0." in text
        assert "The study was run by: elm demo --workdir demo" in text
    card = page.table("expert", "kind")[0]
    assert card[:6] == ["trec__gpt_3_style", "prompt", "<base>", "trec__gpt_3_style", "1,200", "4,800"]
    sample = page.table("task", "row")[0]
    assert sample[6].endswith("Is it <b>so</b>?\n" + "very " * 99)
    assert sample[:6] == ["trec__gpt_3_style", "0", "base", "no", "no", "yes"]
    assert "<details>" in made[2]["html"] and "<b>so" not in made[2]["html"] + made[2]["markdown"]
    assert "- [Sample answers](#sample-answers)" in made[2]["markdown"]


def test_a_constant_answerer_is_marked_in_every_table(made: tuple[dict, dict, dict]) -> None:
    page = Page(made[2]["html"])
    marked = {cell for cell in page.cells if cell.endswith("†")}
    table = next(row for row in made[0]["rows"] if row["name"] == "multitask")
    assert [column for column, constant in table["constant"].items() if constant] == ["super_glue_cb"]
    estimate = table["values"]["super_glue_cb"]
    assert {f"{report.percent(estimate)} †",
            f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f} †"} == marked
    assert f"| {report.percent(estimate)} † |" in made[2]["markdown"] and "† one and the same" in page.text
    shown = io.StringIO()
    ReportOutcome(None, made[0]).print_table(Console(file=shown, width=100))
    assert f"{report.percent(estimate)}†" in shown.getvalue() and "† one and the same" in shown.getvalue()


def test_markdown_holds_every_number_and_names_the_picture_files(made: tuple[dict, dict, dict]) -> None:
    table, _, texts = made
    assert [number for number in numbers(table) if number not in texts["markdown"]] == []
    assert "(bars.png)" in texts["markdown"] and "(heat_map.png)" in texts["markdown"]


def test_what_comes_from_names_is_escaped(made: tuple[dict, dict, dict]) -> None:
    assert "Made-up &lt;study&gt;" in made[2]["html"] and "<study>" not in made[2]["html"]
    for text in (made[2]["html"], made[2]["markdown"]):
        assert "<these>" not in text and "&lt;these>" in text.replace("&gt;", ">")


def test_the_table_is_json(made: tuple[dict, dict, dict]) -> None:
    assert json.loads(json.dumps(made[0], allow_nan=False)) == made[0]


def test_pictures_are_pngs_that_are_not_blank(made: tuple[dict, dict, dict]) -> None:
    for picture in made[1].values():
        pixels = image.imread(io.BytesIO(picture))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(np.round(255 * pixels[::7, ::7, 0]))) > 20


def table_with(base: float, half: float, better: float = 0.0) -> dict:
    """A table in which every row has one unseen mean and interval; `better` is RoE's difference."""
    def row(name: str, difference: float) -> dict:
        return {"name": name, "values": {"unseen mean": {
            "value": base, "low": base - half, "high": base + half}},
            "difference": {"value": difference, "low": difference - 0.01, "high": difference + 0.01},
            "over_majority": {"value": difference, "low": difference - 0.01, "high": difference + 0.01}}

    return {"rows": [row("base", 0.0), row("multitask", 0.0), row("RoE top-1", better),
                     row("best single expert (x)", 0.2), row("oracle", 0.3),
                     row("split-half oracle", 0.0)],
            "columns": ["unseen mean"], "chance": {"unseen mean": 0.5}, "own": [],
            "majority": {"unseen mean": 0.58}, "selection_note": ""}


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


def test_summary_compares_with_the_majority_answer() -> None:
    line = next(line for line in report.summary(table_with(0.6, 0.01)) if line.startswith("Always"))
    assert "58.0 on the unseen mean" in line and line.endswith("beyond the paired interval: none.")
    line = next(line for line in report.summary(table_with(0.6, 0.01, 0.05)) if line.startswith("Always"))
    assert line.endswith("beyond the paired interval: RoE top-1.")  # never oracle or best single expert
    table = table_with(0.6, 0.01)
    table["majority"]["unseen mean"] = None
    assert not any(line.startswith("Always") for line in report.summary(table))


def test_summary_opens_with_how_the_tasks_were_chosen() -> None:
    assert report.summary({**table_with(0.6, 0.01), "selection_note": "By hand."})[0] == "By hand."
    assert report.summary(table_with(0.6, 0.01))[0].startswith("Unseen data sets")


def own_row(**changes: object) -> dict:
    estimate = {"value": 0.85, "low": 0.8, "high": 0.9}
    return {"expert": "lazy", "kind": "prompt", "task": "lazy", "metric": "accuracy", "value": estimate,
            "base": {**estimate, "value": 0.81}, "difference": estimate, "chance": 0.5, "constant": False,
            "base_constant": False, "majority": 0.85, "by_position": False, "beats_base": True,
            "beats_majority": False, **changes}


def test_wins_are_also_counted_against_the_majority_answer() -> None:
    rows = [own_row(), own_row(beats_majority=True), own_row(beats_base=False, beats_majority=True),
            own_row(metric="rouge_l", majority=None, beats_majority=None)]
    sentence = report.own_grids({"own": rows})[2]
    assert sentence.startswith("3 of 4 prompt experts beat the frozen base")
    assert "Of the 2 of them that classify, 1 also beat the majority answer in that way;" in sentence
    unknown = report.own_grids({"own": [*rows, own_row(majority=None, beats_majority=None)]})[2]
    assert "Of the 3 of them that classify, 1 also beat the majority answer in that way, of 1 it" in unknown
    assert report.own_grids({"own": [own_row(beats_base=False)]})[2].endswith("difference above zero.")


def test_constant_answers_and_positions_are_marked_and_explained() -> None:
    rows = [own_row(constant=True), own_row(base_constant=True), own_row(by_position=True),
            own_row(kind="dataset", constant=True)]
    prompts, datasets, _ = report.own_grids({"own": rows})
    at = prompts["columns"].index
    assert [row[at("expert")] for row in prompts["rows"]] == ["85.0 †", "85.0", "85.0"]
    assert [row[at("base")] for row in prompts["rows"]] == ["81.0", "81.0 †", "81.0"]
    assert [row[at("majority")] for row in prompts["rows"]] == ["85.0", "85.0", "85.0 ‡"]
    assert datasets["rows"][0][datasets["columns"].index("value")] == "85.0 [80.0, 90.0] †"
    assert "† one and the same answer" in report.legend(prompts) and "‡" in report.legend(prompts)
    assert "‡" not in report.legend(datasets)
    assert report.legend(report.own_grids({"own": [own_row()]})[0]) == ""


CONFIG = {"max_eval_rows": 300, "eval_source_length": 256, "max_new_tokens": 32}


def test_report_says_how_many_rows_and_how_many_cut_inputs() -> None:
    inputs = [{"task": name, "num_instances": 200, "num_cut": cut}
              for name, cut in (("a", 0), ("b", 110), ("c", 20))]
    sentence, grid = report.inputs_grid({"inputs": inputs}, CONFIG)
    assert "At most 300 rows" in sentence and "cut at 256 tokens" in sentence
    assert "130 of 600 inputs (21.7%), of 2 of 3 tasks" in sentence
    assert grid["rows"] == [["b", "200", "110", "55.0%"], ["c", "200", "20", "10.0%"]]
    assert "All rows of" in report.inputs_grid({"inputs": inputs}, {**CONFIG, "max_eval_rows": None})[0]


def test_old_results_that_did_not_count_cut_inputs_are_shown_as_such() -> None:
    inputs = [{"task": "a", "num_instances": 200, "num_cut": None}]
    sentence, grid = report.inputs_grid({"inputs": inputs}, CONFIG)
    assert "Cut inputs: – (results of an older version" in sentence and grid["rows"] == []


@pytest.mark.parametrize(("version", "num_cut"), [(2, {"num_cut": 1}), (1, {})])
def test_matrix_reads_the_majority_and_cut_inputs_of_new_and_old_results(
    version: int, num_cut: dict, tmp_path: pathlib.Path
) -> None:
    store = ResultsStore(tmp_path)
    row = {"schema_version": version, "expert": "lazy", "task": "a__ask", "split": "validation",
           "metric": "accuracy", "value": 0.5, "num_instances": 3, "ci95_low": 0.0, "ci95_high": 1.0,
           "dataset": "a", "chance": 0.5, "settings": "x", **num_cut}
    store.append(TaskResult([row], [
        {"index": index, "prediction": "No", "target": target, "correct": int(target == "No"),
         "scores": [-2.0, -1.0]} for index, target in enumerate(("No", "Yes", "No"))]))
    cell = read_matrix(store)["lazy", "a__ask"]
    assert cell.constant and not cell.by_position and cell.num_cut == num_cut.get("num_cut")
    np.testing.assert_array_equal(cell.majority, [1, 0, 1])
