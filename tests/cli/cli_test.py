"""The command line as a user meets it: statuses, one clear message, nothing half written."""

import csv
import io
import json

import pytest
import tiny_study as tiny
from checkout import ROOT

import elm_jax as elm
from elm_jax.cli import main

MODULE = ["--module", "elm_jax.tasks.embedded"]


def run(capsys, *argv):
    status = main.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_of_every_verb_shows_an_example(capsys):
    for words in ([], ["train"], ["study"], ["demo"], ["route"], ["merge"], ["evaluate"], ["report"],
                  ["convert"], ["library", "build"], ["library", "verify"], ["tasks", "show"],
                  ["tasks", "prepare"], ["tasks", "cache"], ["tasks", "stats"], ["tasks", "check"],
                  ["upcycle"]):
        with pytest.raises(SystemExit) as ended:
            main.main([*words, "--help"])
        assert ended.value.code == 0 and "example:\n  " in capsys.readouterr().out


@pytest.mark.parametrize(("words", "near"), [
    ("trian", "unknown verb 'trian': expected one of 16; nearest: train"),
    ("library ad", "unknown action 'ad': expected one of build, add"),
    ("merge --method tise a b", "unknown method 'tise'"),
    ("merge --metod ties a b", "nearest flags: --method"),
    ("tasks show a --rwos 3", "nearest flags: --rows")])
def test_a_wrong_verb_choice_or_flag_is_status_2_with_the_nearest(capsys, words, near):
    with pytest.raises(SystemExit) as ended:
        main.main(words.split())
    assert ended.value.code == 2 and near in capsys.readouterr().err


def test_the_version_is_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"elm {elm.__version__}\n"
    assert "version = attr: elm_jax.__version__" in (ROOT / "setup.cfg").read_text()


def test_tasks_list_and_show(capsys, world):
    status, out, _ = run(capsys, "tasks", "list", "--json", *MODULE)
    listing = json.loads(out)
    assert status == 0 and tiny.TOPIC in {row["name"] for row in listing["tasks"]}
    assert listing["mixtures"]["mini_topic"]
    status, out, _ = run(capsys, "tasks", "show", tiny.TOPIC, "--rows", 2, "--json", "--base",
                         world.base.path, *MODULE)
    rows = json.loads(out)["rows"]
    assert status == 0 and len(rows) == 2 and rows[0]["target"] in rows[0]["choices"]
    assert rows[0]["tokens"]["input"] == len(world.base.vocabulary.encode(rows[0]["input"])) + 1


def test_tasks_list_says_what_each_lacks_and_cuts_no_name(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "index.json").write_text(json.dumps(
        [{"name": "ag_news", "config": None, "unusable_templates": ["recommend"]}]))
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    status, out, err = run(capsys, "tasks", "list")
    rows = {row["task or mixture"]: row["lacks"] for row in csv.DictReader(io.StringIO(out), delimiter="\t")}
    listing = json.loads(run(capsys, "tasks", "list", "--json")[1])
    assert status == 0 and set(rows) == {row["name"] for row in listing["tasks"]} | set(listing["mixtures"])
    assert rows["ag_news__classify"] == "" and rows[tiny.TOPIC] == ""
    assert rows["ag_news__recommend"] == "the data lack a field that the template reads"
    assert rows["trec__trec1"] == "no data" and rows["trec"] == "18 of its 18 tasks"
    assert rows["ag_news"] == "1 of its 7 tasks" and rows["mini_topic"] == ""
    assert f"ELM_DATA_DIR is {tmp_path}" in err


@pytest.mark.parametrize("words", [("list",), ("show", tiny.TOPIC)])
def test_flags_that_would_do_nothing_are_refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main.main(["tasks", *words, "--prepared", "arrays"])
    assert ended.value.code == 2 and "--prepared" in capsys.readouterr().err


def test_an_unknown_task_is_status_2_and_names_three(capsys):
    status, _, err = run(capsys, "tasks", "show", "mini_topic__about_wat", *MODULE)
    assert status == 2 and "Unknown task 'mini_topic__about_wat'" in err and tiny.TOPIC in err
    assert "Traceback" not in err and err.count(",") >= 2 and "--module my_tasks" in err


def test_an_unused_macro_is_status_2_with_the_nearest(capsys, world, tmp_path):
    status, _, err = run(
        capsys, "train", "--gin_file", "gin/experts/prompt.gin",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'", f"--gin.INITIAL_CHECKPOINT_PATH='{world.base.path}'",
        f"--gin.TASK='{tiny.TOPIC}'", "--gin.BATCHSIZE=4")
    assert status == 2 and "BATCHSIZE is set but nothing uses it" in err
    assert "Did you mean BATCH_SIZE?" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("binding", "words"), [
    ("MODEL_DIR=runs/a", "strings need their own quotes"),
    ("train.batch_sise=3", "batch_sise"),
    ("BATCH_SIZE='8'", "wrong type"),
    ("AdapterConfig.bottlneck=4", "Unknown parameter of AdapterConfig 'bottlneck'"),
    ("pretrain.batch_size=4", "Did you mean train.batch_size?"),
    ("train.pack='no'", "True or False"),
])
def test_a_wrong_binding_is_status_2(capsys, world, tmp_path, binding, words):
    status, _, err = run(
        capsys, "train", "--gin_file", "experts/prompt.gin",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'", f"--gin.INITIAL_CHECKPOINT_PATH='{world.base.path}'",
        f"--gin.TASK='{tiny.TOPIC}'", f"--gin.{binding}")
    assert status == 2 and words in err and "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_gin_file_that_is_not_found_is_status_2_with_the_nearest(capsys):
    status, _, err = run(capsys, "train", "--gin_file", "experts/promt.gin")
    assert status == 2 and "nearest" in err and "experts/prompt.gin" in err and "quotes" not in err


def test_a_missing_macro_is_status_2(capsys):
    status, _, err = run(capsys, "train", "--gin_file", "experts/prompt.gin")
    assert status == 2 and "no INITIAL_CHECKPOINT_PATH, no MODEL_DIR, no TASK" in err
    assert "Traceback" not in err


def test_library_route_merge_evaluate(capsys, world, tmp_path):
    experts = [world.folder / "topic" / "expert", world.folder / "review" / "expert"]
    prepared = ["--prepared", world.folder / "prepared", *MODULE]
    status, out, _ = run(capsys, "library", "build", "--library", tmp_path / "lib", "--base",
                         world.base.path, "--encoder", "tfidf", "--instances", 20, *prepared, *experts)
    assert status == 0 and "2 experts, 40 keys" in out
    status, out, _ = run(capsys, "route", "--library", tmp_path / "lib", "--task", tiny.REVIEW, "--json",
                         *MODULE)
    ranking = json.loads(out)["ranking"]
    assert status == 0 and ranking[0]["expert"] == tiny.REVIEW and ranking[0]["votes"] > 16
    status, out, _ = run(capsys, "merge", "--output", tmp_path / "merged", "--weights", "1,3", *experts)
    assert status == 0 and "0.2500  mini_topic__about_what" in out
    command = ["evaluate", "--base", world.base.path, "--expert", tmp_path / "merged", "--task", tiny.TOPIC,
               "--max_rows", 8, "--source_length", 64, "--mesh_data", 1, "--output",
               tmp_path / "results" / "results.jsonl", *prepared]
    assert run(capsys, *command)[0] == 0
    rows = (tmp_path / "results" / "results.jsonl").read_text()
    row = json.loads(rows)
    assert row["num_instances"] == 8 and row["ci95_low"] <= row["value"] <= row["ci95_high"]
    assert run(capsys, *command)[0] == 0
    assert (tmp_path / "results" / "results.jsonl").read_text() == rows, "done rows are not written again"


def test_an_expert_of_another_base_is_status_2(capsys, world, tmp_path):
    status, _, err = run(
        capsys, "evaluate", "--base", world.other_base.path, "--expert", world.folder / "topic", "--task",
        tiny.TOPIC, "--output", tmp_path / "r" / "results.jsonl", "--mesh_data", 1, *MODULE)
    assert status == 2 and "belongs to another base" in err and not (tmp_path / "r").exists()


def test_a_half_written_data_file_is_status_2_with_its_line(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    (folder / "validation.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "la')
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    status, _, err = run(capsys, "tasks", "show", "ag_news__classify")
    assert status == 2 and "validation.jsonl, line 2" in err and "half written" in err


def test_a_field_that_the_data_lack_is_status_2(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    (folder / "validation.jsonl").write_text('{"txt": "a", "label": 1}\n')
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    status, _, err = run(capsys, "tasks", "show", "ag_news__classify")
    assert status == 2 and "text" in err and "txt" in err
