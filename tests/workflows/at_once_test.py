"""Verbs at once on one folder: nothing is lost or doubled, and who cannot write is told so."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import many_processes
import numpy as np
import processes
import pytest
import tiny_study as tiny
from verbs_at_once import HashEncoder, VerbServer

from elm_jax.errors import InputError
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import load_expert
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import trees
from elm_jax.runtime.locks import alone
from elm_jax.workflows.farm import jobs
from elm_jax.workflows.merge.search_config import SearchConfig
from elm_jax.workflows.merge.search_merge import search_and_merge
from elm_jax.workflows.study.run_study import run_study
from elm_jax.workflows.study.study_config import StageSettings, StudyConfig
from elm_jax.workflows.train.pretrain import PretrainConfig, pretrain
from elm_jax.workflows.train.train_expert import train
from elm_jax.workflows.train.train_stack import StackSize, train_experts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with VerbServer(tmp_path_factory.mktemp("printed")) as started:
        yield started


def expert_named(world, folder: pathlib.Path, name: str) -> pathlib.Path:
    """A copy of an expert with another id."""
    shutil.copytree(world.folder / "topic" / "expert", folder / name)
    card = json.loads((folder / name / "expert.json").read_text())
    (folder / name / "expert.json").write_text(json.dumps({**card, "id": name}))
    return folder / name


def test_libraries_hold_what_two_and_four_processes_add_and_remove_at_once(world, server, tmp_path):
    """All that was added is there beside what was removed; readers meanwhile find a whole library."""
    first = expert_named(world, tmp_path, "first")
    made = ExpertLibrary.create(tmp_path / "library", HashEncoder(), "choice_instance", 3)
    made.add({first: [RoutingInstance("a text")]})
    experts = [expert_named(world, tmp_path, f"own{number}") for number in range(6)]
    for changes in ([("add", experts[0]), ("add", experts[1])],
                    [*(("add", each) for each in experts[2:]), ("remove", "own0")]):
        ended = server.run(*(["change_library", action, made.path, expert] for action, expert in changes))
        assert [each.errors for each in ended if each.status] == []
    opened = ExpertLibrary.open(made.path, HashEncoder())
    assert opened.verify() == []
    assert set(opened) == {"first", *(f"own{number}" for number in range(1, 6))} == set(opened.index.experts)
    assert {row["expert"] for row in opened.instances} == set(opened) and len(opened.instances) == 16
    assert set(os.listdir(made.path / "experts")) == set(opened)
    assert os.listdir(made.path / "keys") == [opened.facts["keys"]] and opened.facts["revision"] == 8
    made.remove("own1")  # opened before all the others came
    assert set(made) == set(opened) - {"own1"}


def test_one_of_two_conversions_at_once_is_written_and_the_other_says_so(world, server, tmp_path):
    convert = ["convert", "--from", "elm", "--to", "elm", world.folder / "dataset", tmp_path / "converted"]
    ended = server.run(convert, convert)
    assert sorted(each.status for each in ended) == [0, 2]
    refused = max(ended).errors
    assert "Another process is writing" in refused or "exists already" in refused
    assert os.listdir(tmp_path) == ["converted"] and load_expert(tmp_path / "converted")


@pytest.mark.slow
def test_verbs_that_make_a_library_and_arrays_at_once(world, server, tmp_path):
    """Four adders, and one that calibrates; two builders of one library; two that prepare the same tasks."""
    base = ["--base", world.folder / "base" / "base", "--module", *tiny.MODULES]
    of_library = [*base, "--prepared", world.folder / "prepared"]
    shutil.copytree(world.folder / "library", tmp_path / "library")
    experts = [expert_named(world, tmp_path, f"own{number}") for number in range(4)]
    ended = server.run(*(["library", "add", "--library", tmp_path / "library", *of_library, each]
                         for each in experts),
                       ["library", "calibrate", "--library", tmp_path / "library", *base, "--rows", 4,
                        "--task", "mini_question__asks_for", "--source_length", 64, "--mesh_data", 1])
    assert [each.errors for each in ended if each.status] == []
    opened = ExpertLibrary.open(tmp_path / "library")
    assert not np.isnan(opened.routed().priors.generality[:2]).any()
    assert set(opened) == {tiny.TOPIC, tiny.REVIEW, "own0", "own1", "own2", "own3"} and opened.verify() == []
    built = server.run(*(["library", "build", "--library", tmp_path / "new", *of_library, each]
                         for each in experts[:2]))
    assert sorted(each.status for each in built) == [0, 2]
    assert "There is a library here already" in max(built).errors
    opened = ExpertLibrary.open(tmp_path / "new")
    assert list(opened) == ["own1" if built[0].status else "own0"] and opened.verify() == []
    words = ["tasks", "cache", tiny.REVIEW, tiny.TOPIC, *base, "--prepared", tmp_path / "prepared"]
    cached = server.run(words, words)
    assert [each.errors for each in cached if each.status] == []
    for task in (tiny.REVIEW, tiny.TOPIC):
        assert sorted(os.listdir(tmp_path / "prepared" / task)) == ["train", "validation"]


def train_words(world, folder: pathlib.Path) -> list[object]:
    """A run that saves after every step."""
    settings = {
        "MODEL_DIR": str(folder), "INITIAL_CHECKPOINT_PATH": str(world.base.path), "TASK": tiny.TOPIC,
        "TASK_MODULES": tiny.MODULES, "EPOCHS": None, "TRAIN_STEPS": 40, "BATCH_SIZE": 4, "MESH_DATA": 1,
        "TASK_FEATURE_LENGTHS": tiny.LENGTHS, "PREPARED_DIR": str(world.folder / "prepared"),
        "train.adapter_bottleneck": 4, "train.log_period": 1, "train.checkpoint_period": 1,
        "train.tensorboard": False}
    return ["train", "--gin_file", "experts/prompt.gin",
            *(f"--gin.{name}={value!r}" for name, value in settings.items())]


@pytest.mark.slow
def test_runs_and_evaluations_at_once(world, server, tmp_path):
    """Of two runs one is refused; a killed one is followed at once; each evaluated pair stands once."""
    run = tmp_path / "run"
    ended = server.run(*[train_words(world, run)] * 2)
    assert sorted(each.status for each in ended) == [0, 2]
    assert re.search(rf"Another process is writing(.|\n)*{run}\n(.|\n)*process \d+:", max(ended).errors)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)) and load_expert(run).card.training["steps"] == 40
    killed = tmp_path / "killed"
    words = [sys.executable, "-m", "elm_jax.cli", *train_words(world, killed)]
    first = subprocess.Popen(words, env=processes.environment(1), stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints").exists() or not any((killed / "checkpoints").glob("*/COMMITTED.json")):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    assert [each.status for each in server.run(train_words(world, killed))] == [0]
    assert first.wait() == -signal.SIGKILL
    assert trees.fingerprint(load_expert(killed).overlay) == trees.fingerprint(load_expert(run).overlay)
    output = tmp_path / "results.jsonl"
    evaluate = [["evaluate", "--base", world.base.path, "--expert", world.folder / name, "--task", tiny.TOPIC,
                 "--prepared", world.folder / "prepared", "--module", *tiny.MODULES, "--max_rows", "20",
                 "--source_length", "64", "--output", output] for name in ("topic", "review") * 2]
    ended = server.run(*evaluate)
    assert [each.errors for each in ended if each.status] == []
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(row["expert"] for row in rows) == sorted([tiny.TOPIC, tiny.REVIEW])
    assert any("its rows stay" in each.errors for each in ended)


def test_a_farm_has_the_experts_of_all_that_extend_it_at_once(world, tmp_path):
    def extend(number: int) -> None:
        config = tiny.train_config(world.base, pathlib.Path("runs") / f"own{number}", prepared_dir="prepared")
        assert jobs.create(tmp_path / "farm", [jobs.Job(f"own{number}", config)]) == 1

    extenders = [functools.partial(extend, number) for number in range(4)]
    assert many_processes.at_once(extenders) == [""] * 4
    assert {job.id for job in jobs.read(tmp_path / "farm")} == {f"own{number}" for number in range(4)}


STAGE = StageSettings(3, 4, tiny.LENGTHS, tiny.OPTIMIZER)
LONG_WORK = {
    "train": lambda world, folder: train(tiny.train_config(world.base, folder)),
    "pretrain": lambda world, folder: pretrain(PretrainConfig(
        str(folder), tiny.NETWORK, ("elm_jax.tasks.embedded:passages",), task_feature_lengths=tiny.LENGTHS)),
    "train stack": lambda world, folder: train_experts(
        [tiny.train_config(world.base, folder / "one")], str(folder), StackSize(1), base=world.base,
        data=world.data, mesh=tiny.one_device()),
    "an expert of a stack": lambda world, folder: train_experts(
        [tiny.train_config(world.base, folder)], str(folder.parent / "stack"), StackSize(1), base=world.base,
        data=world.data, mesh=tiny.one_device()),
    "study": lambda world, folder: run_study(StudyConfig(
        str(folder), tiny.MODULES, ("elm_jax.tasks.embedded:passages",), tiny.NETWORK, *[STAGE] * 4,
        (tiny.TOPIC, tiny.REVIEW), ("mini_topic",), (), (), top_k=1)),
    "merge search": lambda world, folder: search_and_merge(
        SearchConfig(("one", "two"), world.base.path, tiny.TOPIC), folder),
}


@pytest.mark.parametrize("work", LONG_WORK)
def test_long_work_is_refused_at_once_while_another_process_writes(world, tmp_path, work):
    """The message names folder and process; nothing in the folder changes, and nothing beside it is left."""
    with many_processes.keeping(tmp_path / "run") as keeper:
        with pytest.raises(InputError, match=rf"Another process is writing(.|\n)*run\n(.|\n)*{keeper.pid}:"):
            LONG_WORK[work](world, tmp_path / "run")
        assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["kept"]
    with alone(tmp_path / "run"):
        assert (tmp_path / "run" / "kept").exists()
