"""Exemplars, keys, queries and limits of evaluations as the workflows draw them."""

import json

import pytest
import tiny_study as tiny

from elm_jax.cli import main
from elm_jax.data.preparing.prepare import prepare
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings
from elm_jax.routing.text import RoutingInstance
from elm_jax.workflows import build_library
from elm_jax.workflows.route import RouteConfig, draw_instances, drawn_instances, task_instances


def few_shot_data(world, count: int, length: int = 64) -> TaskData:
    return TaskData(world.base.vocabulary, tiny.MODULES,
                    str(world.folder / "prepared"), few_shot=count, few_shot_length=length)


def test_few_shot_splits_are_made_of_the_plain_arrays(world):
    plain = world.data.split(tiny.TOPIC, "validation")
    made = few_shot_data(world, 2, 200).split(tiny.TOPIC, "validation")
    train = world.data.split(tiny.TOPIC, "train")
    known = {f"{train.text(row)['inputs']}\n{train.text(row)['targets']}" for row in range(len(train))}
    for row in range(5):
        text = made.text(row)["inputs"]
        assert text.endswith(plain.text(row)["inputs"]) and text != plain.text(row)["inputs"]
        assert text.split("\n\n")[0] in known
    again = tiny.make_data(world.base, world.folder).split(tiny.TOPIC, "validation")
    assert again.text(0) == plain.text(0)  # what lies on disk is without exemplars


def test_an_expert_trained_with_exemplars(world, tmp_path):
    expert = tiny.make_expert(world.base, tmp_path / "x", few_shot=1,
                              prepared_dir=str(world.folder / "prepared"))
    assert expert.card.training["few_shot"] == 1
    assert expert.card.training["config_digest"] != world.topic.card.training["config_digest"]
    assert "few_shot" not in world.topic.card.training
    with pytest.raises(InputError, match="few_shot"):
        tiny.train_config(world.base, tmp_path / "y", few_shot=-1)


def test_tasks_without_train_rows_have_other_rows_of_their_own_for_exemplars(world):
    made = few_shot_data(world, 2, 2000).split("mini_note__sum_up", "validation", 20)
    plain = few_shot_data(world, 0).split("mini_note__sum_up", "validation")
    inputs_of = {plain.text(row)["index"]: plain.text(row)["inputs"] for row in range(len(plain))}
    answers = {f"{plain.text(row)['inputs']}\n{plain.text(row)['targets']}": plain.text(row)["index"]
               for row in range(len(plain))}
    for row in range(20):
        text = made.text(row)
        shots = text["inputs"].removesuffix(inputs_of[text["index"]]).split("\n\n")[:-1]
        assert len(shots) == 2 and text["index"] not in {answers[shot] for shot in shots}


def test_few_shot_results_are_results_of_their_own(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--base", world.base.path, "--task", tiny.TOPIC, "--output", "results/results.jsonl",
             "--module", "elm_jax.tasks.embedded", "--prepared", str(world.folder / "prepared"),
             "--max_rows", "8", "--mesh_data", "1"]
    assert main.main(words) == 0 and main.main([*words, "--few_shot", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results" / "results.jsonl").read_text().splitlines()]
    assert len({row["settings"] for row in rows}) == 2
    assert EvaluationSettings().digest(8) == rows[0]["settings"] == EvaluationSettings(few_shot=0).digest(8)


def test_queries_from_a_train_split_are_no_keys(world):
    keys = {row["source"] for row in world.library.instances}
    train = world.data.split(tiny.TOPIC, "train")
    assert len(keys & {train.text(row)["inputs"] for row in range(len(train))}) >= 30
    for folder in (None, str(world.folder / "prepared")):
        config = RouteConfig("lib", task=tiny.TOPIC, split="train", num_queries=10_000,
                             modules=tiny.MODULES, prepared_dir=folder)
        found = task_instances(config, keys)
        assert 0 < len(found) < len(train) and not keys & {instance.source for instance in found}
        config = RouteConfig("lib", task=tiny.TOPIC, modules=tiny.MODULES)
        assert len(task_instances(config)) == 32 and task_instances(config, keys) == task_instances(config)


@pytest.fixture
def half(monkeypatch):
    """A task whose template skips every other of its 400 rows; and the rows that were read, as they come."""
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    template = PromptTemplate("Half", "{% if number % 2 %}row {{number}} ||| {{number}}{% endif %}", None)
    seen = []
    name = registry.add_prompted_task(
        "halves", None, template, kind="generation", role="train", adapt=lambda row: seen.append(row) or row,
        rows=lambda split: [{"number": number} for number in range(400)])
    return registry.get_task(name), seen


def test_drawing_renders_only_what_is_drawn_and_arrays_give_the_same(world, half):
    task, seen = half
    drawn = drawn_instances(task, "train", 8, 3)
    assert len(set(drawn)) == 8 and len(seen) < 40
    keys = {drawn[0].source, drawn[5].source}
    free = drawn_instances(task, "train", 6, 3, keys)
    assert free == [instance for instance in drawn if instance.source not in keys]
    assert drawn_instances(task, "validation", 8, 3, keys) == drawn, "only train splits hold keys"
    prepared = prepare(task.name, "train", world.base.vocabulary)
    assert len(prepared) == prepared.info["num_source"] / 2 == 200
    assert draw_instances(prepared, 8, 3) == drawn and draw_instances(prepared, 6, 3, keys) == free
    every = draw_instances(prepared, 1000, 3)
    assert every == drawn_instances(task, "train", 1000, 3) and len(set(every)) == 200
    part = prepared.subset(20)
    own = {RoutingInstance(part.text(row)["inputs"]) for row in range(20)}
    assert set(draw_instances(part, 1000, 3)) == own


def test_keys_without_kept_arrays_are_those_of_arrays(world, monkeypatch):
    from elm_jax.data.preparing import task_data

    bare = TaskData(world.base.vocabulary, tiny.MODULES)
    expected = build_library.training_instances(world.folder / "dataset", world.data, 11, 0)
    monkeypatch.delattr(task_data, "prepare")  # nothing is prepared for them
    assert build_library.training_instances(world.folder / "dataset", bare, 11, 0) == expected


def test_mixtures_say_how_many_rows_are_scored(world):
    registry.import_tasks(["elm_jax.tasks"])
    data = TaskData(world.base.vocabulary, modules=("elm_jax.tasks",))
    assert data.evaluation_rows(["t0_seen", "generative"]) == 300
    assert data.evaluation_rows(["t0_unseen", "ag_news__classify"]) is None
    with pytest.raises(InputError, match=r"(?s)unlike numbers.*t0_seen: 300, t0_unseen: all.*max_rows"):
        data.evaluation_rows(["t0_seen", "t0_unseen"])
