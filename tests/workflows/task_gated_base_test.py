"""A base whose gates read tasks: training on a mixture, scoring and generating by the ordinary verbs."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_study as tiny
import weights

import elm_jax as elm
from elm_jax.cli.main import main
from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.evaluation.target_loss import target_loss
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.models import families
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import TASK_TABLE
from elm_jax.runtime import trees
from elm_jax.workflows.evaluate.evaluate_mixed import evaluate_mixed
from elm_jax.workflows.evaluate.evaluate_models import evaluate
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_expert import make_stream, tasks_of

TASKS = (tiny.TOPIC, tiny.REVIEW)
SECTION = "mini_topic__which_section"
SPARSE = SparseConfig(4, 2, capacity_factor=None, step=1, gate="both", tasks=TASKS, task_dim=6)
SETTINGS = EvaluationSettings(source_length=48, max_new_tokens=4)
WORDS = ["--module", *tiny.MODULES, "--batch_size", "4", "--steps", "3", "--learning_rate", "1e-2",
         "--source_length", "64", "--target_length", "16", "--gin.MESH_DATA=1",
         "--gin.train.tensorboard=False", "--gin.train.log_period=1", "--gin.MAX_EXAMPLES=40"]


def save(world, folder, table=None, **settings):
    """A base of random parameters in the tiny vocabulary; of equal ones, but for the table of tasks."""
    whole = dataclasses.replace(tiny.NETWORK, sparse=SPARSE)
    params = trees.flatten(weights.drawn(families.network_of(whole)))
    config = dataclasses.replace(whole, sparse=dataclasses.replace(SPARSE, **settings))
    params[TASK_TABLE] = 4 * (params[TASK_TABLE] if table is None else params[TASK_TABLE][table])
    wanted = trees.flatten(families.network_of(config).abstract_params())
    save_base(folder, trees.unflatten({path: params[path] for path in wanted}), config,
              world.base.vocabulary_path, {})
    return load_base(folder)


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    return save(world, tmp_path_factory.mktemp("tasks") / "base")


def scores_of(world, base, task, expert=None):
    data = tiny.make_data(base, world.folder)
    return {row["metric"]: row["value"] for row in evaluate(
        base, expert, [task], data=data, settings=SETTINGS, mesh=tiny.one_device(), max_rows=30)}


def test_the_task_of_scored_rows_is_their_own(world, base, tmp_path):
    """Scores are those of a base that knows this task alone, and not of one with the other's vector."""
    alone = save(world, tmp_path / "alone", [1], tasks=(tiny.REVIEW,))
    other = save(world, tmp_path / "other", [0], tasks=(tiny.REVIEW,))
    split = tiny.make_data(base, world.folder).split(tiny.REVIEW, "validation", 30)
    found, wanted, wrong = (target_loss(*resolve(each, None), split, SETTINGS, tiny.one_device()).loss
                            for each in (base, alone, other))
    assert found == pytest.approx(wanted, rel=1e-6) and abs(found - wrong) > 1e-3
    assert scores_of(world, base, tiny.REVIEW) == scores_of(world, alone, tiny.REVIEW)
    with pytest.raises(InputError, match=rf"Unknown task(?s:.*){SECTION}(?s:.*)nearest: {tiny.TOPIC}(?s:.*)"
                       rf"elm tasks embed --base DIR --output DIR {SECTION}"):
        scores_of(world, base, SECTION)
    sets = save(world, tmp_path / "sets", tasks=("mini_topic", "mini_review"))
    assert scores_of(world, sets, SECTION)
    assert scores_of(world, sets, tiny.REVIEW) == scores_of(world, base, tiny.REVIEW)


def test_free_texts_need_a_task(world, base, tmp_path, capsys):
    with pytest.raises(InputError, match=r"read the task of a text(?s:.*)--gate_task NAME"):
        elm.generate(base, None, ["A dog runs."], max_new_tokens=3)
    with pytest.raises(InputError, match=r"mini_topic__about_wat(?s:.*)nearest(?s:.*)elm tasks embed"):
        elm.generate(base, None, ["A dog runs."], task="mini_topic__about_wat", max_new_tokens=3)
    texts = ["A dog runs.", "The match was lost.", "It rains."]
    by_task = [elm.generate(base, None, texts, task=task, max_new_tokens=6) for task in TASKS]
    assert by_task[0] != by_task[1]
    alone = save(world, tmp_path / "alone", [1], tasks=(tiny.REVIEW,))
    assert by_task[1] == elm.generate(alone, None, texts, task=tiny.REVIEW, max_new_tokens=6)
    words = ["generate", "--base", base.path, "--max_new_tokens", "6", "--json", "--module", *tiny.MODULES]
    assert main([*words, "--gate_task", tiny.REVIEW, *texts]) == 0
    assert [row["text"] for row in json.loads(capsys.readouterr().out)["answers"]] == by_task[1]
    assert main([*words, "--task", tiny.REVIEW, "--rows", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["answers"]
    assert main([*words, "--task", tiny.REVIEW, "--gate_task", tiny.TOPIC, "--rows", "2"]) == 0
    assert [row["text"] for row in rows] != [row["text"] for row in json.loads(
        capsys.readouterr().out)["answers"]]
    assert main([*words, "A text."]) == 2
    assert "--gate_task" in capsys.readouterr().err
    assert main(["generate", "--base", world.base.path, "--gate_task", tiny.TOPIC, "--json", "A text."]) == 2
    assert "no tasks" in capsys.readouterr().err


def test_streams_of_a_mixture_name_each_example_s_task(world, base, tmp_path):
    config = tiny.train_config(base, tmp_path / "x", task=",".join(reversed(TASKS)), kind="multitask",
                               adapter_bottleneck=None, max_examples=None)
    data, form = tiny.make_data(base, world.folder), form_of(families.network_of(base.config))
    stream, _ = make_stream(config, data, tasks_of(config, data), form)
    reviews = len(data.split(tiny.REVIEW, "train"))
    batch, places = stream.batch(0), stream.examples(0)
    found = [batch["encoder_task_ids"][row][batch["encoder_segment_ids"][row] == segment + 1]
             for row in range(4) for segment in range(batch["encoder_segment_ids"][row].max())]
    assert len(found) == len(places) and {len(set(own)) for own in found} == {1}
    assert [own[0] for own in found] == [int(index < reviews) for _, index in places]
    unknown = dataclasses.replace(config, task=SECTION)
    with pytest.raises(InputError, match=rf"{SECTION}(?s:.*)elm tasks embed"):
        make_stream(unknown, data, tasks_of(unknown, data), form)


def test_passages_are_of_no_task():
    def config(**settings):
        network = dataclasses.replace(tiny.NETWORK, sparse=dataclasses.replace(SPARSE, **settings))
        return PretrainConfig("x", network, ("elm_jax.tasks.embedded:passages",))

    assert config().network.sparse.gate == "both"
    with pytest.raises(InputError, match=r"reads the task alone(?s:.*)elm tasks embed"):
        config(gate="task")
    with pytest.raises(InputError, match=r"no effect(?s:.*)no task(?s:.*)2 tasks"):
        config(gate="token", task_dim=None)


@pytest.mark.slow
def test_the_story_of_a_mixture_by_the_verbs(world, base, tmp_path, capsys):
    """Train on two tasks (the vectors of both and W_t change), evaluate, generate."""
    words = ["train", "--kind", "multitask", "--task", ",".join(TASKS), "--base", base.path, "--prepared",
             str(world.folder / "prepared"), "--gin.train.expert_id='both'",
             "--gin.LossConfig.balance_loss=0.01", *WORDS]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) and row["balance_loss"] > 0 for row in rows if "loss" in row)
    expert = load_expert(tmp_path / "run" / "expert")
    assert expert.card.network["sparse"]["tasks"] == list(TASKS)
    params, before = (trees.flatten(tree) for tree in (resolve(base, expert)[1], base.params))
    assert (np.abs(params[TASK_TABLE] - before[TASK_TABLE]).max(axis=1) > 0).all()
    assert all(np.any(params[path] != leaf) for path, leaf in before.items() if "task_weights" in path)
    output = tmp_path / "results" / "results.jsonl"
    assert main(["evaluate", "--base", base.path, "--expert", str(tmp_path / "run" / "expert"),
                 "--task", TASKS[0], "--task", TASKS[1], "--max_rows", "6", "--output", str(output),
                 "--source_length", "48",
                 "--prepared", str(world.folder / "prepared"), "--module", *tiny.MODULES]) == 0
    assert {json.loads(line)["task"] for line in output.read_text().splitlines()} == set(TASKS)
    capsys.readouterr()
    assert main(["generate", "--expert", str(tmp_path / "run" / "expert"), "--task", TASKS[0], "--json",
                 "--max_new_tokens", "4", "--module", *tiny.MODULES]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 3
    assert main([*words[:4], f"{TASKS[0]},{SECTION}", *words[5:], "--output", str(tmp_path / "no")]) == 2
    assert f"elm tasks embed --base DIR --output DIR {SECTION}" in capsys.readouterr().err


@pytest.mark.slow
def test_experts_of_adapters_stack_and_mix_by_their_tasks(world, base, tmp_path):
    stack = [tiny.make_expert(base, tmp_path / name, task=task, expert_id=name, optimizer=dataclasses.replace(
        tiny.OPTIMIZER, learning_rate=0.3)) for name, task in zip(("topic", "review"), TASKS, strict=True)]
    alone = [[scores_of(world, base, task, expert) for task in TASKS] for expert in stack]
    output = tmp_path / "results" / "results.jsonl"
    words = ["evaluate", "--base", base.path, "--task", TASKS[0], "--task", TASKS[1], "--max_rows", "30",
             "--output", str(output), "--source_length", "48", "--max_new_tokens", "4",
             "--stack_experts", "2", "--prepared", str(world.folder / "prepared"), "--mesh_data", "1",
             "--module", *tiny.MODULES]
    for name in ("topic", "review"):
        words += ["--expert", str(tmp_path / name / "expert")]
    assert main(words) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for number, name in enumerate(("topic", "review")):
        for task, wanted in zip(TASKS, alone[number], strict=True):
            assert {row["metric"]: row["value"] for row in rows
                    if (row["expert"], row["task"]) == (name, task)} == wanted
    data = tiny.make_data(base, world.folder)
    split = data.split(TASKS[1], "validation", 30)
    assignment = {TASKS[1]: {split.text(row)["index"]: "topic" for row in range(len(split))}}
    mixed = evaluate_mixed(base, stack, [TASKS[1]], assignment=assignment, data=data, settings=SETTINGS,
                           mesh=tiny.one_device(), max_rows=30)
    assert {row["metric"]: row["value"] for row in mixed} == alone[0][1]
