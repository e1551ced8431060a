"""The comparison of routers that stands beside a study's results, and when it is made again."""

import json

import pytest

from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.reporting.router_comparison import FILE, results_digest
from elm_jax.workflows.study import old_study

FACTS = {"config": {}, "unseen_tasks": ["u"], "seen_tasks": ["s"], "library": ["a", "b"]}


def put(results, expert, value):
    """Adds the result of an expert."""
    row = {"schema_version": 3, "expert": expert, "task": "u", "split": "validation", "metric": "accuracy",
           "value": value, "ci95_low": 0.0, "ci95_high": 1.0, "num_instances": 1, "chance": 0.5,
           "settings": f"s{value}", "dataset": "u"}
    ResultsStore(results).append(TaskResult([row], [{"index": 0, "prediction": "p", "target": "p"}]))


def record_of(results, default="vote"):
    """A comparison of the results that are there."""
    picks = {"u": [{"a": 1.0}], "s": [{"b": 1.0}]}
    return {"schema_version": 1, "experts": ["a", "b"], "default": default, "left_out": [], "priors": {},
            "routers": [{"router": "vote", "queries": 1, "picks": picks, "home": {}, "new_home": {}}],
            "results": results_digest(ResultsStore(results), ["a", "b"])}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results of two experts, and the comparison of them."""
    folder = tmp_path / "results"
    for expert, value in (("a", 0.25), ("b", 0.5)):
        put(folder, expert, value)
    (folder / FILE).write_text(json.dumps(record_of(folder)))
    monkeypatch.setattr(old_study, "read_facts", lambda _: FACTS)
    monkeypatch.setattr(old_study, "_compared", lambda *_: record_of(folder, default="prior"))
    return folder


def with_library(results):
    """Puts what routers are compared by beside the results."""
    for name in ("library/library.json", "prepared/x"):
        (results.parent / name).parent.mkdir()
        (results.parent / name).touch()


def told(results):
    """Whether there is a comparison, and its default router."""
    return old_study.add_comparison(results), json.loads((results / FILE).read_text())["default"]


def test_it_is_made_again_where_results_have_changed_since(results, caplog):
    with_library(results)
    put(results, "other", 0.125)
    assert told(results) == (True, "vote"), "of the same results, whatever else was scored"
    put(results, "a", 0.75)
    assert told(results) == (True, "prior") and "made of other results" in caplog.text
    (results / FILE).write_text(json.dumps(record_of(results)))
    assert told(results) == (True, "vote")


def test_an_older_one_stays_where_it_does_not_say_of_which_results_it_is(results):
    with_library(results)
    older = record_of(results)
    del older["results"]
    (results / FILE).write_text(json.dumps(older))
    put(results, "a", 0.75)
    assert told(results) == (True, "vote")


def test_it_stays_with_a_warning_where_it_cannot_be_made_again(results, caplog, monkeypatch):
    put(results, "a", 0.75)
    assert told(results) == (True, "vote") and "made of other results" in caplog.text
    with_library(results)

    def fails(*_):
        raise InputError("no encoder")

    monkeypatch.setattr(old_study, "_compared", fails)
    assert told(results) == (True, "vote") and "an older table of routers: no encoder" in caplog.text
    (results / FILE).unlink()
    assert not old_study.add_comparison(results) and "no table of routers: no encoder" in caplog.text
