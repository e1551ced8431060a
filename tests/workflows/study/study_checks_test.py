"""A study's config is checked whole before anything is trained or written."""

import json
import types

import jax
import pytest
import tiny_study as tiny
from checkout import HELPERS

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import main
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.runtime import storage
from elm_jax.workflows.study import study_checks
from elm_jax.workflows.train import run_record

GIN = str(HELPERS.joinpath("tiny_study.gin"))


@pytest.mark.parametrize(("binding", "words"), [
    ("study.unseen_tasks=('mini_product__what_is_sol',)", "nearest: mini_product__what_is_sold"),
    ("study.heldout_prompts=('mini_topic',)", "study.heldout_prompts"),
    ("study.datasets=('mini_topik','mini_review')", "nearest: mini_topic"),
    ("study.datasets=('mini_topic',)", "Merging needs two or more experts"),
    ("study.top_k=1", "Merging needs two or more experts"),
    ("study.unseen_tasks=('mini_note__main_point',)", "classified by rank"),
    ("study.mesh_data=3", "Batch size does not divide"),
    ("study.bbh_tasks=('own_bhb',)", "nearest: own_bbh"),
    ("study.bbh_tasks=('mini_topic__about_what',)", "one that nothing is ever trained on"),
    ("study.bbh_tasks=('mini_topic',)", "study.bbh_tasks: mini_topic__"),
    ("study.bbh_tasks=('own_bbh','own_count__count')", "A name is given twice"),
    ("study.multitask_tasks=('own_parity__ask',)", "evaluation only cannot be trained on"),
    ("study.multitask_tasks=('own_bbh',)", "evaluation only cannot be trained on"),
    ("study.multitask_tasks=('mini_topik',)", "nearest: mini_topic"),
    ("study.unseen_tasks=('mini_product__what_is_sold','own_missing__count')", "got: no data"),
])
def test_what_would_fail_late_is_refused_first(binding, words, tmp_path, capsys):
    workdir = tmp_path / "study"
    status = main.main(["study", "--gin_file", GIN, f"--gin.WORKDIR='{workdir}'", f"--gin.{binding}"])
    assert status == 2 and words in capsys.readouterr().err
    assert not workdir.exists()


def test_a_study_without_its_data_says_which_variable_names_them(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    status = main.main(["study", "--gin_file", "studies/p3_small.gin", f"--gin.WORKDIR='{tmp_path / 'x'}'"])
    assert status == 2 and "set ELM_DATA_DIR" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_benchmark_tasks_without_data_are_told_and_left_out(tmp_path, caplog):
    config_lib.parse([GIN], [f"WORKDIR='{tmp_path}'"])
    given = config_lib.build("study")
    study = study_checks.expanded(given)
    study_checks.check(study)
    absent = study_checks.absent_tasks(study)
    assert [(row["benchmark"], row["task"], row["reason"]) for row in absent] == [
        ("BBH", "own_missing__count", "no data")]
    assert "own_missing__count is not scored: no data" in caplog.text
    left = study_checks.without(study, absent)
    assert given.bbh_tasks == ("own_bbh",) and left.bbh_tasks == ("own_count__count",)
    assert left.target_tasks == ("mini_product__what_is_sold", "mini_emotion__name_the_emotion",
                                 "mini_note__sum_up", "own_parity__ask", "own_count__count")
    (tmp_path / "prepared" / "own_missing__count").mkdir(parents=True)
    assert study_checks.absent_tasks(study) == []  # prepared arrays need no file


@pytest.mark.slow
def test_a_refused_run_leaves_the_config_of_the_finished_one(world, tmp_path, capsys):
    run = tmp_path / "run"
    common = ["train", "--gin_file", "experts/prompt.gin", f"--gin.MODEL_DIR='{run}'",
              f"--gin.TASK='{tiny.TOPIC}'", "--gin.EPOCHS=None", "--gin.BATCH_SIZE=8",
              f"--gin.PREPARED_DIR='{world.folder / 'prepared'}'",
              "--gin.TASK_MODULES=('elm_jax.tasks.embedded',)",
              "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}"]
    missing = [*common, "--gin.TRAIN_STEPS=2", f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path / 'none'}'"]
    assert main.main(missing) == 2 and not run.exists()
    base = f"--gin.INITIAL_CHECKPOINT_PATH='{world.base.path}'"
    assert main.main([*common, base, "--gin.TRAIN_STEPS=2"]) == 0
    before = (run / "config.gin").read_text()
    assert main.main([*common, base, "--gin.TRAIN_STEPS=3"]) == 2
    assert (run / "config.gin").read_text() == before and "TRAIN_STEPS = 2" in before
    capsys.readouterr()


def test_arrays_of_other_rows_are_refused(world, tmp_path, monkeypatch):
    data = tmp_path / "data" / "letters"
    data.mkdir(parents=True)
    rows = [{"text": f"letter {letter}", "label": number % 2} for number, letter in enumerate("abcdef")]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "templates.yaml").write_text(
        "dataset: letters\ntemplates:\n  a:\n    answer_choices: even ||| odd\n    name: which\n"
        "    jinja: '{{text}}? ||| {{answer_choices[label]}}'\n    metadata:\n      metrics: [Accuracy]\n")
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.add_prompted_task("letters", None, "which", kind="rank", role="train", splits=("train",))

    def read() -> int:
        arrays = TaskData(world.base.vocabulary, ("elm_jax.tasks.embedded",),
                          str(tmp_path / "prepared"))
        return len(arrays.split("letters__which", "train"))

    assert read() == 6 and read() == 6
    with open(data / "train.jsonl", "a") as file:
        file.write(json.dumps({"text": "letter g", "label": 0}) + "\n")
    with pytest.raises(InputError, match="made of other rows"):
        read()


def test_what_was_made_of_something_else_is_made_again(tmp_path):
    made_of = run_record.MadeOf(tmp_path / "made_of.json")
    assert not made_of.fits("library", {"a": 1})
    made_of.record("library", {"a": 1})
    again = run_record.MadeOf(tmp_path / "made_of.json")
    assert again.fits("library", {"a": 1}) and not again.fits("library", {"a": 2})


def test_the_clock_of_a_killed_session_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record.StageClock, "EVERY", 0.05)
    clock = run_record.StageClock(tmp_path / "stages.json")
    with clock.stage("train"):
        seen = 0.0
        while seen < 0.1:
            if (tmp_path / "stages.json").exists():
                seen = storage.read_json(tmp_path / "stages.json", kind="clock", schema_version=1)[
                    "seconds"]["train"]
    assert run_record.StageClock(tmp_path / "stages.json").seconds["train"] >= seen


@pytest.mark.parametrize(("batches", "data"), [((8, 4, 4, 4), 4), ((8, 8, 16, 24), 8), ((8, 3, 3, 3), 1)])
def test_the_mesh_takes_as_many_devices_as_divide_every_batch(batches, data):
    assert len(jax.devices()) == 8
    stages = {name: types.SimpleNamespace(batch_size=size, num_microbatches=1)
              for name, size in zip(("pretrain", "prompt", "dataset", "multitask"), batches, strict=True)}
    config = types.SimpleNamespace(mesh_data=-1, mesh_model=1, **stages)
    assert dict(study_checks.mesh_of(config).shape) == {"data": data, "experts": 1, "model": 1}
