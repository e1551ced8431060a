"""The report of any results: what `elm evaluate` wrote is shown whole, whatever was scored."""

import re

import numpy as np
import pytest

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.reporting import results_report, study_report


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


def test_models_that_were_scored_on_unlike_tasks_are_reported(tmp_path):
    store = ResultsStore(tmp_path)
    store.append(result("a", "sums", [1, 1]))
    store.append(result("b", "notes", [1, 0]))
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
