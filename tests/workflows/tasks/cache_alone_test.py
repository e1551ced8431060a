"""`elm tasks cache`, and training from nothing but its arrays: the losses are those of SeqIO's rows."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import tiny_study as tiny

from elm_jax.cli import main
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.evaluation.metrics import TEXT_METRICS
from elm_jax.workflows.tasks import task_cache

TASKS = ("ag_news__classify", "common_gen__put_together")
ALONE = """
import sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
    sys.modules[name] = None  # importing it now fails
sys.path.insert(0, {tests!r})
import pathlib
import tiny_study as tiny
base = tiny.load_base({base!r})
for task in {tasks!r}:
    tiny.make_expert(base, pathlib.Path({out!r}) / task, task=task, prepared_dir={arrays!r}, modules=(),
                     train_steps=4)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> pathlib.Path:
    """A data folder with 80 rows of two real data sets."""
    folder = tmp_path_factory.mktemp("rows")
    if row_files.data_dir() is None:
        pytest.skip("no data folder: set ELM_DATA_DIR")
    for dataset in ("ag_news", "common_gen"):
        (folder / dataset).mkdir()
        for split in ("train", "validation"):
            lines = itertools.islice(row_files.read_lines(row_files.find_file(dataset, None, split)), 80)
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (folder / dataset / f"{split}.jsonl").write_text(text)
        text = (row_files.data_dir() / dataset / "templates.yaml").read_text()
        (folder / dataset / "templates.yaml").write_text(text)
    return folder


def losses(folder: pathlib.Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
def test_training_from_the_cache_alone_is_as_from_seqio(world, rows, tmp_path, monkeypatch, capsys):
    pipeline = pytest.importorskip("elm_jax.data.preparing.seqio_tasks")
    monkeypatch.setenv("ELM_DATA_DIR", str(rows))
    arrays = tmp_path / "arrays"
    status = main.main(["tasks", "cache", "--base", world.base.path, "--prepared", str(arrays),
                        "--num_workers", "2", "--module", "elm_jax.tasks", *TASKS])
    printed = capsys.readouterr().out.splitlines()[1:]
    assert status == 0 and [line.split("\t") for line in printed] == [
        [task, split, "80", "0", ""] for task in TASKS for split in ("train", "validation")]
    program = ALONE.format(tests=str(tiny.__file__).rsplit("/", 1)[0], base=world.base.path, tasks=TASKS,
                           out=str(tmp_path / "alone"), arrays=str(arrays))
    clean = {name: value for name, value in os.environ.items() if name != "ELM_DATA_DIR"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600,
                          env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    pipeline.import_tasks(["elm_jax.tasks"], TEXT_METRICS)
    for task in TASKS:
        of_seqio = pipeline.prepare(task, "train", world.base.vocabulary_path)
        of_seqio.save(tmp_path / "of_seqio" / task / "train")
        tiny.make_expert(world.base, tmp_path / "with" / task, task=task, train_steps=4,
                         prepared_dir=str(tmp_path / "of_seqio"), modules=("elm_jax.tasks",))
        assert losses(tmp_path / "alone" / task) == losses(tmp_path / "with" / task) != []


def test_all_that_there_are_data_for_is_cached_once(world, rows, tmp_path):
    def cached() -> list[str]:  # in a process of its own: other tests register tasks of broken rows
        done = subprocess.run(
            [sys.executable, "-m", "elm_jax.cli", "tasks", "cache", "--base", world.base.path, "--prepared",
             str(tmp_path), "--max_rows", "5", "--module", "elm_jax.tasks"],
            capture_output=True, text=True, timeout=300, env={**os.environ, "ELM_DATA_DIR": str(rows)})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()[1:]

    first = cached()
    names = set().union(*(templates.read_templates(rows / dataset / "templates.yaml")
                          for dataset in ("ag_news", "common_gen")))
    assert {line.split()[0].split("__")[1] for line in first} == {
        templates.task_name("", None, name).split("__")[1] for name in names}
    assert len(first) == len(set(first)) == 2 * len(names)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens.npy")}
    assert cached() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens.npy")} == times


def test_one_bad_row_ends_the_cache_and_keeps_the_rest(world, rows, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    (folder / "ag_news").mkdir(parents=True)
    text = (rows / "ag_news" / "train.jsonl").read_text()
    (folder / "ag_news" / "train.jsonl").write_text(text)
    (folder / "ag_news" / "validation.jsonl").write_text(text + "{broken\n")
    (folder / "ag_news" / "templates.yaml").write_text((rows / "ag_news" / "templates.yaml").read_text())
    monkeypatch.setenv("ELM_DATA_DIR", str(folder))
    for workers in ("1", "2"):
        arrays = tmp_path / f"arrays{workers}"
        status = main.main(["tasks", "cache", "--base", world.base.path, "--prepared", str(arrays),
                            "--num_workers", workers, "--module", "elm_jax.tasks", TASKS[0]])
        message = capsys.readouterr().err
        assert status == 2 and f"{folder}/ag_news/validation.jsonl, line 81" in message
        assert len(PreparedSplit.open(arrays / TASKS[0] / "train")) == 80
        assert not (arrays / TASKS[0] / "validation").exists()


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(world, tmp_path):
    """Killed in the middle, then started again: no process is left, and all arrays are whole."""
    words = [sys.executable, "-m", "elm_jax.cli", "tasks", "cache", "--base", world.base.path, "--prepared",
             str(tmp_path), "--num_workers", "2", "--module", "elm_jax.tasks.embedded", "mini_topic",
             "mini_review", "mini_headline", "mini_reading"]
    begun = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while begun.poll() is None and not any(tmp_path.glob("*/*/info.json")):
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()
    begun.kill()
    begun.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until and any(pathlib.Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.1)
    assert children and not any(pathlib.Path(f"/proc/{child}").exists() for child in children)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines()[1:]:
        task, split = line.split("\t")[:2]
        assert len(PreparedSplit.open(tmp_path / task / split)) > 0


def test_names_without_rows_are_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    status = main.main(["tasks", "cache", "--base", world.base.path, "--prepared", str(tmp_path / "arrays"),
                        "--module", "elm_jax.tasks", "ag_news__classify"])
    assert status == 2 and "There are no train rows of ag_news" in capsys.readouterr().err
    with pytest.raises(task_cache.InputError, match=r"(?s)None of the tasks has such a split.*no_such_split"):
        task_cache.jobs_of(TaskData(world.base.vocabulary, ("elm_jax.tasks",)), [], ["no_such_split"])
    assert main.main(["tasks", "cache", "--base", world.base.path, "--prepared", str(tmp_path / "arrays"),
                      "--num_workers", "0", "ag_news__classify"]) == 2


def test_only_so_many_splits_are_kept_open(world, tmp_path, monkeypatch):
    monkeypatch.setattr("elm_jax.data.preparing.task_data.MOST_OPEN", 2)
    data = TaskData(world.base.vocabulary, tiny.MODULES, str(tmp_path))
    tasks = registry.task_names(available_only=True)
    mini = [name for name in tasks if name.startswith("mini_")][:4]
    first = [data.split(task, "validation", 5) for task in mini]
    assert len(data._splits) == 2
    again = data.split(mini[0], "validation", 5)
    assert again is not first[0] and (again.arrays["tokens"] == first[0].arrays["tokens"]).all()
