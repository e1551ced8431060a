"""Each row by its own expert: the scores of that expert alone, whoever chooses it."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore, Scoring, evaluate_task
from elm_jax.routing.text import RoutingInstance
from elm_jax.workflows.evaluate import evaluate_mixed as evaluate_mixed_module
from elm_jax.workflows.evaluate.evaluate_mixed import mixed_of_library, read_assignment
from elm_jax.workflows.evaluate.evaluate_models import ScoringSetup

ROWS = 12
SETTINGS = EvaluationSettings(source_length=64, max_new_tokens=8)


@pytest.fixture(scope="module")
def written():
    """The name of a task of generation."""
    registry.import_tasks(tiny.MODULES)
    return next(name for name in registry.task_names() if name.startswith("mini_headline__"))


@pytest.fixture(scope="module")
def solo(world, written):
    """Predictions of both experts on the rows of three tasks, by the evaluator of one expert."""
    found = {}
    scoring = Scoring(SETTINGS, world.base.vocabulary, tiny.one_device(), world.base.fingerprint, ROWS)
    for expert in (world.topic, world.review):
        network, params = elm.resolve(world.base, expert)
        for task in (tiny.TOPIC, tiny.REVIEW, written):
            found[expert.card.id, task] = evaluate_task(
                network, params, world.data.split(task, "validation", ROWS), scoring, "solo").predictions
    return found


def evaluate(world, folder, *words, tasks=(tiny.TOPIC,), name="results.jsonl"):
    """`elm evaluate`; its status."""
    return main.main([str(word) for word in (
        "evaluate", "--base", world.base.path, "--output", folder / name, "--max_rows", ROWS,
        "--source_length", 64, "--max_new_tokens", 8, "--mesh_data", 1, "--prepared",
        world.folder / "prepared", "--module", "elm_jax.tasks.embedded",
        *(word for task in tasks for word in ("--task", task)), *words)])


def assert_each_row_is_its_experts(predictions, solo, task):
    for number, one in enumerate(predictions):
        expected = solo[one["expert"], task][number]
        assert {**one, "scores": None} == {**expected, "scores": None, "expert": one["expert"]}
        np.testing.assert_allclose(one.get("scores", []), expected.get("scores", []), atol=1e-5, rtol=1e-6)


def plain(rows):
    """Rows without what differs from run to run, and without what only a store adds."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "model")} for row in rows]


def test_an_assignment_scores_each_row_by_its_expert(world, solo, written, tmp_path):
    rng, tasks = np.random.default_rng(0), (tiny.TOPIC, written)
    assignment = {task: {one["index"]: (tiny.TOPIC, tiny.REVIEW)[rng.integers(2)]
                         for one in solo[tiny.TOPIC, task]} for task in tasks}
    lines = [{"task": task, "index": index, "expert": expert}
             for task, experts in assignment.items() for index, expert in experts.items()]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--mixed", "--expert", world.folder / "topic", "--expert", world.folder / "review",
             "--assignment", tmp_path / "half.jsonl")
    assert evaluate(world, tmp_path, *words, tasks=tasks) == 0
    store = ResultsStore(tmp_path)
    for task in tasks:
        predictions = store.predictions("mixed:half", task)
        assert {one["index"]: one["expert"] for one in predictions} == assignment[task]
        assert_each_row_is_its_experts(predictions, solo, task)
    scores = [[one["scores"] for one in solo[name, tiny.TOPIC]] for name in (tiny.TOPIC, tiny.REVIEW)]
    assert np.abs(np.subtract(*scores)).min(axis=1).max() > 1e-3, "the experts are not alike"
    rows = elm.evaluate_mixed(world.base, [world.topic, world.review], tasks, assignment=assignment,
                              data=world.data, settings=SETTINGS, mesh=tiny.one_device(), max_rows=ROWS)
    assert [{**row, "expert": "mixed:half"} for row in plain(rows)] == plain(store.rows())


def test_a_library_routes_each_row_by_itself(world, solo, tmp_path):
    words, tasks = ("--mixed", "--library", world.folder / "library"), (tiny.TOPIC, tiny.REVIEW)
    assert evaluate(world, tmp_path, *words) == 0
    first = (tmp_path / "results.jsonl").read_text()
    assert evaluate(world, tmp_path, *words) == 0
    assert (tmp_path / "results.jsonl").read_text() == first, "what is there is not scored again"
    assert evaluate(world, tmp_path, *words, tasks=tasks) == 0
    text = (tmp_path / "results.jsonl").read_text()
    assert text.startswith(first) and text.count("\n") == 2, "the first task is not scored again"
    store = ResultsStore(tmp_path)
    for task in tasks:
        predictions = store.predictions("mixed:library", task)
        assert_each_row_is_its_experts(predictions, solo, task)
        rows = world.data.split(task, "validation", ROWS)
        alone = [elm.route(world.library, [RoutingInstance(**rows.routing_instance(row))], num_queries=1)
                 for row in range(ROWS)]
        assert [one["expert"] for one in predictions] == [decision.top(1)[0] for decision in alone]
    found = elm.evaluate_mixed(world.base, world.library, tasks, data=world.data, settings=SETTINGS,
                               mesh=tiny.one_device(), max_rows=ROWS)
    assert plain(found) == plain(store.rows())
    assert {row["settings"] for row in found}.isdisjoint({SETTINGS.digest(ROWS)}), "told from solo results"
    by_means = mixed_of_library(world.base, world.library, router="centroid")
    assert by_means.fingerprint != mixed_of_library(world.base, world.library).fingerprint
    setup = ScoringSetup.of(world.base, data=world.data, mesh=tiny.one_device(), max_rows=ROWS)
    alone = [elm.route(world.library, [RoutingInstance(**rows.routing_instance(row))], router="centroid")
             for row in range(ROWS)]
    assert by_means.choose(tiny.REVIEW, setup) == [decision.top(1)[0] for decision in alone]
    # What was predicted says whose it is, so it is an assignment itself.
    chosen = tmp_path / "predictions" / "mixed:library" / f"{tiny.TOPIC}.validation.jsonl"
    assert evaluate(world, tmp_path / "again", "--mixed", "--assignment", chosen, "--id", "again", "--expert",
                    world.folder / "topic", "--expert", world.folder / "review") == 0
    again = ResultsStore(tmp_path / "again").predictions("again", tiny.TOPIC)
    assert again == store.predictions("mixed:library", tiny.TOPIC)


def test_registries_of_the_data_are_imported_before_rows_are_routed(world, monkeypatch):
    """Prepared arrays need none, but priors leave out a task's family, which a registry alone says."""
    imported = []
    monkeypatch.setattr(registry, "import_tasks", lambda names: imported.append(tuple(names)))

    def choose(*_, **__):
        raise InputError(f"after {imported}")

    monkeypatch.setattr(evaluate_mixed_module, "mixed_of_library", choose)
    with pytest.raises(InputError, match=r"after .*elm_jax\.tasks\.embedded"):
        elm.evaluate_mixed(world.base, world.library, [tiny.TOPIC], data=world.data, mesh=tiny.one_device())


def test_exemplars_are_no_part_of_a_query(world, tmp_path):
    words = ("--mixed", "--library", world.folder / "library")
    assert evaluate(world, tmp_path, *words) == 0 and evaluate(world, tmp_path, *words, "--few_shot", 1) == 0
    plain_row, few_shot = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert plain_row["settings"] != few_shot["settings"] and plain_row["model"] == few_shot["model"]


LIBRARY = ("--mixed", "--library", "{world}/library")
TOPIC_FOLDER = ("--expert", "{world}/topic")
REFUSED = {
    "no way": (("--mixed",), "library, or through an assignment\n.*neither"),
    "two ways": ((*LIBRARY, "--assignment", "{line}"), "both"),
    "no experts": (("--mixed", "--assignment", "{line}"), "give --expert DIR with --assignment"),
    "experts beside a library": ((*LIBRARY, *TOPIC_FOLDER), "1 experts beside"),
    "not mixed": (("--library", "{world}/library"), "Only a mixed evaluation.*library"),
    "a name that is not used": (("--id", "mine"), "Only a mixed evaluation.*expert_id"),
    "an assignment with a router": (("--mixed", "--assignment", "{line}", *TOPIC_FOLDER, "--router", "vote"),
                                    "needs no router"),
    "a router of tasks": ((*LIBRARY, "--router", "labelled"), "decides for a task"),
    "a stack": ((*LIBRARY, "--stack_experts", "2"), "stack_experts"),
    "parts for experts": ((*LIBRARY, "--mesh_experts", "2"), "mesh_experts"),
    "a name that leaves its folder": ((*LIBRARY, "--id", "../x"), "folder's name"),
    "rows are missing": (("--mixed", "--assignment", "{line}", *TOPIC_FOLDER), "11 of 12 rows without"),
    "an unknown expert": (("--mixed", "--assignment", "{line}", "--expert", "{world}/review"),
                          f"Unknown expert '{tiny.TOPIC}'"),
    "a full expert": (("--mixed", "--assignment", "{line}", *TOPIC_FOLDER, "--expert", "{world}/dataset"),
                      "adapters of one shape.*topic-de.*of form 'full'"),
    "no task of several": (("--mixed", "--assignment", "{line}", *TOPIC_FOLDER, "--task", tiny.REVIEW),
                           "line 1.*\"task\" if several"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_status_2(world, tmp_path, capsys, case):
    words, message = REFUSED[case]
    index = world.data.split(tiny.TOPIC, "validation", ROWS).text(0)["index"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"index": index, "expert": tiny.TOPIC}) + "\n")
    words = [word.format(world=world.folder, line=tmp_path / "a.jsonl") for word in words]
    assert evaluate(world, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (tmp_path / "out" / "results.jsonl").exists()
    assert re.search(f"(?s){message}", error), error


def test_a_row_has_one_expert(tmp_path):
    lines = ['{"index": 3, "expert": "a"}', '{"index": 3, "expert": "a"}', '{"index": 3, "expert": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"(?s)twice.*line 3.*t 3: a and b"):
        read_assignment(tmp_path / "a.jsonl", ["t"])


def test_experts_of_unlike_shapes_are_refused(world):
    card, overlay = world.review.card, world.review.overlay
    other = dataclasses.replace(card, network={**card.network, "dropout_rate": 0.5})
    halved = {name: part for name, part in overlay.items() if name != "encoder"}
    assignment = {tiny.TOPIC: {row: (tiny.TOPIC, tiny.REVIEW)[row % 2] for row in range(10_000)}}
    for expert, message in ((elm.Expert(other, overlay), "another network config"),
                            (elm.Expert(card, halved), f"(?s){tiny.REVIEW}.*leaf")):
        with pytest.raises(InputError, match=message):
            elm.evaluate_mixed(world.base, [world.topic, expert], [tiny.TOPIC], assignment=assignment,
                               data=world.data, settings=SETTINGS, mesh=tiny.one_device(), max_rows=ROWS)
    with pytest.raises(InputError, match="one of the two"):
        elm.evaluate_mixed(world.base, [world.topic], [tiny.TOPIC])
