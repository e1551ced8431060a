"""Calibration of a library: from tables that are there, and by scoring, killed and gone on with."""

import itertools
import json
import shutil
import types

import numpy as np
import pytest
import tiny_study as tiny
from scipy import stats

from elm_jax.cli.main import main
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import read_card
from elm_jax.routing.router import default_router
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import storage
from elm_jax.workflows.calibrate import calibrate_library as calibrate_module
from elm_jax.workflows.calibrate.calibrate_library import (
    CalibrateConfig,
    calibrate_library,
    tasks_to_score,
)
from elm_jax.workflows.calibrate.calibration_rows import CalibrationSetup

DATASET, COPY = "topic-de", "copy"
NOTE, REVIEW = ("mini_note__main_point", "mini_note__sum_up"), tiny.REVIEW
MODULES = ["--module", *tiny.MODULES]


@pytest.fixture
def library(world, tmp_path):
    """Experts of two data sets: two of topics, one of reviews, and a copy of this."""
    shutil.copytree(world.folder / "library", tmp_path / "library")
    shutil.copytree(world.folder / "review" / "expert", tmp_path / COPY)
    card = json.loads((tmp_path / COPY / "expert.json").read_text())
    (tmp_path / COPY / "expert.json").write_text(json.dumps({**card, "id": COPY}))
    opened = ExpertLibrary.open(tmp_path / "library")
    opened.add({tmp_path / COPY: [RoutingInstance("Is it good?")],
                world.folder / "dataset" / "expert": [RoutingInstance("What is it about?")]})
    return opened


def put(store: ResultsStore, library: ExpertLibrary, expert: str, task: str, value: float, **facts) -> None:
    """Adds the result of an expert on a task."""
    row = {"schema_version": 3, "expert": expert, "task": task, "split": "validation", "metric": "accuracy",
           "value": value, "ci95_low": 0.0, "ci95_high": 1.0, "num_instances": 8, "chance": 0.5,
           "settings": "s", "dataset": task.split("__")[0], "max_rows": 8,
           "model": read_card(library.path / "experts" / expert)[2]}
    prediction = {"index": 0, "prediction": "a", "target": "a", "correct": 1}
    store.append(TaskResult([{**row, **facts}], [prediction]))


def test_a_complete_table_gives_priors_and_an_incomplete_one_is_refused(
        library, tmp_path, capsys, monkeypatch):
    """Nobody is scored on an own data set, the copy by its model; tasks of one data set are averaged."""
    assert default_router(library.routed()) == "vote"
    store = ResultsStore(tmp_path / "results")
    for expert, task, value in ((tiny.TOPIC, REVIEW, 0.5), (tiny.TOPIC, NOTE[0], 0.25),
                                (DATASET, REVIEW, 0.75), (DATASET, NOTE[0], 0.25), (DATASET, NOTE[1], 0.5),
                                (REVIEW, NOTE[0], 0.0), (REVIEW, NOTE[1], 0.75)):
        put(store, library, expert, task, value)
    put(store, library, tiny.TOPIC, NOTE[1], 0.25, model="sha256:other")
    words = ["library", "calibrate", "--library", str(library.path), "--results", str(tmp_path), *MODULES]
    assert main(words) == 2
    assert f"got: 1 of 8 scores missing: {tiny.TOPIC} on {NOTE[1]}\n" in capsys.readouterr().err
    assert not (library.path / "calibration").exists()
    put(store, library, tiny.TOPIC, NOTE[1], 0.25)
    storage.write_text(library.path / "calibration" / "generality.json", "{")
    assert main(["route", "--library", str(library.path), "--instruction", "Sort it."]) == 2
    capsys.readouterr()
    assert main(words) == 0, "a damaged file is written again"
    out = capsys.readouterr()
    assert "4 experts x 3 tasks of 2 data sets" in out.err and "which have their scores: 1." in out.err
    routed = library.routed()
    assert routed.copies.tolist() == [0, 1, 1, 3] and default_router(routed) != "vote"
    two, three = stats.norm.ppf(0.75), stats.norm.ppf(2.5 / 3)
    notes = [(stats.norm.ppf(2 / 3) - three) / 2, 0.0, 0.0, (stats.norm.ppf(2 / 3) + 0) / 2]
    assert set(routed.priors.datasets) == {"mini_review", "mini_note"}
    columns = dict(zip(routed.priors.datasets, routed.priors.generality.T, strict=True))
    np.testing.assert_allclose(columns["mini_review"], [-two, np.nan, np.nan, two])
    np.testing.assert_allclose(columns["mini_note"], notes, atol=1e-12)
    assert out.out.splitlines()[1].split("\t")[0] == DATASET
    assert main(["library", "list", "--library", str(library.path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["generality"][tiny.TOPIC]
    assert listed["mini_review"] == {"score": pytest.approx(-two), "family": "sentiment", "tasks": 1}
    with monkeypatch.context() as patched:
        patched.setattr(ExpertLibrary, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ExpertLibrary.open(library.path).remove([DATASET])
    np.testing.assert_array_equal(library.routed().priors.generality, routed.priors.generality)
    library.remove([DATASET])
    assert np.isnan(library.routed().priors.generality[1]).tolist().count(False) == 1
    assert DATASET not in (library.path / "calibration" / "generality.json").read_text()
    put(store, library, tiny.TOPIC, NOTE[0], 0.25, num_instances=4, settings="t")
    with pytest.raises(InputError, match="unlike ways on one task"):
        calibrate_library(CalibrateConfig(library.path, tmp_path / "results"))


@pytest.mark.parametrize(("given", "message"), [
    ({}, "got: neither"), ({"results": "r", "base": "b"}, "got: both"),
    ({"results": "r", "rows": 8, "prepared_dir": "p"}, "no effect(.|\n)*rows, prepared_dir"),
    ({"base": "b", "tasks": ("a",), "tasks_per_dataset": 2}, "no effect"), ({"base": "b", "rows": 0}, "rows"),
    ({"results": "no/results"}, "no results here")])
def test_wrong_settings_are_one_error_each(world, given, message):
    with pytest.raises(InputError, match=message):
        calibrate_library(CalibrateConfig(world.folder / "library", **given))


def test_train_rows_are_no_keys_and_stay_as_a_library_grows(world, tmp_path):
    """Of a task without other rows; a library whose keys are all rows is refused."""
    task = "own_set__own_task"
    shutil.copytree(world.folder / "prepared" / tiny.TOPIC / "train", tmp_path / "arrays" / task / "train")
    data, store = TaskData(world.base.vocabulary, tiny.MODULES, tmp_path / "arrays"), ResultsStore(tmp_path)
    whole = data.split(task, "train")
    inputs = [whole.text(number)["inputs"] for number in range(len(whole))]

    def rows_with(keys):
        setup = CalibrationSetup(None, data, EvaluationSettings(), None, max_rows=4, keys=keys, store=store)
        assert setup.split_of(task) == "train" and setup.split_of(tiny.REVIEW) == "validation"
        rows = setup.drawn(task, data)
        return [rows.text(number) for number in range(len(rows))]

    keys = frozenset(inputs[::2])
    drawn = rows_with(keys)
    assert len(drawn) == 4 and not {row["inputs"] for row in drawn} & keys
    with pytest.raises(InputError, match="are keys of the library"):
        rows_with(frozenset(inputs))
    row = {"schema_version": 3, "expert": "one", "task": task, "split": "train", "metric": "accuracy",
           "value": 1.0, "ci95_low": 0.0, "ci95_high": 1.0, "num_instances": 4, "chance": 0.5,
           "settings": "s", "dataset": "own_set", "max_rows": 4}
    store.append(TaskResult([row], [{"index": one["index"], "prediction": "a", "target": "a", "correct": 1}
                                    for one in drawn]))
    assert rows_with(frozenset(inputs)) == drawn


def test_experts_are_not_scored_on_their_own_data_sets_and_priors_are_the_same(
        world, library, tmp_path, monkeypatch):
    """One after another 6 of 9 pairs; of a stack of unlike experts all but the one of a whole model."""
    library.remove([COPY])
    tasks = (tiny.TOPIC, REVIEW, "mini_question__asks_for")
    found = {}
    for stack, pairs in ((1, 6), (16, 8), (1000, 9)):
        copied = tmp_path / str(stack)
        shutil.copytree(library.path, copied)
        with monkeypatch.context() as patched:
            if stack == 1000:  # all pairs, as it was before
                patched.setattr(calibrate_module, "tasks_to_score",
                                lambda models, table, _: {one.id: list(table.tasks) for one in models})
            made = calibrate_library(CalibrateConfig(
                copied, base=world.base.path, tasks=tasks, rows=4, source_length=64, mesh_data=1,
                stack_experts=stack, prepared_dir=str(tmp_path / "arrays"), modules=tiny.MODULES))
        assert (made.cost.pairs, made.cost.rows) == (pairs, 4 * pairs)
        found[stack] = (copied / "calibration" / "generality.json").read_text()
    assert found[1] == found[16] == found[1000]


def test_whole_stacks_of_one_data_set_leave_their_own_tasks_out():
    """Of five experts of reviews four are two stacks; the fifth has all tasks, with that of topics."""
    class Table:
        tasks = ("topic", "review", "nobody")
        library = ("t", "r0", "r1", "r2", "r3", "r4", "whole")

        @staticmethod
        def needed():
            return np.array([[False, True, False]] + 6 * [[True, False, False]])

    models = [types.SimpleNamespace(id=name, expert=None if name == "whole" else name)
              for name in Table.library]
    found = tasks_to_score(models, Table, 2)
    assert {name for name, tasks in found.items() if tasks == list(Table.tasks)} == {"t", "r4"}
    assert all(found[name] == ["topic", "nobody"] for name in ("r0", "r1", "r2", "r3", "whole"))
    assert tasks_to_score(models, Table, 1)["t"] == ["review", "nobody"]


def test_a_killed_calibration_goes_on(world, library, tmp_path, capsys, monkeypatch):
    """What was scored stays and is not scored again; an expert that came since is known nothing of."""
    library.remove([COPY, DATASET])
    words = ["library", "calibrate", "--library", str(library.path), "--base", str(world.base.path),
             "--rows", "4", "--source_length", "64", "--mesh_data", "1", "--prepared",
             str(tmp_path / "arrays"), *MODULES]
    assert main(words) == 2
    assert "Nothing can tell which experts" in capsys.readouterr().err
    words += ["--task", "mini_question__asks_for", "--task", "mini_question__what_kind_of_answer"]
    append, calls = ResultsStore.append, itertools.count()

    def power_cut(store, result):
        if next(calls) == 2:
            raise KeyboardInterrupt
        append(store, result)

    with monkeypatch.context() as patched:
        patched.setattr(ResultsStore, "append", power_cut)
        assert main(words) == 130
    assert library.routed().priors is None
    assert main([*words, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert [cost[name] for name in ("pairs", "reused", "rows")] == [4, 2, 8]
    rows = ResultsStore(library.path / "calibration").rows()
    assert {(row["expert"], row["num_instances"]) for row in rows} == {(tiny.TOPIC, 4), (tiny.REVIEW, 4)}
    values = {(row["expert"], row["task"]): row["value"] for row in rows}
    better = [np.sign(value - values[tiny.REVIEW, task]) for (expert, task), value in values.items()
              if expert == tiny.TOPIC]
    expected = stats.norm.ppf(0.75) * np.mean(better)
    np.testing.assert_allclose(library.routed().priors.generality, [[expected], [-expected]])
    assert main(words) == 0
    assert "4 pairs of an expert and a task, 4 of them scored before; 0 rows" in capsys.readouterr().err
