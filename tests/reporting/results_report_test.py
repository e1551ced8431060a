"""The report of any results: what `elm evaluate` wrote is shown whole, whatever was scored."""

import dataclasses
import json
import re

import numpy as np
import pytest
from report_page import Page

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.experts.card import ExpertCard
from elm_jax.reporting import results_report, study_report
from elm_jax.reporting.page_parts import Made
from elm_jax.runtime import storage


def result(expert: str, task: str, values, metric: str = "accuracy", low=0.0, high=1.0) -> TaskResult:
    """One model's result on one task, as the evaluator writes it."""
    name = "correct" if metric == "accuracy" else metric
    rows = [{"index": number, "prediction": f"<b>said {number}" if value else "other | text",
             "target": f"<b>said {number % 2}", name: value,
             **({"scores": [0.0, 1.0], "label": int(value)} if metric == "accuracy" else {})}
            for number, value in enumerate(values)]
    return TaskResult([{
        "schema_version": 2, "expert": expert, "task": task, "split": "validation", "metric": metric,
        "value": float(np.mean(values)), "ci95_low": low, "ci95_high": high, "dataset": task,
        "chance": 0.5 if metric == "accuracy" else None, "num_instances": len(values), "num_cut": 1,
        "settings": "s", "model": "m"}], rows)


@pytest.fixture
def results(tmp_path):
    store = ResultsStore(tmp_path, "mine.jsonl")
    for one in (result("e|1", "sums", [1, 1, 1, 0], low=0.3, high=0.95), result("base", "sums", [1, 0, 0, 0]),
                result("base", "notes", [0.5, 0.25], "rouge_l"),
                result("e|1", "notes", [0.5, 0.75], "rouge_l")):
        store.append(one)
    return tmp_path


def test_a_report_shows_every_score_interval_answer_and_picture(results, capsys):
    assert main(["report", str(results)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"sums +validation +e\|1 +accuracy +4 +75\.0 \[30\.0, 95\.0\]", printed)
    markdown, html = ((results / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "| base | 25.0 | 37.5 |" in markdown and r"| e\|1 | 75.0 | 62.5 |" in markdown
    assert "75.0 [30.0, 95.0]" in markdown and "+50.0 [" in markdown and "other \\| text" in markdown
    assert "&lt;b>said 0" in markdown and "<b>said" not in html, "texts are no tags"
    assert "2 models on 2 tasks, 12 scored rows" in html and "4 inputs were longer" in html
    for name in ("scores_1.png", "scores_2.png", "heat_map.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG") and name in markdown


@pytest.mark.filterwarnings("error")
def test_models_that_were_scored_on_unlike_tasks_are_reported(tmp_path):
    store = ResultsStore(tmp_path)
    store.append(result("a", "sums", [1, 1]))
    store.append(result("b", r"no $\frac$ 漢字", [1, 0]))
    grid = results_report.write_results_report(tmp_path / "results.jsonl").grid
    assert [row[2] for row in grid["rows"]] == ["a", "b"] and {row[-1] for row in grid["rows"]} == {"–"}
    assert "| a | 100.0 † | – |" in (tmp_path / "report.md").read_text() or "| a | 100.0 | – |" in (
        tmp_path / "report.md").read_text()
    assert not (tmp_path / "heat_map.png").exists()


def test_what_is_no_place_of_results_is_refused_with_the_cure(tmp_path):
    for place, message in ((tmp_path / "no", "elm evaluate"), (tmp_path, "an empty folder")):
        with pytest.raises(InputError, match=f"(?s)There are no results here.*{message}"):
            results_report.write_results_report(place)
    ResultsStore(tmp_path).append(result("a", "sums", [1, 1]))
    (tmp_path / "study.json").write_text("{}")
    assert study_report.is_study(tmp_path)
    with pytest.raises(InputError, match="a study's"):
        results_report.write_results_report(tmp_path / "results.jsonl")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_results_of_a_name_that_leaves_their_folder_are_neither_written_nor_read(name, tmp_path):
    with pytest.raises(InputError, match="must be the name of a file in the same folder"):
        ResultsStore(tmp_path / "deep" / "er").append(result(name, "sums", [1]))
    with pytest.raises(InputError, match="must be the name of a file in the same folder"):
        ResultsStore(tmp_path / "deep" / "er").append(result("e", name, [1]))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_several_metrics_of_a_task_stay_apart(tmp_path):
    store = ResultsStore(tmp_path)
    values = {"base": {"accuracy": [0, 0, 1, 0], "acc_norm": [1, 1, 1, 0]},
              "e": {"accuracy": [1, 1, 1, 1], "acc_norm": [0, 1, 0, 0]}}
    for name, own in values.items():
        one = result(name, "sums", own["accuracy"])
        rows = [{**one.rows[0], "metric": metric, "value": float(np.mean(found))}
                for metric, found in own.items()]
        credits = zip(one.predictions, own["acc_norm"], strict=True)
        store.append(TaskResult(rows, [{**line, "acc_norm": credit} for line, credit in credits]))
        text = result(name, "notes", [0.25, 0.5], "rouge_l")
        store.append(TaskResult([text.rows[0], {**text.rows[0], "metric": "f1", "value": 0.125}],
                                [{**line, "f1": 0.125, "prediction": "x"} for line in text.predictions]))
    results_report.write_results_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables[0] == [["model", "sums", "sums (acc_norm)", "notes (rouge_l)", "notes (f1)"],
                              ["base", "25.0", "75.0", "37.5 †", "12.5 †"],
                              ["e", "100.0", "25.0", "37.5 †", "12.5 †"]]
    scores = {(row[0], row[2], row[3]): row[-1] for row in page.table("task", "split")}
    assert scores["sums", "e", "accuracy"].startswith("+75.0 [") and len(scores) == 8
    assert scores["sums", "e", "acc_norm"].startswith("-50.0 [")
    assert scores["notes", "e", "f1"].startswith("+0.0")
    assert len(list(tmp_path.glob("scores_*.png"))) == 4


def test_twice_it_writes_the_same_bytes_with_cards_curves_and_prompts(tmp_path):
    card = ExpertCard("e", "prompt", "adapter", {"name": "b", "fingerprint": "f"}, {"adapter": {"rank": 4}},
                      tasks=("sums",), training={"steps": 2, "examples": 8, "settings": {"batch_size": 4}})
    run = tmp_path / "runs" / "e"
    folder = storage.begin(run / "expert")
    storage.write_json(folder / "expert.json", {**card.to_dict(), "overlay_fingerprint": "m"})
    storage.commit(folder)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    line = {"step": 2, "layer": "decoder/layers_1", "steps": 2, "tokens": 9.0, "load": [0.75, 0.25],
            "dropped": 0.125, "entropy": 0.5, "entropy_share": 0.7, "z": 1.0, "balance": 1.25,
            "max_load": 0.75, "min_load": 0.25}
    (run / "router.jsonl").write_text(json.dumps(line) + "\n")
    store = ResultsStore(tmp_path / "results")
    one = result("e", "sums", [1, 1, 0, 0])
    prompts = [{"index": index, "prompt": f"What is <{index}>?"} for index in (1, 2, 3)]
    store.append(dataclasses.replace(one, prompts=prompts))
    made, written = Made("elm report", "2026-01-02T03:04:05+00:00"), []
    for _ in range(2):
        results_report.write_results_report(tmp_path / "results", made=made)
        written.append({path.name: path.read_bytes() for path in (tmp_path / "results").glob("*.*")})
    assert written[0] == written[1] and "learning_curves.png" in written[0]
    page = Page(written[0]["report.html"].decode())
    assert page.table("expert", "kind")[0][:6] == ["e", "prompt", "b", "sums", "2", "8"]
    assert [row[1:] for row in page.table("task", "row")] == [
        ["1", "e", "<b>said 1", "yes", "<b>said 1", "What is <1>?"],
        ["2", "e", "other | text", "no", "<b>said 0", "What is <2>?"]]
    assert page.open == [] and page.links == [f"#{name}" for name in page.ids] and len(page.links) == 6
    assert page.table("run", "layer")[0][:6] == ["e", "decoder/layers_1", "1 to 2", "1.50", "0.50", "12.5"]
    assert "![e: load of experts by layer](router_1.png)" in written[0]["report.md"].decode()
    (tmp_path / "results" / "prompts" / "sums.validation.jsonl").write_text('{"index": 1}\n')
    with pytest.raises(InputError, match=r"(?s)field of the prompt is missing.*line 1.*prompt"):
        results_report.write_results_report(tmp_path / "results")


def test_without_predictions_the_rows_tell_constant_answers(tmp_path):
    one = result("e", "sums", [1, 0, 1, 0]).rows[0]
    rows = [{**one, "top_answer_share": 1.0}, {**one, "task": "more", "top_answer_share": 0.75},
            {**one, "task": "old"}, {**one, "metric": "acc_norm", "top_answer_share": 1.0}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results_report.write_results_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables[0][1] == ["e", "50.0 †", "50.0", "50.0", "50.0"]
    with pytest.raises(InputError, match="no expert here"):
        results_report.write_results_report(tmp_path, experts=tmp_path / "results")
