"""Training through the workflow: what an expert is, and what stops a run before it starts."""

import dataclasses

import numpy as np
import pytest
import tiny_study as tiny
from t5_rows import FORM

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.runtime import trees
from elm_jax.training.early_end import EarlyEnd
from elm_jax.vocabularies.vocabulary import Vocabulary, train_vocabulary
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_expert import (
    check_same_run,
    make_stream,
    tasks_of,
    validation_batches,
    with_recipe,
)


def changed_leaves(base, params):
    flat, before = trees.flatten(params), trees.flatten(base.params)
    return {path for path in before if not np.array_equal(flat[path], before[path])}


def test_a_prompt_expert_is_its_adapters_and_norms(world):
    network, params = resolve(world.base, world.topic)
    overlay = set(trees.flatten(world.topic.overlay))
    adapters = {path for path in overlay if "_adapter/" in path}
    norms = {path for path in trees.flatten(world.base.params) if path.endswith("norm/scale")}
    assert overlay == adapters | norms and len(adapters) == 4 * 4
    assert changed_leaves(world.base, params) == norms
    assert network.config.adapter.bottleneck == 4


def test_norms_are_a_switch(world, tmp_path):
    expert = tiny.make_expert(world.base, tmp_path / "x", train_norms=False)
    assert all("_adapter/" in path for path in trees.flatten(expert.overlay))
    assert changed_leaves(world.base, resolve(world.base, expert)[1]) == set()


def test_a_dataset_expert_is_every_leaf_of_the_base(world):
    _, params = resolve(world.base, world.dataset)
    assert trees.first_difference(params, world.base.params) is None
    assert changed_leaves(world.base, params) == set(trees.flatten(world.base.params))
    assert set(world.dataset.card.tasks) == {"mini_topic__about_what", "mini_topic__which_section"}


def test_the_card_says_what_was_done(world):
    card = load_expert(world.folder / "topic").card
    assert (card.kind, card.form, card.dataset) == ("prompt", "adapter", "mini_topic")
    assert card.training["steps"] == 3 and card.training["examples"] == 600
    assert card.base["fingerprint"] == trees.fingerprint(world.base.params)
    assert card.templates == ("about what",)


def test_a_finished_run_is_not_trained_again(world):
    again = tiny.make_expert(world.base, world.folder / "topic")
    assert trees.fingerprint(again.overlay) == trees.fingerprint(world.topic.overlay)


def test_a_run_folder_of_another_config_is_refused(world):
    with pytest.raises(InputError, match=r"(?s)of other settings.*random_seed: 0 there, 1 here"):
        tiny.make_expert(world.base, world.folder / "topic", random_seed=1)


def test_changed_rows_are_told_from_changed_settings(world):
    card = world.topic.card
    config = tiny.train_config(world.base, world.folder / "topic")
    check_same_run(card, config, world.base)
    other = dataclasses.replace(card, training={**card.training, "rows": {tiny.TOPIC: "another"}})
    with pytest.raises(InputError, match=rf"(?s)of these settings, but the rows.*{tiny.TOPIC}"):
        check_same_run(other, config, world.base)
    older = {name: value for name, value in card.training.items() if name not in ("rows", "settings")}
    check_same_run(dataclasses.replace(card, training=older), config, world.base)


def test_an_unknown_task_names_the_three_nearest(world, tmp_path):
    with pytest.raises(InputError, match=r"mini_topic__about_wat.*\n.*\n?.*mini_topic__about_what"):
        tiny.make_expert(world.base, tmp_path / "x", task="mini_topic__about_wat")


def test_a_task_for_evaluation_is_not_trained_on(world, tmp_path):
    with pytest.raises(InputError, match=r"(?s)for evaluation only.*mini_note__sum_up.*unseen_extra"):
        tiny.make_expert(world.base, tmp_path / "x", task=f"{tiny.TOPIC},mini_note__sum_up")
    assert not (tmp_path / "x").exists()


def test_arrays_of_a_task_for_evaluation_are_not_trained_on_either(world, tmp_path):
    found = tiny.make_data(world.base, world.folder).split(tiny.TOPIC, "train")
    held = PreparedSplit("far_away__task", "train", {**found.info, "role": "bbh"}, found.arrays)
    held.save(tmp_path / "arrays" / "far_away__task" / "train")
    with pytest.raises(InputError, match=r"(?s)for evaluation only.*far_away__task.*role bbh"):
        tiny.make_expert(world.base, tmp_path / "x", task="far_away__task",
                         prepared_dir=str(tmp_path / "arrays"))


def test_a_task_s_recipe_takes_the_places_of_what_is_given(world):
    config = TrainConfig(model_dir="x", task="trec__trec1", initial_checkpoint_path="y", train_steps=3,
                         task_recipe=True)
    registry.import_tasks(["elm_jax.tasks"])
    found = with_recipe(config, ["trec__trec1", "trec__trec2"])
    assert (found.epochs, found.train_steps, found.batch_size) == (10, None, 16)
    assert found.task_feature_lengths == {"inputs": 256, "targets": 128} and found.max_examples == 50_000
    by_hand = TrainConfig(model_dir="x", task="trec__trec1", initial_checkpoint_path="y", epochs=10)
    assert found.digest() == by_hand.digest() != config.digest()
    for tasks, message in ((["trec__trec1", "xsum__doc_tldr"], "2 recipes"),
                           (["trec__trec1", "far_away__task"], "no recipe of far_away__task")):
        with pytest.raises(InputError, match=rf"(?s)no recipe in common.*{message}"):
            with_recipe(config, tasks)


def test_an_expert_of_another_base_is_refused(world):
    with pytest.raises(InputError, match="belongs to another base"):
        resolve(world.other_base, world.topic)


def test_prepared_arrays_of_another_vocabulary_are_refused(world):
    other = Vocabulary.load(write_vocabulary(world.folder))
    data = dataclasses.replace(tiny.make_data(world.base, world.folder), vocabulary=other)
    with pytest.raises(InputError, match="another vocabulary"):
        data.split(tiny.TOPIC, "train")


def write_vocabulary(folder):
    path = folder / "other.model"
    train_vocabulary(["another text of quite other words", "to be cut into pieces"] * 20, path, 24, seed=0)
    return path


@pytest.mark.parametrize(("changes", "words"), [
    ({"epochs": 1.0}, "exactly one of TRAIN_STEPS and EPOCHS"),
    ({"kind": "promt"}, "prompt"),
    ({"batch_size": 0}, "batch_size"),
    ({"task_feature_lengths": {"inputs": 8}}, "TASK_FEATURE_LENGTHS"),
])
def test_a_wrong_config_is_refused_before_anything_is_read(world, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        tiny.train_config(world.base, tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()


def test_a_mixture_s_own_cap_holds_in_training(world, monkeypatch):
    """Of two prompts of a data set of 600 rows each, capped at 10, five are drawn of each."""
    monkeypatch.setattr(registry, "_MIXTURES", dict(registry._MIXTURES))
    capped = registry.capped_mixture("mini_topic", 10)
    data = tiny.make_data(world.base, world.folder)
    sizes = {}
    for task, most in (("mini_topic", None), (capped, None), (capped, 6), (capped, 1000)):
        config = tiny.train_config(world.base, world.folder / "x", task=task, kind="dataset", pack=False,
                                   max_examples=most)
        stream, rows = make_stream(config, data, tasks_of(config, data), FORM)
        sizes[task, most] = len(stream.source)
    assert sizes == {("mini_topic", None): rows, (capped, None): 10, (capped, 6): 6, (capped, 1000): 10}


def test_a_task_that_cuts_on_the_left_trains_on_the_ends_of_its_prompts(world):
    data = tiny.make_data(world.base, world.folder)
    split = data.split(tiny.REVIEW, "train")
    split.info["cut_prompt"] = "left"
    config = tiny.train_config(world.base, world.folder / "x", task=tiny.REVIEW, pack=False, batch_size=9,
                               max_examples=None, task_feature_lengths={"inputs": 6, "targets": 8},
                               early_end=EarlyEnd(rows=4))
    stream, _ = make_stream(config, data, [tiny.REVIEW], FORM)
    found = stream.batch(0)["encoder_input_tokens"]
    assert found.tolist() == [split.inputs(row)[-6:].tolist() for _, row in stream.examples(0)]
    data.split(tiny.REVIEW, "validation", 4).info["cut_prompt"] = "left"
    batch, = validation_batches(config, data, FORM)
    ends = [data.split(tiny.REVIEW, "validation", 4).inputs(row)[-6:].tolist() for row in range(4)]
    assert batch["encoder_input_tokens"][:4].tolist() == ends
