"""Twelve experts, three real workers, one of them killed: all are done, once each."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_study as tiny
from processes import ROOT, Run, environment, newest_checkpoint

from elm_jax.experts.overlay import load_expert

pytestmark = pytest.mark.slow
TASKS = (tiny.TOPIC, tiny.REVIEW, "mini_topic__which_section")
STEPS = 24
SETTINGS = {"TASK_MODULES": tiny.MODULES, "EPOCHS": None, "TRAIN_STEPS": STEPS, "BATCH_SIZE": 4,
            "TASK_FEATURE_LENGTHS": tiny.LENGTHS, "train.log_period": 1, "train.checkpoint_period": 2,
            "train.tensorboard": False, "train.adapter_bottleneck": 4}


def elm(*words):
    done = subprocess.run([sys.executable, "-m", "elm_jax.cli", *map(str, words)], capture_output=True,
                          text=True, cwd=ROOT, env=environment(1))
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def farm(tmp_path):
    """A farm of twelve prompt experts."""
    base = tiny.make_base(tmp_path / "base")
    with open(tmp_path / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["task", "expert_id", "RANDOM_SEED"])
        table.writerows([TASKS[number % 3], f"expert_{number}", number] for number in range(12))
    settings = {**SETTINGS, "INITIAL_CHECKPOINT_PATH": base.path}
    done = elm("farm", "init", "--dir", tmp_path / "farm", "--table", tmp_path / "table.csv", "--gin_file",
               "experts/prompt.gin", *(f"--gin.{name}={value!r}" for name, value in settings.items()))
    assert done.returncode == 0, done.stderr
    return tmp_path / "farm"


def test_twelve_experts_three_workers_one_killed(farm, tmp_path):
    start = time.monotonic()
    words = ["farm", "work", "--dir", farm, "--lease_seconds", 20, "--poll_seconds", 0.5]
    workers = [Run(tmp_path / "log", words, count=1, devices=1) for _ in range(3)]
    victim = None
    while victim is None:  # the first expert that has a checkpoint and is not done
        for number in range(12):
            run, claim = farm / "runs" / f"expert_{number}", farm / f"attempts/expert_{number}/1.claim.json"
            if 2 <= newest_checkpoint(run) < STEPS - 4 and not claim.with_name("1.end.json").exists():
                victim = f"expert_{number}"
                process = int(json.loads(claim.read_text())["worker"].split(":")[1])
                os.kill(process, signal.SIGKILL)
                break
        assert time.monotonic() - start < 900
        time.sleep(0.01)
    left_at = newest_checkpoint(farm / "runs" / victim)
    statuses = sorted(worker.wait()[0] for worker in workers)
    assert statuses == [-signal.SIGKILL, 0, 0], [worker.said() for worker in workers]
    status = elm("farm", "status", "--dir", farm, "--json")
    rows = json.loads(status.stdout)["experts"]
    print(f"12 experts in {time.monotonic() - start:.0f} s; {victim} was left at step {left_at}")
    assert status.returncode == 0 and [row["state"] for row in rows] == ["done"] * 12
    for row in rows:  # one attempt each, but for the victim: one that died and one that ended it
        assert row["attempts"] == (2 if row["expert"] == victim else 1) and row["step"] == STEPS
        ends = map(json.loads, (path.read_text() for path in
                                (farm / "attempts" / row["expert"]).glob("*.end.json")))
        assert [end["how"] for end in ends] == ["done"]
        assert load_expert(farm / "runs" / row["expert"]).card.training["steps"] == STEPS
        steps = [json.loads(line)["step"] for line in
                 (farm / "runs" / row["expert"] / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1))
    said = "".join(worker.said() for worker in workers)
    assert said.count(f"training {victim}, attempt 2") == 1
    assert left_at >= 2  # and the second attempt went on from there: no step of it was taken twice
    shared = os.listdir(farm / "prepared")
    assert sorted(shared) == sorted(TASKS)
    assert not [name for task in shared for name in os.listdir(farm / "prepared" / task) if "partial" in name]
    done = elm("farm", "work", "--dir", farm)  # nothing is left
    assert done.returncode == 0 and "training" not in done.stderr
