"""Python and the command line walk one road: the same rows from folders and from objects."""

import csv
import dataclasses
import io
import json
import pathlib

import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings

ROWS = 8


def test_config_verb_and_objects_give_the_same_rows(world, tmp_path, capsys):
    prepared = str(world.folder / "prepared")
    config = elm.EvaluateConfig(
        base=pathlib.Path(world.base.path), tasks=(tiny.TOPIC,), output=tmp_path / "one" / "results.jsonl",
        experts=(world.folder / "topic",), max_rows=ROWS, source_length=64, mesh_data=1,
        modules=tiny.MODULES, prepared_dir=prepared)
    rows = elm.evaluate_folders(config).rows()
    assert elm.evaluate_folders(config).rows() == rows, "seconds, too: nothing is scored again"
    assert main.main([
        "evaluate", "--base", world.base.path, "--task", tiny.TOPIC, "--output", str(tmp_path / "two.jsonl"),
        "--expert", str(world.folder / "topic"), "--max_rows", str(ROWS), "--source_length", "64",
        "--mesh_data", "1", "--module", *tiny.MODULES, "--prepared", prepared]) == 0
    printed = capsys.readouterr()
    row, = csv.DictReader(io.StringIO(printed.out), delimiter="\t")
    assert row["expert"] == row["task"] == tiny.TOPIC and float(row["value"]) == 100 * rows[0]["value"]
    assert "Wilson" in printed.err
    objects = elm.evaluate(world.base, world.topic, [tiny.TOPIC], data=world.data, max_rows=ROWS,
                           settings=EvaluationSettings(source_length=64), mesh=tiny.one_device())
    with pytest.raises(InputError, match=r"scored in another way(.|\n)*their sum(.|\n)*another folder"):
        elm.evaluate_folders(dataclasses.replace(config, choice_score="mean"))
    told = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [{**row, "seconds": 0} for row in told] == [{**row, "seconds": 0} for row in rows]
    assert [{**row, "seconds": 0, "model": told[0]["model"]} for row in objects] == [
        {**row, "seconds": 0} for row in rows]


def test_a_call_prints_its_own_rows_and_scores_by_what_is_asked(world, tmp_path, capsys):
    other = {"schema_version": 3, "expert": "of-another-call", "task": "t", "split": "validation",
             "metric": "accuracy", "value": 1.0, "settings": "x", "interval": "wilson", "num_instances": 1,
             "ci95_low": 0.2, "ci95_high": 1.0, "dataset": "t", "chance": 0.5}
    (tmp_path / "two.jsonl").write_text(json.dumps(other) + "\n")
    command = ["evaluate", "--base", world.base.path, "--output", str(tmp_path / "two.jsonl"), "--max_rows",
               str(ROWS), "--source_length", "64", "--mesh_data", "1", "--module", *tiny.MODULES,
               "--prepared", str(world.folder / "prepared"), "--task", tiny.TOPIC]
    for words, metrics in (([], 1), (["--metric", "acc_norm"], 2), ([], 2)):
        assert main.main([*command, *words]) == 0
        printed = capsys.readouterr().out
        assert "another-call" not in printed and printed.count(tiny.TOPIC) == metrics
    rows = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["metric"] for row in rows[1:]] == ["accuracy", "acc_norm"]  # each once
    assert main.main([*command, "--metric", "squad_f1"]) == 2
    assert "fits none of the tasks" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value", "message"), [
    ("tasks", 1, "EvaluateConfig.tasks"), ("tasks", (), "An evaluation needs a task"),
    ("max_rows", 0, "max_rows"), ("source_length", 0, "source_length"), ("few_shot", -1, "few_shot"),
    ("stack_experts", 0, "stack_experts"), ("mixed", "yes", "True or False")])
def test_a_wrong_field_is_refused_before_anything_is_read(field, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(elm.EvaluateConfig("base", ("task",), "results.jsonl"), **{field: value})
