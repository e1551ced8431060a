"""A card tells which text of its templates an expert saw, and a text that has changed since is noticed."""

import dataclasses
import logging

import pytest
import tiny_study as tiny
from elm_jax.tasks import pins, t0_train

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.experts import template_versions
from elm_jax.experts.card import ExpertCard
from elm_jax.workflows.build_library import training_instances

NAME = "ag_news__classify"
YAML = """dataset: ag_news
templates:
  a: !Template
    answer_choices: a ||| b
    jinja: '{{text}} %s ||| {{answer_choices[label]}}'
    name: classify
"""


def card_of(task: registry.PromptedTask) -> ExpertCard:
    return ExpertCard(id="ag", kind="prompt", form="adapter", base={"name": "b", "fingerprint": "f"},
                      network={}, tasks=(task.name,), templates=(task.template,),
                      **template_versions.of_tasks([task]))


def write(folder, word: str):
    (folder / "ag_news").mkdir(parents=True)
    (folder / "ag_news" / "templates.yaml").write_text(YAML % word)
    return folder


def test_known_texts_have_their_version(monkeypatch):
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    registry.import_tasks(["elm_jax.tasks"])
    versions = {task.template_version() for task in map(registry.get_task, t0_train.TASKS)
                if task.dataset not in ("trec", "multi_news")}
    assert versions == {pins.HEAD}  # the package, which is what is installed, has the same texts
    assert registry.get_task("trec__trec1").template_version() == pins.PACKAGE
    assert registry.get_task("haiku__as_asked").template_version() == pins.OWN
    assert registry.get_task("bigbench_winowhy__bigbench").template_version() is None


def test_every_task_of_a_template_is_pinned():
    registry.import_tasks(["elm_jax.tasks"])
    roles = ("train", "extra", "unseen", "unseen_extra", "generative", "compositional")
    unpinned = [task.name for role in roles for task in map(registry.get_task, registry.task_names(role=role))
                if task.versions is not None and not pins.versions_of(task.name)]
    assert unpinned == []


def test_a_changed_text_is_noticed(tmp_path, monkeypatch, caplog):
    registry.import_tasks(["elm_jax.tasks"])
    task = registry.get_task(NAME)
    monkeypatch.setenv("ELM_DATA_DIR", str(write(tmp_path / "then", "Which?")))
    card = card_of(task)
    assert card.template_versions == ("unknown",) and template_versions.changed(card) == []
    assert ExpertCard.from_dict(card.to_dict()) == card
    monkeypatch.setenv("ELM_DATA_DIR", str(write(tmp_path / "now", "What?")))
    with caplog.at_level(logging.WARNING):
        template_versions.warn_of_changes([card])
    message, = [record.getMessage() for record in caplog.records]
    assert "expert ag: the text of template 'classify' of ag_news has changed" in message
    assert card.template_digests[0] in message and task.load_template().digest in message


def test_cards_of_an_earlier_version_say_nothing(monkeypatch):
    registry.import_tasks(["elm_jax.tasks"])
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    card = dataclasses.replace(card_of(registry.get_task(NAME)), template_digests=(), template_versions=())
    assert template_versions.changed(card) == []


def test_a_trained_expert_s_card_has_the_digests(world, monkeypatch, caplog):
    task = registry.get_task(tiny.TOPIC)
    assert world.topic.card.template_digests == (task.load_template().digest,)
    assert len(world.dataset.card.template_digests) == len(world.dataset.card.tasks) == 2
    other = dataclasses.replace(task.load_template(), jinja="other ||| {{x}}")
    monkeypatch.setitem(registry._TASKS, tiny.TOPIC, dataclasses.replace(task, prompt=other))
    data = TaskData(world.base.vocabulary, tiny.MODULES,
                    str(world.folder / "prepared"))
    with pytest.raises(InputError, match=r"made with another text of template 'about what'"):
        training_instances(world.folder / "topic", data, 5, seed=0)
    with caplog.at_level(logging.WARNING):
        template_versions.warn_of_changes([world.topic.card])
    assert "template 'about what' of mini_topic has changed" in caplog.text
