"""Claims, bounds and tables of a farm, with the training itself replaced (a real farm: farm_workers_test)."""

import dataclasses
import json
import os
import threading
import time
import types

import family_rows
import pytest
import small_decoder
import tiny_study as tiny

from elm_jax.errors import InputError, RunError
from elm_jax.models import families
from elm_jax.models.losses import LossConfig
from elm_jax.runtime.leases import Leases
from elm_jax.runtime.preemption import Stopped
from elm_jax.training.early_end import EarlyEnd
from elm_jax.workflows.farm import farm_status, farm_table
from elm_jax.workflows.farm import jobs as jobs_lib
from elm_jax.workflows.farm import worker as farm
from elm_jax.workflows.train.train_config import TrainConfig

NAMES = tuple("abcdef")


def jobs(names=NAMES):
    config = TrainConfig(model_dir="runs/x", task="t", initial_checkpoint_path="base", train_steps=3,
                         optimizer=tiny.OPTIMIZER)
    return [jobs_lib.Job(name, dataclasses.replace(config, expert_id=name, model_dir=f"runs/{name}"))
            for name in names]


def worker(folder, outcome, **settings):
    """A worker whose training is a function of the expert's id."""
    made = farm.Worker(folder, farm.WorkSettings(**{"lease_seconds": 3, "poll_seconds": 0.05, **settings}))
    made._train = lambda job: outcome(job.id)
    return made


def done(name, step=3):
    del name
    return types.SimpleNamespace(stopped=False, step=step, metrics={"loss": 1.0})


def states(folder, limit=3):
    return {row["expert"]: row["state"] for row in farm_status.status(folder, 3, limit)}


@pytest.mark.parametrize("changes", [
    {"network": tiny.NETWORK}, {"early_end": EarlyEnd(5)}, {"loss": LossConfig(0.1, balance_loss=0.01)},
    {"sharding_rules": (("embed", ("data", "model")),)},
    {"kind": "prompt", "lora_rank": 4, "base_dtype": "bfloat16"}], ids=lambda changes: next(iter(changes)))
def test_every_config_comes_back_as_it_was_written(tmp_path, changes):
    """A study's jobs have a network in theirs, and a run may have an early end."""
    wanted = [dataclasses.replace(job, config=dataclasses.replace(job.config, **changes)) for job in jobs()]
    jobs_lib.create(tmp_path, wanted)
    assert jobs_lib.read(tmp_path) == wanted


@pytest.mark.parametrize("name", list(family_rows.CONFIGS))
@pytest.mark.parametrize("adapter", list(family_rows.ADAPTERS))
def test_the_network_comes_back_with_its_family_and_kind_of_adapter(tmp_path, name, adapter):
    network = family_rows.CONFIGS[name].with_adapter(family_rows.ADAPTERS[adapter])
    wanted = [dataclasses.replace(job, config=dataclasses.replace(job.config, network=network))
              for job in jobs(["a"])]
    with small_decoder.with_family():
        jobs_lib.create(tmp_path, wanted)
        assert jobs_lib.read(tmp_path) == wanted
        assert families.config_of(families.plain_settings(wanted[0].config)["network"]) == network


def test_every_expert_is_trained_once_by_many_workers(tmp_path):
    jobs_lib.create(tmp_path, jobs([f"e{number}" for number in range(40)]))
    trained, lock = [], threading.Lock()

    def train(name):
        with lock:
            trained.append(name)
        time.sleep(0.002)
        return done(name)

    found = []
    threads = [threading.Thread(target=lambda: found.append(worker(tmp_path, train).run())) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [True] * 6 and sorted(trained) == sorted(f"e{number}" for number in range(40))
    assert set(states(tmp_path).values()) == {"done"}


def test_a_failure_is_tried_again_so_often_and_the_others_go_on(tmp_path):
    jobs_lib.create(tmp_path, jobs())
    tried = []

    def train(name):
        tried.append(name)
        if name == "b":
            raise RunError("the disk is full")
        if name == "c":
            raise InputError("no such task")
        if name == "d" and tried.count("d") < 2:
            raise ValueError("a bad moment")
        return done(name)

    assert worker(tmp_path, train).run() is False
    assert [tried.count(name) for name in NAMES] == [1, 3, 1, 2, 1, 1]
    rows = {row["expert"]: row for row in farm_status.status(tmp_path, 3, 3)}
    assert [rows[name]["state"] for name in NAMES] == ["done", "failed", "failed", "done", "done", "done"]
    assert rows["b"]["error"] == "the disk is full" and rows["d"]["error"] is None
    assert farm_status.forgive(tmp_path, [], 3) == ["b", "c"] and states(tmp_path)["b"] == "waiting"
    assert worker(tmp_path, done).run() is True


def test_a_worker_on_which_all_fails_ends(tmp_path):
    jobs_lib.create(tmp_path, jobs())

    def train(name):
        raise RunError(f"no disk for {name}")

    with pytest.raises(RunError, match="3 experts in a row failed"):
        worker(tmp_path, train).run()
    assert sum(row["attempts"] for row in farm_status.status(tmp_path, 3, 3)) == farm.SICK_AFTER
    assert set(states(tmp_path).values()) == {"waiting"}


def test_what_sigterm_stopped_is_free_at_once_and_does_not_count(tmp_path):
    jobs_lib.create(tmp_path, jobs(["a"]))
    for _ in range(5):
        with pytest.raises(Stopped):
            worker(tmp_path, lambda name: types.SimpleNamespace(stopped=True, step=2)).run()
        assert states(tmp_path) == {"a": "stopped"}
    assert worker(tmp_path, done).run() is True


@pytest.mark.slow  # waits for two leases; the default suite has an expert whose workers die
def test_a_dead_workers_expert_is_taken_over_after_the_lease_and_a_live_ones_is_not(tmp_path):
    jobs_lib.create(tmp_path, jobs(["a", "b"]))
    dead, live = Leases(tmp_path / "attempts", 3, "dead"), Leases(tmp_path / "attempts", 3, "live")
    dead.claim("a", 1)
    lease = live.claim("b", 1)
    lease.keep(lambda: None, lambda: [])
    start = time.monotonic()
    second = worker(tmp_path, done)
    thread = threading.Thread(target=second.run)
    thread.start()
    while states(tmp_path)["a"] != "done":
        time.sleep(0.05)
        assert time.monotonic() - start < 30
    assert time.monotonic() - start >= 3  # not before the lease was over
    time.sleep(3.5)
    assert states(tmp_path)["b"] == "training" and thread.is_alive()
    lease.end("done", steps=3)
    thread.join(10)
    assert [one.worker for one in second.leases.attempts("a")] == ["dead", second.leases.worker]
    assert [one.worker for one in second.leases.attempts("b")] == ["live"]


def test_a_clock_that_is_hours_off_changes_nothing(tmp_path):
    """The times of change lie hours in the past, or in the future: only that they change counts."""
    leases = Leases(tmp_path, 0.2)
    claim = tmp_path / "a" / "1.claim.json"
    leases.claim("a", 1)
    for number in range(12):  # longer than the lease
        past = time.time() + (-1) ** number * 10_000 + number
        os.utime(claim, (past, past))
        assert not leases.is_silent("a", leases.attempts("a")[-1])
        time.sleep(0.03)
    time.sleep(0.25)
    assert leases.is_silent("a", leases.attempts("a")[-1])


def test_one_of_many_takes_over(tmp_path):
    Leases(tmp_path, 3).claim("a", 1)
    start = threading.Barrier(8)
    won = []

    def take(number):
        leases = Leases(tmp_path, 3, f"w{number}")
        start.wait()
        won.append(leases.claim("a", 2) is not None)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert won.count(True) == 1


def test_a_worker_that_was_taken_for_dead_learns_it(tmp_path):
    lost = threading.Event()
    lease = Leases(tmp_path, 3).claim("a", 1)
    lease.keep(lost.set, lambda: [])
    assert not lost.wait(0.2)
    Leases(tmp_path, 3).claim("a", 2)
    assert lost.wait(5)


def test_an_expert_that_kills_its_workers_is_given_up(tmp_path):
    jobs_lib.create(tmp_path, jobs(["a", "b"]))
    for number in (1, 2):
        Leases(tmp_path / "attempts", 0.3, f"dead{number}").claim("a", number)
    last = worker(tmp_path, done, attempts=2)
    last.leases = Leases(tmp_path / "attempts", 0.3, last.leases.worker)  # no user's lease is so short
    assert last.run() is False
    (row,) = [row for row in farm_status.status(tmp_path, 3, 2) if row["expert"] == "a"]
    assert row["state"] == "failed" and "dead2" in row["error"] and states(tmp_path)["b"] == "done"


def test_a_claim_that_is_being_written_is_anothers(tmp_path):
    jobs_lib.create(tmp_path, jobs(["a"]))
    (tmp_path / "attempts" / "a").mkdir(parents=True)
    (tmp_path / "attempts" / "a" / "1.claim.json").write_text("")
    assert worker(tmp_path, done, wait=False).run() is False and states(tmp_path) == {"a": "training"}


def test_a_bucket_is_refused_plainly():
    with pytest.raises(InputError, match="file system on which one of several workers can make a file"):
        Leases("gs://bucket/farm", 3)


def test_a_farm_grows_but_its_experts_do_not_change(tmp_path):
    assert jobs_lib.create(tmp_path, jobs("ab")) == 2 and jobs_lib.create(tmp_path, jobs("bc")) == 1
    assert [job.id for job in jobs_lib.read(tmp_path)] == ["a", "b", "c"]
    assert jobs_lib.read(tmp_path)[0] == jobs("a")[0]
    other = dataclasses.replace(jobs("a")[0], config=dataclasses.replace(jobs("a")[0].config, random_seed=5))
    with pytest.raises(InputError, match=r"(?s)another config.*random_seed: 0 there, 5 here"):
        jobs_lib.create(tmp_path, [other])


@pytest.mark.parametrize(("what", "value", "message"), [
    ("id", "../x", "expert_id must be the name"), ("id", "a/b", "expert_id must be the name"),
    ("model_dir", "runs/../../x", "leads out"), ("model_dir", "/runs/../x", "leads out")])
def test_a_farm_s_file_names_no_place_outside(what, value, message, tmp_path):
    jobs_lib.create(tmp_path, jobs("a"))
    facts = json.loads((tmp_path / "farm.json").read_text())
    entry = facts["experts"][0]
    (entry if what == "id" else entry["config"])[what] = value
    (tmp_path / "farm.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=message):
        jobs_lib.read(tmp_path)


def test_tables_of_both_kinds_say_the_same(tmp_path):
    rows = [{"task": "t__a", "EPOCHS": 2, "expert_id": "t__a"},
            {"task": "t__b", "expert_id": "x", "LEARNING_RATE": 1e-3, "TASK_FEATURE_LENGTHS": {"inputs": 8}}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.csv").write_text("task,expert_id,EPOCHS,LEARNING_RATE,TASK_FEATURE_LENGTHS\n"
                                    "t__a,,2,,\nt__b,x,,1e-3,{'inputs': 8}\n")
    assert [sorted(row.items()) for row in farm_table.read_table(tmp_path / "t.csv")] == [
        sorted(row.items()) for row in rows] == [
        sorted(row.items()) for row in farm_table.read_table(tmp_path / "t.jsonl")]
    assert farm_table.bindings_of(rows[1]) == [
        "TASK = 't__b'", "train.expert_id = 'x'", "LEARNING_RATE = 0.001",
        "TASK_FEATURE_LENGTHS = {'inputs': 8}"]


@pytest.mark.parametrize(("text", "words"), [
    ("", "is empty"), ('{"expert_id": "a"}', "no task"), ("[1]", "not a JSON object"), ("{", "half written"),
    ('{"task": "a"}\n{"task": "a"}', "one expert_id"), ('{"task": "a", "expert_id": "../a"}', "expert_id")])
def test_a_wrong_table_names_the_row(tmp_path, text, words):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        farm_table.read_table(tmp_path / "t.jsonl")


@pytest.mark.parametrize(("text", "words"), [
    ("task,note\na,'x'\n\n,y\n", "no task(.|\\n)*line 4"),
    ('task,NOTE\na,"two\nlines"\nb,\na,"three\n\nlines"\n', "one expert_id(.|\\n)*line 5(.|\\n)*than line 2"),
    ("task,task\na,b\n", "occurs twice(.|\\n)*line 1"),
    ("task\na\nb,{'inputs': 8, 'x': 1}\n", "more cells(.|\\n)*line 3"),
    ("task\n" + "a" * 200_000, "cannot be read(.|\\n)*line 2"), ("task\n", "no rows")])
def test_a_wrong_csv_table_names_the_line_of_the_file(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        farm_table.read_table(tmp_path / "t.csv")


def test_a_table_with_a_byte_order_mark_is_read(tmp_path):
    for name, text in (("t.csv", "task,EPOCHS\nt__a,2\n"), ("t.jsonl", '{"task": "t__a", "EPOCHS": 2}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert farm_table.read_table(tmp_path / name) == [{"task": "t__a", "EPOCHS": 2, "expert_id": "t__a"}]
