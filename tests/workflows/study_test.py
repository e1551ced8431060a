"""The study in real processes: to its end, and through `kill -9`, with the same table."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

GIN = pathlib.Path(__file__).with_name("tiny_study.gin")
pytestmark = pytest.mark.slow


def start(workdir, log, *bindings):
    environment = {**os.environ, "XLA_FLAGS": "", "ELM_DATA_DIR": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "elm_jax.cli", "study", "--gin_file", str(GIN), f"--gin.WORKDIR='{workdir}'",
         *bindings],
        stdout=log.open("ab"), stderr=subprocess.STDOUT, env=environment)


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
    results = folder / "results"
    assert (results / "report.md").exists() and "data:image/png" in (results / "report.html").read_text()
    assert (results / "heat_map.png").read_bytes()[:4] == b"\x89PNG"
    assert "pretrain" in (folder / "config.gin").read_text()


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
    changed = "--gin.study.instances_per_expert=4", "--gin.study.num_queries=3", "--gin.study.top_k=2"
    assert finish(again, log, *changed) == finish(tmp_path / "fresh", log, *changed) != whole[1]
    before = (again / "config.gin").read_text()
    process = start(again, log, "--gin.pretrain/StageSettings.train_steps=31")
    assert process.wait(timeout=300) == 2 and "holds a base of another config" in log.read_text()
    assert (again / "config.gin").read_text() == before


def test_sigterm_saves_and_the_status_says_so(tmp_path):
    workdir, log = tmp_path / "study", tmp_path / "log"
    process = start(workdir, log)
    status = kill_when(process, lambda: (workdir / "base" / "metrics.jsonl").exists()
                       and (workdir / "base" / "metrics.jsonl").stat().st_size > 0, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, log.read_text()[-2000:]
    assert "goes on from here" in log.read_text()
    assert list((workdir / "base" / "checkpoints").glob("*/COMMITTED.json"))
