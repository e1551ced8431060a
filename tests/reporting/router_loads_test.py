"""Loads of experts in reports: what is read, the page of runs, sections of other reports, damage."""

import json

import numpy as np
import pytest
from report_page import Page

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.reporting import report, router_loads
from elm_jax.reporting.page_parts import Made
from elm_jax.training import router_log

TASKS = ("sums", "notes__<b>")


def lines_of(layer, number, experts=4, tasks=(), seed=0):
    """Lines of a run of steps of 40 tokens and two choices a token."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, number + 1):
        counts = rng.multinomial(40, rng.dirichlet(np.ones(experts)), 2)
        load = counts.sum(0) / 80
        rows.append({
            "step": 10 * step, "layer": layer, "steps": 10, "tokens": 40.0 * step, "load": load.tolist(),
            "dropped": float(rng.random()), "entropy": 1.0, "entropy_share": 0.5, "z": 2.0, "balance": 1.5,
            "max_load": load.max(), "min_load": load.min(), **({"mutual_information": 0.0, "by_task": {
                task: {"choices": 40.0, "load": (own / 40).tolist()}
                for task, own in zip(tasks, counts, strict=True)}} if tasks else {})})
    return rows


def write_run(folder, *lines):
    folder.mkdir(parents=True)
    (folder / router_log.FILE).write_text("".join(json.dumps(row) + "\n" for rows in lines for row in rows))
    return folder / router_log.FILE


def test_loads_are_of_the_last_tenth_of_the_lines_weighted_by_tokens(tmp_path):
    lines = lines_of("encoder/layers_1", 21, tasks=TASKS)
    found, short = router_log.read_loads(write_run(tmp_path / "run", lines, lines_of("decoder/layers_1", 1)))
    last = lines[-3:]
    tokens = [row["tokens"] for row in last]
    assert found.steps == (181, 210) and short.steps == (1, 10) and short.information is None
    for expert in range(4):
        assert found.load[expert] == pytest.approx(
            sum(row["load"][expert] * count for row, count in zip(last, tokens, strict=True)) / sum(tokens))
    dropped = np.average([row["dropped"] for row in last], weights=tokens)
    assert found.means["dropped"] == pytest.approx(dropped)
    counts = {task: sum(40 * np.asarray(row["by_task"][task]["load"]) for row in last) for task in TASKS}
    np.testing.assert_allclose(list(found.by_task.values()), list(counts.values()))
    assert found.information == pytest.approx(router_log.mutual_information(list(counts.values())))
    assert router_log.read_loads(tmp_path / "other" / router_log.FILE) == ()


def test_the_page_of_runs_has_a_table_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(router_loads, "MOST_RUNS", 2)
    write_run(tmp_path / "runs" / "a", lines_of("encoder/layers_1", 2, tasks=TASKS),
              lines_of("decoder/layers_1", 2, tasks=TASKS))
    write_run(tmp_path / "runs" / "b" / "c", lines_of("decoder/layers_1", 3, 40))
    write_run(tmp_path / "runs" / "d", lines_of("decoder/layers_1", 3, 1))
    (tmp_path / "runs" / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "encoder/layers_1" in printed and str(tmp_path / "runs" / "router.html") in printed
    page = Page((tmp_path / "runs" / "router.html").read_text())
    rows = page.table("run", "layer")
    assert [row[:3] for row in rows] == [
        ["a", "encoder/layers_1", "11 to 20"], ["a", "decoder/layers_1", "11 to 20"],
        ["d", "decoder/layers_1", "21 to 30"], ["b/c", "decoder/layers_1", "21 to 30"]]
    assert rows[2][3:5] == ["1.00", "1.00"] and rows[0][7] != "–" == rows[2][7]
    assert page.open == [] and len(page.sources) == 3 and "1 more runs have no picture" in page.text
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "runs").glob("*.png")}
    assert set(pictures) == {"router_1.png", "router_1_tasks.png", "router_2.png"}
    assert all(picture[:4] == b"\x89PNG" for picture in pictures.values())
    text = (tmp_path / "runs" / "router.md").read_text()
    assert all(f"({name})" in text for name in pictures) and "## Router loads" in text


def test_a_run_is_named_by_its_folder_or_its_file(tmp_path):
    path = write_run(tmp_path / "mine", lines_of("decoder/layers_0", 2))
    for place in (path, path.parent):
        written = router_loads.write_loads_report(place, made=Made("elm report", "2026-01-02T03:04:05+00:00"))
        assert [row[0] for row in written.grid["rows"]] == ["mine"]
    assert written.report_path == tmp_path / "mine" / "router.html"
    (tmp_path / "mine" / "results.jsonl").write_text("")
    assert router_loads.runs_in(tmp_path / "mine") == {} == router_loads.runs_in(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"(?s)no cards.*--experts"):
        router_loads.write_loads_report(path, experts=[tmp_path])
    with pytest.raises(InputError, match="no run of a sparse network here"):
        router_loads.write_loads_report(write_run(tmp_path / "empty"))


def test_other_reports_have_the_section_only_with_runs():
    loads = router_log._load_of("encoder/layers_1", lines_of("encoder/layers_1", 1), "x")
    content = router_loads.loads_content({"one": [loads]})
    assert [name for name, _ in content["plots"]] == ["router_1.png"] and not content["informed"]
    extras = report.Extras(Made(), {}, {}, {}, {}, loads=content)
    assert extras.content()["loads"] == content and router_loads.loads_content({}) == {}


@pytest.mark.parametrize("changes, told", [
    ({"load": "x"}, "line 1: load"), ({"tokens": None}, "line 1: tokens"),
    ({"by_task": {"sums": {"choices": 1.0}}}, "line 1: by_task/sums/load"),
    ({"load": [1.0]}, "other numbers"),
    ({"by_task": {"sums": {"choices": 1.0, "load": [1.0]}}}, r"other numbers of experts[^$]*\[1, 4\]")])
def test_a_damaged_log_is_one_error(tmp_path, changes, told):
    first, last = lines_of("encoder/layers_1", 2)
    path = write_run(tmp_path / "run", [{**first, **changes}], [last] * 15)
    if "other numbers" in told:
        path = write_run(tmp_path / "other", [{**first, **changes}, last] * 10)
    with pytest.raises(InputError, match=told):
        router_log.read_loads(path)
