"""The study in real processes: to its end, and through `kill -9`, with the same table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from checkout import HELPERS

GIN = HELPERS.joinpath("tiny_study.gin")
pytestmark = pytest.mark.slow


def environment():
    paths = [str(GIN.parent), os.environ.get("PYTHONPATH", "")]  # of its registry of one's own
    return {**os.environ, "XLA_FLAGS": "", "ELM_DATA_DIR": "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(workdir, log, *bindings):
    return subprocess.Popen(
        [sys.executable, "-m", "elm_jax.cli", "study", "--gin_file", str(GIN), f"--gin.WORKDIR='{workdir}'",
         *bindings],
        stdout=log.open("ab"), stderr=subprocess.STDOUT, env=environment())


def finish(workdir, log, *bindings):
    process = start(workdir, log, *bindings)
    assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
    return json.loads((workdir / "results" / "table.json").read_text())


def kill_when(process, ready, number=signal.SIGKILL, timeout=600):
    """Waits until `ready()` is true of the files, then kills; the process must still be running."""
    end = time.monotonic() + timeout
    while not ready() and time.monotonic() < end:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder / "study", finish(folder / "study", folder / "log")


def test_a_study_ends_with_table_report_and_pictures(whole):
    folder, table = whole
    names = [row["name"].split(" (")[0] for row in table["rows"]]
    for name in ("base", "multitask", "best single expert", "RoE top-1", "RoE top-3 merged",
                 "dataset experts merged", "oracle", "split-half oracle", "random expert"):
        assert name in names
    assert {"BIG-bench mean", "BBH ROUGE-L"} <= set(table["columns"])
    assert [(row["category"], row["label"]) for row in table["benchmarks"]] == [
        ("BIG-bench", "own_parity"), ("BBH", "own_count")]
    assert [(row["label"], row["metric"]) for row in table["by_category"]] == [
        ("topic_classification", "accuracy"), ("sentiment", "accuracy"), ("summarization", "rouge_l")]
    results = folder / "results"
    rows = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    tested = {row["task"] for row in rows if row["split"] == "test"}
    assert tested == {"own_parity__ask", "own_count__count"}
    assert {row["split"] for row in rows if row["task"] not in tested} == {"validation"}
    absent = [{"benchmark": "BBH", "task": "own_missing__count", "dataset": "own_missing",
               "reason": "no data"}]
    facts = json.loads((results / "study.json").read_text())
    assert table["absent"] == facts["absent_tasks"] == absent
    trained = ["mini_topic__which_section", "mini_topic__about_what", "mini_review__good_or_bad"]
    card = json.loads((folder / "experts" / "multitask" / "expert" / "expert.json").read_text())
    assert facts["multitask_tasks"] == card["tasks"] == trained
    assert "own_missing: no data" in (results / "report.md").read_text()
    assert (results / "report.md").exists() and "data:image/png" in (results / "report.html").read_text()
    assert (results / "heat_map.png").read_bytes()[:4] == b"\x89PNG"
    assert "pretrain" in (folder / "config.gin").read_text()


def test_results_of_an_older_study_are_still_reported(whole, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(whole[0] / "results", results)
    facts = json.loads((results / "study.json").read_text())
    for name in ("bbh_tasks", "bigbench_tasks", "absent_tasks", "categories", "multitask_tasks"):
        del facts[name]
    (results / "study.json").write_text(json.dumps(facts))
    (results / "routers.json").unlink()
    elm(tmp_path / "log", "report", results)
    table = json.loads((results / "table.json").read_text())
    assert "routers" not in table and "## Routers" not in (results / "report.md").read_text()
    assert [column for column in whole[1]["columns"] if column not in table["columns"]] == [
        "BIG-bench mean", "BBH ROUGE-L"]
    text = (results / "report.md").read_text()
    assert "By category" in (whole[0] / "results" / "report.md").read_text() and "By category" not in text
    for name in ("base", "library", "prepared"):  # all that the routers are compared by
        (tmp_path / name).symlink_to(whole[0] / name)
    elm(tmp_path / "log", "report", results)
    assert json.loads((results / "table.json").read_text())["routers"] == whole[1]["routers"]
    assert {row["router"] for row in whole[1]["routers"]["routers"]} >= {"vote", "prior+nearest", "labelled"}
    assert "## Routers" in (results / "report.md").read_text()


def test_killed_three_times_it_gives_the_same_table(whole, tmp_path):
    workdir, log = tmp_path / "study", tmp_path / "log"

    def steps_of(run):
        return [int(path.name) for path in (workdir / run / "checkpoints").glob("[0-9]*")
                if (path / "COMMITTED.json").exists()]

    moments = [
        lambda: any(step >= 5 for step in steps_of("base")),
        lambda: any(step >= 4 for step in steps_of("experts/mini_review__good_or_bad")),
        lambda: (workdir / "results" / "results.jsonl").exists(),
    ]
    for ready in moments:
        assert kill_when(start(workdir, log), ready) == -signal.SIGKILL
    assert finish(workdir, log) == whole[1]


def test_other_settings_in_the_same_folder_give_the_table_of_a_fresh_one(whole, tmp_path):
    """What was made of other settings is made again, or refused; never used in silence."""
    again, log = tmp_path / "again", tmp_path / "log"
    shutil.copytree(whole[0], again)
    changed = ("--gin.study.instances_per_expert=4", "--gin.study.means_per_expert=2",
               "--gin.study.num_queries=3", "--gin.study.top_k=2")
    assert finish(again, log, *changed) == finish(tmp_path / "fresh", log, *changed) != whole[1]
    before = (again / "config.gin").read_text()
    process = start(again, log, "--gin.pretrain/StageSettings.train_steps=31")
    assert process.wait(timeout=300) == 2 and "train_steps: 30 there, 31 here" in log.read_text()
    assert (again / "config.gin").read_text() == before


def test_sigterm_saves_and_the_status_says_so(tmp_path):
    workdir, log = tmp_path / "study", tmp_path / "log"
    process = start(workdir, log)
    status = kill_when(process, lambda: (workdir / "base" / "metrics.jsonl").exists()
                       and (workdir / "base" / "metrics.jsonl").stat().st_size > 0, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, log.read_text()[-2000:]
    assert "goes on from here" in log.read_text()
    assert list((workdir / "base" / "checkpoints").glob("*/COMMITTED.json"))


def elm(log, *words):
    done = subprocess.run([sys.executable, "-m", "elm_jax.cli", *map(str, words)], capture_output=True,
                          text=True, env=environment(), timeout=900)
    log.write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results_of(workdir):
    """(value, number of instances) by expert and task."""
    rows = map(json.loads, (workdir / "results" / "results.jsonl").read_text().splitlines())
    return {(row["expert"], row["task"]): (row["value"], row["num_instances"]) for row in rows}


def test_experts_of_a_farm_are_those_that_the_study_would_train(whole, tmp_path):
    """The study up to its base, its experts by two workers at once, then the study: the same table."""
    workdir, log = tmp_path / "study", tmp_path / "log"
    kill_when(start(workdir, log), lambda: (workdir / "experts").exists())
    words = ["--dir", tmp_path / "farm"]
    elm(log, "farm", "init", *words, "--gin_file", GIN, f"--gin.WORKDIR='{workdir}'")
    workers = [subprocess.Popen(
        [sys.executable, "-m", "elm_jax.cli", "farm", "work", "--poll_seconds", "0.5", *map(str, words)],
        stdout=log.open("ab"), stderr=subprocess.STDOUT, env=environment()) for _ in range(2)]
    assert [worker.wait(timeout=900) for worker in workers] == [0, 0], log.read_text()[-3000:]
    experts = {row["expert"] for row in json.loads(elm(log, "farm", "status", "--json", *words))["experts"]}
    assert experts == {path.name for path in (whole[0] / "experts").iterdir()}
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("experts/*/expert/expert.json")}
    assert len(before) == len(experts)
    assert finish(workdir, log) == whole[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}  # found finished


def test_a_stacked_study_gives_the_results_of_one_after_another(whole, tmp_path):
    """Killed within its stack; two slots for three experts. Rounding may turn a row or two of a task."""
    workdir, log = tmp_path / "study", tmp_path / "log"
    stacked = "--gin.study.stack_experts=2"
    process = start(workdir, log, stacked)
    kill_when(process, lambda: list((workdir / "experts" / "stack").glob("checkpoints/*/COMMITTED.json")))
    finish(workdir, log, stacked)
    assert "2 train at once" in log.read_text() and "scoring 2 stacks" in log.read_text()
    one, other = results_of(whole[0]), results_of(workdir)
    assert one.keys() == other.keys()
    for key, (value, count) in one.items():
        assert abs(other[key][0] - value) <= 2 / count + 1e-9, key
