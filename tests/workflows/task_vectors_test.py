"""Vectors of tasks: first tables, rows made of known ones, and that nothing else of a base changes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_study as tiny
import weights

from elm_jax.cli.main import main
from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import resolve
from elm_jax.models import families
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import TASK_TABLE
from elm_jax.runtime import trees
from elm_jax.workflows.task_vectors import TaskVectorConfig, embed_tasks

SECTION, SUM_UP = "mini_topic__which_section", "mini_note__sum_up"
KNOWN = (tiny.TOPIC, tiny.REVIEW, SUM_UP)
SPARSE = SparseConfig(4, 2, capacity_factor=None, step=1)


def save(world, folder, **settings):
    """A sparse base of random parameters in the tiny vocabulary."""
    config = dataclasses.replace(tiny.NETWORK, sparse=dataclasses.replace(SPARSE, **settings))
    params = weights.drawn(families.network_of(config))
    save_base(folder, params, config, world.base.vocabulary_path, {})
    return folder


@pytest.fixture(scope="module")
def bases(world, tmp_path_factory):
    """Folders of a base whose gates read tokens, and of one whose gates read both."""
    folder = tmp_path_factory.mktemp("bases")
    return {"token": save(world, folder / "token"),
            "both": save(world, folder / "both", gate="both", tasks=KNOWN, task_dim=6)}


def embed(base, output, *tasks, **settings):
    report = embed_tasks(TaskVectorConfig(base, output, tasks, modules=tiny.MODULES, **settings))
    return load_base(output), report


def table_of(base):
    return np.asarray(base.params["task_embedder"]["embedding"])


def loss_of(base, *tasks):
    """Sum of the losses of made-up examples, one of each task by its number."""
    network = families.network_of(base.config)
    draw = np.random.default_rng(5)
    examples = [tuple(np.append(draw.integers(3, 900, size), 1) for size in (9, 4)) for _ in tasks]
    batch = form_of(network).make(examples, tiny.LENGTHS, len(tasks), tasks)
    return float(jax.jit(network.loss)(base.params, batch).loss)


@pytest.mark.parametrize("made_of", [None, "text"])
def test_a_first_table_changes_no_output(bases, tmp_path, made_of):
    before = load_base(bases["token"])
    after, report = embed(bases["token"], tmp_path / "new", "mini_topic", tiny.REVIEW, made_of=made_of,
                          task_dim=5, encoder=None if made_of is None else "tfidf")
    assert after.config.sparse == dataclasses.replace(
        SPARSE, gate="both", tasks=(SECTION, tiny.TOPIC, tiny.REVIEW), task_dim=5)
    assert (report["gate"], report["num_tasks"], report["made_of"]) == ("both", 3, made_of or "random")
    assert loss_of(before, 0, 1, 2) == loss_of(after, 0, 1, 2)
    flat, own = trees.flatten(before.params), trees.flatten(after.params)
    assert all(np.array_equal(leaf, own[path]) for path, leaf in flat.items())
    new = set(own) - set(flat)
    assert TASK_TABLE in new and len(new) == 3 and not any(np.any(own[path]) for path in new - {TASK_TABLE})
    section, topic, review = table_of(after)
    assert np.std(table_of(after)) > 0.3
    if made_of == "text":  # two templates of one data set begin nearer each other
        assert np.linalg.norm(topic - section) < np.linalg.norm(topic - review)


def test_new_rows_are_weighted_means_and_all_else_stays(bases, tmp_path):
    base = load_base(bases["both"])
    mean, report = embed(bases["both"], tmp_path / "mean", SECTION)
    assert mean.config.sparse.tasks == (*KNOWN, SECTION) and report["made_of"] == "mean"
    np.testing.assert_array_equal(table_of(mean)[:3], table_of(base))
    np.testing.assert_allclose(table_of(mean)[3], table_of(base).mean(axis=0), rtol=1e-6, atol=1e-6)
    flat = trees.flatten(mean.params)
    assert all(np.array_equal(leaf, flat[path]) for path, leaf in trees.flatten(base.params).items()
               if path != TASK_TABLE)
    copied, report = embed(bases["both"], tmp_path / "copied", SECTION,
                           made_of=f"{tiny.REVIEW}=3,{SUM_UP}=1")
    assert report["tasks"] == {SECTION: {tiny.REVIEW: 0.75, SUM_UP: 0.25}}
    np.testing.assert_allclose(table_of(copied)[3], 0.75 * table_of(base)[1] + 0.25 * table_of(base)[2],
                               rtol=1e-5, atol=1e-6)
    alone, _ = embed(bases["both"], tmp_path / "alone", SECTION, made_of=f"{tiny.REVIEW}=2")
    assert loss_of(alone, 3, 0) == loss_of(base, 1, 0) != loss_of(base, 0, 0)


def test_texts_weigh_tasks_by_their_likeness(bases, tmp_path):
    _, report = embed(bases["both"], tmp_path / "text", SECTION, made_of="text", encoder="tfidf")
    found = report["tasks"][SECTION]
    assert max(found, key=found.get) == tiny.TOPIC and sum(found.values()) == pytest.approx(1)
    _, sharp = embed(bases["both"], tmp_path / "sharp", SECTION, made_of="text", encoder="tfidf",
                     temperature=1e-3)
    assert sharp["tasks"][SECTION][tiny.TOPIC] == pytest.approx(1, abs=1e-6)
    ratio = np.log(found[tiny.TOPIC] / found[tiny.REVIEW])  # of cosines, over a temperature of 0.1
    _, flat = embed(bases["both"], tmp_path / "flat", SECTION, made_of="text", encoder="tfidf",
                    temperature=1.0)
    weights = flat["tasks"][SECTION]
    assert np.log(weights[tiny.TOPIC] / weights[tiny.REVIEW]) == pytest.approx(ratio / 10, rel=1e-6)


def test_votes_of_a_library_weigh_the_tasks_of_its_experts(world, bases, tmp_path, capsys):
    assert main(["route", "--library", str(world.folder / "library"), "--task", SECTION, "--router", "vote",
                 "--json", "--module", *tiny.MODULES]) == 0
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    votes = {line["expert"]: line["votes"] for line in ranking}
    _, report = embed(bases["both"], tmp_path / "votes", SECTION, made_of="votes",
                      library=world.folder / "library")
    found, total = report["tasks"][SECTION], sum(votes.values())
    assert found.get(tiny.TOPIC, 0) == pytest.approx(votes[tiny.TOPIC] / total) and found[tiny.TOPIC] > 0.5
    assert found.get(tiny.REVIEW, 0) == pytest.approx(votes.get(tiny.REVIEW, 0) / total)
    folder = save(world, tmp_path / "strange", gate="task", tasks=(SUM_UP,), task_dim=2)
    with pytest.raises(InputError, match=r"votes for no expert of a known task(?s:.*)--from mean"):
        embed(folder, tmp_path / "x", SECTION, made_of="votes", library=world.folder / "library")


def test_a_data_set_may_have_one_row_for_all_its_tasks(bases, tmp_path):
    made, report = embed(bases["token"], tmp_path / "sets", "mini_topic", tiny.REVIEW, per="dataset")
    assert made.config.sparse.tasks == ("mini_topic", "mini_review") == tuple(report["tasks"])
    more, _ = embed(tmp_path / "sets", tmp_path / "own", SECTION, made_of="mini_topic=1")
    assert more.config.sparse.tasks[-1] == SECTION
    np.testing.assert_array_equal(table_of(more)[2], table_of(more)[0])


def test_the_vector_alone_trains_and_other_rows_stay(world, bases, tmp_path):
    embed(bases["both"], tmp_path / "new", SECTION)
    start = load_base(tmp_path / "new")
    expert = tiny.make_expert(start, tmp_path / "run", task=SECTION, kind="dataset", adapter_bottleneck=None,
                              freeze="all but task vectors")
    _, params = resolve(start, expert)
    flat = trees.flatten(params)
    assert {path for path, leaf in trees.flatten(start.params).items()
            if not np.array_equal(leaf, flat[path])} == {TASK_TABLE}
    before, after = table_of(start), params["task_embedder"]["embedding"]
    np.testing.assert_array_equal(before[:3], after[:3])
    assert not np.array_equal(before[3], after[3])
    # A full expert is the base that it would make.
    again, _ = embed(tmp_path / "run", tmp_path / "again", "mini_review", per="dataset")
    np.testing.assert_array_equal(table_of(again)[:4], after)


@pytest.mark.parametrize(("settings", "message"), [
    ({"tasks": (tiny.TOPIC,)}, r"have a vector already(?s:.*)mini_topic__about_what"),
    ({"tasks": ("mini_topic__witch_section",)}, r"__witch_section(?s:.*)nearest: mini_topic__which"),
    ({"made_of": "random"}, r"trained on other vectors than random ones"),
    ({"made_of": "mini_topic__about_wat=1"}, r"mini_topic__about_wat(?s:.*)nearest: mini_topic__about_what"),
    ({"made_of": f"{tiny.TOPIC}=-1"}, r"no number above 0"),
    ({"made_of": "meen"}, r"Unknown way(?s:.*)mean(?s:.*)TASK=WEIGHT"),
    ({"made_of": "votes"}, r"give --library DIR"),
    ({"temperature": 1.0}, r"no effect(?s:.*)--temperature(?s:.*)--from text"),
    ({"task_dim": 4}, r"no effect(?s:.*)--task_dim"),
    ({"tasks": ()}, "No task is named"),
])
def test_what_is_wrong_is_said_before_anything_is_written(bases, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        embed(bases["both"], tmp_path / "x", *settings.get("tasks", (SECTION,)),
              **{name: value for name, value in settings.items() if name != "tasks"})
    assert not (tmp_path / "x").exists()


def test_other_bases_are_refused(world, bases, tmp_path):
    with pytest.raises(InputError, match=r"dense(?s:.*)elm upcycle"):
        embed(world.base.path, tmp_path / "x", SECTION)
    with pytest.raises(InputError, match=r"no known tasks to weigh"):
        embed(bases["token"], tmp_path / "x", SECTION, made_of="mean")
    with pytest.raises(InputError, match=r"An expert of adapters(?s:.*)full expert"):
        embed(world.topic.path, tmp_path / "x", SECTION)


def test_the_verb_says_what_vectors_are_made_of(bases, tmp_path, capsys):
    words = ["tasks", "embed", "--base", str(bases["both"]), "--output", str(tmp_path / "new"), "--from",
             f"{tiny.REVIEW}=1,{tiny.TOPIC}=3", "--module", *tiny.MODULES]
    assert main([*words, SECTION]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{SECTION}: 0.75 {tiny.TOPIC}, 0.25 {tiny.REVIEW}"
    assert out[1:] == ["4 tasks; gate: both", str(tmp_path / "new")]
