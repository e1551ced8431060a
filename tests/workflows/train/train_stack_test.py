"""`elm train` with a table: every expert is its solo run's, finished ones stay, faults are named."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_study as tiny

from elm_jax.cli import main
from elm_jax.errors import InputError, RunError
from elm_jax.experts.overlay import load_expert
from elm_jax.runtime import sharding, storage, trees
from elm_jax.training.early_end import EarlyEnd
from elm_jax.workflows.train.stack_table import Row, rows_of_table
from elm_jax.workflows.train.train_expert import train
from elm_jax.workflows.train.train_stack import (
    StackSize,
    TrainStackConfig,
    config_of,
    train_experts,
    train_stack,
)

OTHER = "mini_topic__which_section"


def shared(world, folder, **changes):
    return tiny.train_config(world.base, folder, task="", prepared_dir=str(world.folder / "prepared"),
                             log_period=1, **changes)


def table(tmp_path, rows: list[dict]) -> str:
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(world, config: TrainStackConfig):
    return train_stack(config, base=world.base, data=world.data, mesh=sharding.make_mesh(1, 1, 1))


ROWS = [{"task": tiny.TOPIC, "train_steps": 3}, {"task": tiny.REVIEW, "learning_rate": 1e-3, "seed": 4},
        {"task": OTHER, "expert_id": "third", "train_steps": 5}]


@pytest.fixture(scope="module")
def stack(world, tmp_path_factory):
    """(folder, outcome) of three experts in two slots."""
    folder = tmp_path_factory.mktemp("stack")
    config = TrainStackConfig(shared(world, folder / "runs"), table(folder, ROWS), stack_experts=2)
    return folder, config, run(world, config)


def rows_in(folder) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "tokens_per_second"}
            for row in storage.read_jsonl(folder / "metrics.jsonl")]


def test_each_expert_is_that_of_its_solo_run(world, stack, tmp_path):
    folder, config, outcome = stack
    assert list(outcome.done) == [tiny.TOPIC, tiny.REVIEW, "third"] and not outcome.failed
    for row in rows_of_table(config.table)[1:]:
        own = dataclasses.replace(config_of(config.train, row), model_dir=str(tmp_path / row.id))
        alone = train(own, base=world.base, data=world.data, mesh=tiny.one_device()).expert
        found = load_expert(outcome.done[row.id])
        left, right = ({name: value for name, value in dataclasses.asdict(one.card).items()
                        if name not in ("created", "metrics")} for one in (found, alone))
        assert left == right  # the digest of the config included
        solo, stacked = rows_in(tmp_path / row.id), rows_in(folder / "runs" / row.id)
        assert [one["step"] for one in solo] == [one["step"] for one in stacked]
        for one, other in zip(solo, stacked, strict=True):
            np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=2e-5)
        for path, leaf in trees.flatten(alone.overlay).items():
            np.testing.assert_allclose(trees.flatten(found.overlay)[path], leaf, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_one_at_a_time_each_expert_is_that_of_its_solo_run_to_the_bit(world, tmp_path):
    config = TrainStackConfig(shared(world, tmp_path / "runs", dropout_rate=0.1), table(tmp_path, ROWS[1:]),
                              stack_experts=2, at_once=1)
    outcome = run(world, config)
    for row in rows_of_table(config.table):
        own = dataclasses.replace(config_of(config.train, row), model_dir=str(tmp_path / "alone" / row.id))
        alone = train(own, base=world.base, data=world.data, mesh=tiny.one_device()).expert
        found = load_expert(outcome.done[row.id])
        assert trees.fingerprint(found.overlay) == trees.fingerprint(alone.overlay)


def test_finished_experts_are_skipped_whoever_trained_them(world, stack, tmp_path):
    """A solo run finds the stack's expert, and a stack the solo run's."""
    folder, config, outcome = stack
    before = trees.fingerprint(load_expert(outcome.done["third"]).overlay)
    again = train(config_of(config.train, rows_of_table(config.table)[2]), base=world.base)
    assert trees.fingerprint(again.expert.overlay) == before and again.step == 5
    assert not (folder / "runs" / "stack").exists()
    mixed = TrainStackConfig(shared(world, tmp_path / "runs"), table(tmp_path, ROWS[:2]), stack_experts=2)
    alone = train(config_of(mixed.train, Row(**ROWS[0])), base=world.base, data=world.data,
                  mesh=tiny.one_device()).expert
    made = load_expert(run(world, mixed).done[tiny.TOPIC])
    assert made.card.created == alone.card.created
    assert set(run(world, mixed).done) == {tiny.TOPIC, tiny.REVIEW}  # nothing is left to do


def test_a_finished_expert_of_another_config_is_refused(world, stack):
    _, config, _ = stack
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, dropout_rate=0.2))
    with pytest.raises(InputError, match=r"(?s)of other settings.*dropout_rate: \S+ there, 0.2 here"):
        run(world, other)


def test_an_expert_that_fails_is_named_and_marked_and_the_others_are_done(world, tmp_path):
    rows = [{**ROWS[0], "learning_rate": 1e30, "expert_id": "wild", "train_steps": 6}, ROWS[1]]
    config = TrainStackConfig(shared(world, tmp_path / "runs"), table(tmp_path, rows), stack_experts=2)
    outcome = run(world, config)
    assert list(outcome.done) == [tiny.REVIEW] and "left the finite numbers" in outcome.failed["wild"]
    with pytest.raises(RunError, match=r"1 of 2 experts failed[\s\S]*wild: Training left"):
        outcome.check()
    mark = json.loads((tmp_path / "runs" / "wild" / "failed.json").read_text())
    assert mark["message"] == outcome.failed["wild"]
    again = run(world, config)  # the same config would fail at the same step: it is not tried again
    assert again.failed == outcome.failed and list(again.done) == [tiny.REVIEW]
    calm = dataclasses.replace(config, table=table(tmp_path, [{**rows[0], "learning_rate": 1e-3}, rows[1]]))
    assert set(run(world, calm).done) == {"wild", tiny.REVIEW}


@pytest.mark.slow
def test_early_end_is_the_same_alone_and_in_a_stack(world, tmp_path):
    rule = EarlyEnd(every=2, patience=1, rows=8)
    config = shared(world, tmp_path / "runs", early_end=rule)
    rows = [Row(tiny.TOPIC, train_steps=6), Row(tiny.REVIEW, train_steps=4)]
    outcome = train_experts([config_of(config, row) for row in rows], config.model_dir, StackSize(2),
                            base=world.base, data=world.data, mesh=sharding.make_mesh(1, 1, 1))
    own = dataclasses.replace(config_of(config, rows[0]), model_dir=str(tmp_path / "alone"))
    alone = train(own, base=world.base, data=world.data, mesh=tiny.one_device()).expert
    found = load_expert(outcome.done[tiny.TOPIC])
    assert alone.card.training == found.card.training and "ended_at" in alone.card.training
    assert alone.card.training["config_digest"] != dataclasses.replace(own, early_end=None).digest()
    np.testing.assert_allclose(alone.card.metrics["validation_loss"],
                               found.card.metrics["validation_loss"], rtol=1e-5)


def test_digests_of_runs_without_an_early_end_are_as_they_were(world):
    """Experts of earlier versions are still found finished."""
    config = tiny.train_config(world.base, world.folder / "topic")
    assert load_expert(world.folder / "topic").card.training["config_digest"] == config.digest()
    facts = dataclasses.asdict(config)
    assert facts["early_end"] is None


def test_a_csv_table_says_the_same(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("task,expert_id,learning_rate,train_steps,epochs,seed\n"
                    "a__b,,1e-3,40,,\na__c,mine,,,1.5,7\n")
    assert rows_of_table(path) == [Row("a__b", learning_rate=1e-3, train_steps=40),
                                   Row("a__c", "mine", epochs=1.5, seed=7)]
    assert rows_of_table(path)[1].id == "mine"


@pytest.mark.parametrize(("name", "text", "words"), [
    ("t.jsonl", '{"task": "a"}\n{"taks": "b"}\n', r"column 'taks'[\s\S]*line 2[\s\S]*task"),
    ("t.jsonl", '{"task": "a", "seed": 1.5}\n', r"wrong kind[\s\S]*line 1, seed[\s\S]*whole number"),
    ("t.jsonl", '{"expert_id": "x"}\n', "names no task"),
    ("t.jsonl", '{"task": "a", "expert_id": "../x"}\n', "expert_id must be the name of a file"),
    ("t.csv", "task,expert_id\na,../x\n", "expert_id must be the name of a file"),
    ("t.jsonl", '{"task": "a", "train_steps": 3, "epochs": 2}\n', "length of training once"),
    ("t.jsonl", "nonsense\n", r"not valid JSON[\s\S]*line 1"),
    ("t.jsonl", "", "is empty"),
    ("t.csv", "task,seed\na,x\n", r"wrong kind[\s\S]*line 2, seed"),
    ("t.csv", "task,seed\na\n", "as many cells"),
    ("t.txt", "a\n", "jsonl or .csv"),
])
def test_faults_of_a_table_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        rows_of_table(tmp_path / name)


def test_ids_must_differ_and_be_names(world, tmp_path):
    config = shared(world, tmp_path / "runs")
    for rows, words in (([Row(tiny.TOPIC), Row(tiny.TOPIC)], "one id"),
                        ([Row(f"{tiny.TOPIC},{tiny.REVIEW}")], "becomes a folder's name"),
                        ([Row(tiny.TOPIC, "stack")], "stack's checkpoints")):
        with pytest.raises(InputError, match=words):
            train_experts([config_of(config, row) for row in rows], config.model_dir, StackSize(2),
                          base=world.base, data=world.data, mesh=tiny.one_device())
    with pytest.raises(InputError, match="Neither tasks nor a table"):
        TrainStackConfig(config)


@pytest.mark.slow  # of the command and of mixtures there are others each
def test_the_command_trains_a_mixture_of_tasks(world, tmp_path, capsys):
    """Every task of a mixture becomes an expert; the second call finds them done."""
    words = ["train", "--gin_file", "gin/experts/prompt_stack.gin", f"--gin.MODEL_DIR='{tmp_path / 'runs'}'",
             f"--gin.INITIAL_CHECKPOINT_PATH='{world.base.path}'", "--gin.TASK='mini_topic'",
             "--gin.TASK_MODULES=('elm_jax.tasks.embedded',)", "--gin.EPOCHS=None", "--gin.TRAIN_STEPS=2",
             "--gin.BATCH_SIZE=4", "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}",
             f"--gin.PREPARED_DIR='{world.folder / 'prepared'}'", "--gin.STACK_EXPERTS=2",
             "--gin.MESH_DATA=1", "--gin.train.tensorboard=False"]
    for _ in range(2):
        assert main.main(words) == 0
        printed = capsys.readouterr().out.split()
        assert [line.split("/")[-2] for line in printed] == [OTHER, tiny.TOPIC]  # the mixture's order
    assert (tmp_path / "runs" / "config.gin").exists()
    assert load_expert(printed[0]).card.training["steps"] == 2
