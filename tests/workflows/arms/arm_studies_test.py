"""Both studies of arms in real processes: to their end, and through `kill -9` with the same results."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from checkout import HELPERS, ROOT

BY_HAND = pytest.mark.skipif("ELM_ARM_STUDIES" not in os.environ,
                             reason="takes ten minutes of two cores; set ELM_ARM_STUDIES to run it")

pytestmark = [pytest.mark.slow, BY_HAND]


def start(name, workdir, log, *bindings):
    environment = {**os.environ, "XLA_FLAGS": "", "ELM_DATA_DIR": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "elm_jax.cli", "study", "--gin_file", str(HELPERS / name),
         "--gin_search_paths", str(ROOT / "gin"), f"--gin.WORKDIR='{workdir}'", *bindings],
        stdout=log.open("ab"), stderr=subprocess.STDOUT, env=environment)


def finish(name, workdir, log, *bindings):
    process = start(name, workdir, log, *bindings)
    assert process.wait(timeout=2400) == 0, log.read_text()[-3000:]
    return json.loads((workdir / "results" / "verdicts.json").read_text())["verdicts"]


def kill_when(process, ready):
    end = time.monotonic() + 2400
    while not ready() and time.monotonic() < end:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)


def scores(workdir):
    """Value of each result, by what it is of; the newest row counts."""
    rows = [json.loads(line) for line in (workdir / "results" / "results.jsonl").read_text().splitlines()]
    return {(row["expert"], row["task"], row["split"], row["metric"]): row["value"] for row in rows}


def test_a_killed_study_of_instruction_tuning_ends_as_an_undisturbed_one(tmp_path):
    name, whole, killed = "tiny_flan.gin", tmp_path / "whole", tmp_path / "killed"
    verdicts = finish(name, whole, tmp_path / "log")
    assert {one["result"] for one in verdicts} <= {"holds", "refuted", "cannot be seen at this size"}
    arms = json.loads((whole / "results" / "arms.json").read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["dense", "upcycled", "scratch"]
    assert arms[1]["total"] > arms[1]["active"] > arms[0]["active"]
    report = (whole / "results" / "report.md").read_text()
    for heading in ("Arms", "Scores", "Gaps", "Gain by number of tuning tasks", "Ablations",
                    "Choice of rate and batch size"):
        assert f"## {heading}\n" in report
    assert not any((whole / "runs").iterdir())

    moments = [
        lambda: any((killed / "bases" / "dense" / "first").glob("checkpoints/*")),
        lambda: any((killed / "runs").glob("grid-*/checkpoints/*")),
        lambda: (killed / "results" / "results.jsonl").exists() and len(scores(killed)) > 80,
    ]
    for moment in moments:
        kill_when(start(name, killed, tmp_path / "log"), moment)
    assert finish(name, killed, tmp_path / "log") == verdicts
    assert scores(killed) == scores(whole)


def test_a_study_of_task_aware_gates_ends(tmp_path):
    verdicts = finish("tiny_task.gin", tmp_path / "study", tmp_path / "log")
    claims = " ".join(one["claim"] for one in verdicts)
    for part in ("low resource", "few rows", "robustness"):
        assert part in claims
    report = (tmp_path / "study" / "results" / "report.md").read_text()
    for heading in ("Low resource: transfer", "Few rows: area under the score", "Robustness: drop"):
        assert f"## {heading}\n" in report
