"""What is scored: all rows by default, and never two models of one id in one store."""

import dataclasses
from types import SimpleNamespace

import pytest

from elm_jax.cli import flags, gin_config
from elm_jax.data.prompts.chat_templates import ChatTemplate
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore, TaskResult
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.models.t5.config import T5Config
from elm_jax.runtime import hosts
from elm_jax.workflows.evaluate.evaluate_models import ScoredModel, ScoringSetup, evaluate_models


def model(fingerprint, log=None):
    """A model that says when it is loaded, and then fails."""
    def load():
        log.append(fingerprint)
        raise KeyError("loaded")

    return ScoredModel("mine", fingerprint, load)


def evaluate(models, store, cut_prompt="right", base=None, **settings):
    data = SimpleNamespace(split=lambda *_: SimpleNamespace(cut_prompt=cut_prompt), with_frame=lambda _: data)
    setup = ScoringSetup(base, data, EvaluationSettings(), None, split="validation")
    evaluate_models(models, lambda _: ["toys__ask"], setup, store, **settings)


def filled(folder, fingerprint):
    """A store with one result of the id ``mine``."""
    store = ResultsStore(folder)
    row = {"schema_version": 2, "expert": "mine", "task": "toys__ask", "split": "validation",
           "metric": "accuracy", "settings": EvaluationSettings().digest(None), "model": fingerprint,
           "value": 1.0, "num_instances": 1, "ci95_low": 0.2, "ci95_high": 1.0, "dataset": "toys",
           "chance": 0.5}
    store.append(TaskResult([row], [{"index": 0, "prediction": "a", "target": "a", "correct": 1}]))
    return store


def test_two_unlike_models_of_one_id_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"(?s)one id.*mine.*sha256:a and sha256:b"):
        evaluate([model("sha256:a"), model("sha256:b")], ResultsStore(tmp_path))


def test_one_model_given_twice_is_scored_once(tmp_path):
    log = []
    with pytest.raises(KeyError, match="loaded"):
        evaluate([model("sha256:a", log), model("sha256:a", log)], ResultsStore(tmp_path))
    assert log == ["sha256:a"]
    evaluate([model("sha256:a")] * 2, filled(tmp_path, "sha256:a"))  # done: nothing is loaded
    with pytest.raises(KeyError, match="loaded"):
        evaluate([model("sha256:a", log)], filled(tmp_path, "sha256:a"), cut_prompt="left")


def test_an_expert_of_the_chat_template_is_scored_again_and_only_on_a_base_that_has_one(tmp_path):
    config, log = T5Config(29, 16, 2, 8, 32, 1, 1), []
    card = ExpertCard(id="mine", kind="prompt", form="adapter", network={}, rendering="chat",
                      base={"fingerprint": "sha256:b"})
    plain, chat = model("sha256:a", log), dataclasses.replace(model("sha256:a", log), card=card)
    for template, error, said in ((ChatTemplate("{{ messages[0].content }}"), KeyError, "loaded"),
                                  (None, InputError, r"no chat template\n  where: the card of mine")):
        base = Base("tiny", {}, config, "sha256:b", None, chat_template=template)
        evaluate([plain], filled(tmp_path, "sha256:a"), base=base)
        with pytest.raises(error, match=said):
            evaluate([chat], filled(tmp_path, "sha256:a"), base=base)
    assert log == ["sha256:a"]


def test_every_process_opens_the_rows_that_say_the_side(tmp_path, monkeypatch):
    """What the first process alone had opened, the others would open later, and wait for it."""
    opened = []
    rows = SimpleNamespace(cut_prompt="right")
    data = SimpleNamespace(with_frame=lambda _: data, split=lambda *key: opened.append(key) or rows)
    monkeypatch.setattr(hosts, "by_first", lambda function: [])  # as in another process: it is told
    evaluate_models([model("sha256:a")], lambda _: ["toys__ask"], ScoringSetup(
        None, data, EvaluationSettings(), None, split="validation"), ResultsStore(tmp_path))
    assert opened == [("toys__ask", "validation", None)]


def test_results_of_another_model_of_the_id_are_not_lost(tmp_path):
    store = filled(tmp_path, "sha256:a")
    before = store.path.read_bytes()
    with pytest.raises(InputError, match=r"(?s)would be lost.*mine in .*got: sha256:a.*another folder"):
        evaluate([model("sha256:b")], store)
    assert store.path.read_bytes() == before


def test_a_study_replaces_the_results_of_a_model_trained_again(tmp_path):
    log = []
    with pytest.raises(KeyError, match="loaded"):
        evaluate([model("sha256:b", log)], filled(tmp_path, "sha256:a"), replace=True)
    assert log == ["sha256:b"]


def test_all_rows_are_scored_unless_asked_otherwise():
    command = ["evaluate", "--base", "b", "--task", "t", "--output", "o"]
    assert flags.make_parser().parse_args(command).max_rows is None
    assert flags.make_parser().parse_args([*command, "--max_rows", "300"]).max_rows == 300


def test_p3_small_says_that_its_tasks_were_chosen_after_a_trial():
    gin_config.parse(["gin/studies/p3_small.gin"], ["WORKDIR='p3'"])
    study = gin_config.build("study")
    assert "300 validation rows of each prompt" in study.selection_note
    assert (study.eval_source_length, study.max_eval_rows) == (256, 300)
