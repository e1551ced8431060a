"""Rows that none of a library's experts fits: the base itself answers them, or who is named for it."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.data.registry import registry
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore, Scoring, evaluate_task
from elm_jax.experts.overlay import save_expert
from elm_jax.routing.fitted import Threshold
from elm_jax.routing.none_of_these import fit_threshold
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.workflows import route as route_module
from elm_jax.workflows.build_library import build_library

ROWS = 10
SETTINGS = EvaluationSettings(source_length=64, max_new_tokens=8)
NOBODY, EVERYBODY = 2.0, -2.0
"""Thresholds beyond all similarities."""


@pytest.fixture(scope="module")
def outside():
    """A task of generation that no expert of the library was trained on."""
    registry.import_tasks(tiny.MODULES)
    return next(name for name in registry.task_names() if name.startswith("mini_note__"))


@pytest.fixture(scope="module")
def headline(world):
    """An expert for the headlines of the texts whose topic another tells: a threshold is between the two."""
    registry.import_tasks(tiny.MODULES)
    task = next(name for name in registry.task_names() if name.startswith("mini_headline__"))
    card = dataclasses.replace(world.topic.card, id=task, tasks=(task,))
    return elm.Expert(card, jax.tree.map(lambda leaf: 1.1 * leaf, world.topic.overlay))


@pytest.fixture(scope="module")
def solo(world, outside, headline):
    """Predictions of the base and the experts alone, by the evaluator of one model."""
    found = {}
    scoring = Scoring(SETTINGS, world.base.vocabulary, tiny.one_device(), world.base.fingerprint, ROWS)
    for name, expert in (("base", None), (tiny.TOPIC, world.topic), (tiny.REVIEW, world.review),
                         (headline.card.id, headline)):
        network, params = elm.resolve(world.base, expert)
        for task in (tiny.TOPIC, outside):
            found[name, task] = evaluate_task(
                network, params, world.data.split(task, "validation", ROWS), scoring, "solo").predictions
    return found


@pytest.fixture
def at(monkeypatch):
    """Sets the threshold that a library gets."""
    def set_to(value):
        monkeypatch.setattr(route_module, "fit_threshold", lambda _: Threshold((1,), (value,), (1.0,)))
    return set_to


@pytest.fixture(scope="module")
def multitask(world, tmp_path_factory):
    """Folder of an expert of the library's shape that is none of its own."""
    folder = tmp_path_factory.mktemp("beside") / "multi"
    card = dataclasses.replace(world.review.card, id="multi")
    save_expert(folder, dataclasses.replace(world.review, card=card))
    return folder


def mixed(world, tasks, **options):
    """Rows and who answered, by `elm.evaluate_mixed`."""
    return elm.evaluate_mixed(world.base, world.library, tasks, data=world.data, settings=SETTINGS,
                              mesh=tiny.one_device(), max_rows=ROWS, **options)


def evaluate(world, folder, *words, tasks):
    """`elm evaluate`; its status."""
    return main.main([str(word) for word in (
        "evaluate", "--base", world.base.path, "--output", folder / "results.jsonl", "--max_rows", ROWS,
        "--source_length", 64, "--max_new_tokens", 8, "--mesh_data", 1, "--prepared",
        world.folder / "prepared", "--module", "elm_jax.tasks.embedded",
        *(word for task in tasks for word in ("--task", task)), *words)])


def assert_scored_as(predictions, solo, task):
    """Each row has the scores of who answered it, alone."""
    for number, one in enumerate(predictions):
        expected = solo[one["expert"], task][number]
        ours = {name: value for name, value in one.items() if name not in ("expert", "none_fits")}
        assert {**ours, "scores": None} == {**expected, "scores": None}
        np.testing.assert_allclose(one.get("scores", []), expected.get("scores", []), atol=1e-6, rtol=1e-6)


def nearness(world, library, task):
    """Similarity f64[rows, experts] of the rows of a task with the nearest key of each expert, by NumPy."""
    rows = world.data.split(task, "validation", ROWS)
    texts = [format_text(RoutingInstance(**rows.routing_instance(row)), library.text_format)
             for row in range(len(rows))]
    found = library.encoder.embed(texts).astype(np.float64) @ library.index.keys.astype(np.float64).T
    return np.stack([found[:, library.index.owners == one].max(axis=1) for one in range(len(library))], 1)


def test_beyond_all_similarities_everybody_fits_or_nobody_and_the_base_answers_as_alone(
        world, outside, solo, at, tmp_path):
    tasks = (tiny.TOPIC, outside)
    assert evaluate(world, tmp_path, "--mixed", "--library", world.folder / "library", tasks=tasks) == 0
    assert evaluate(world, tmp_path / "alone", tasks=tasks) == 0
    plain, alone = ResultsStore(tmp_path), ResultsStore(tmp_path / "alone")
    for per in ("row", "task"):
        for value, other, other_id in ((EVERYBODY, plain, "mixed:library"), (NOBODY, alone, "base")):
            at(value)
            folder = tmp_path / f"{per} {value}"
            assert evaluate(world, folder, "--mixed", "--library", world.folder / "library",
                            "--none_of_these", "base", "--none_per", per, tasks=tasks) == 0
            store = ResultsStore(folder)
            for task in tasks:
                predictions = store.predictions("mixed:library+base", task)
                assert_scored_as(predictions, solo, task)
                assert {one["none_fits"] for one in predictions} == {value == NOBODY}
                if value == NOBODY:
                    assert {one["expert"] for one in predictions} == {"base"}
                else:
                    assert [one["expert"] for one in predictions] == [
                        one["expert"] for one in plain.predictions("mixed:library", task)]
                (row,), (expected,) = (each.rows_of(name, task, "validation") for each, name in (
                    (store, "mixed:library+base"), (other, other_id)))
                assert row["value"] == pytest.approx(expected["value"], abs=1e-9)
                assert (row["none_of_these"], row["none_fits"]) == ("base", float(value == NOBODY))
    assert not any("none_fits" in one for one in plain.predictions("mixed:library", outside))
    assert "none_of_these" not in plain.rows()[0]


def test_a_row_that_no_expert_fits_goes_to_the_base_and_results_say_so(
        world, outside, headline, solo, tmp_path, capsys):
    save_expert(tmp_path / "headline", headline)
    library = build_library(
        tmp_path / "library", [world.folder / "topic", world.folder / "review", tmp_path / "headline"],
        world.data, encoder="tfidf", instances_per_expert=40)
    words, tasks = ("--mixed", "--library", tmp_path / "library"), (tiny.TOPIC, outside)
    assert evaluate(world, tmp_path, *words, tasks=tasks) == 0
    capsys.readouterr()
    assert evaluate(world, tmp_path, *words, "--none_of_these", "base", tasks=tasks) == 0
    printed = capsys.readouterr()
    assert "answered by the base itself" in printed.err
    threshold, store = fit_threshold(library.routed()), ResultsStore(tmp_path)
    shares = []
    for task, line in zip(tasks, printed.out.splitlines()[1:], strict=True):
        predictions = store.predictions("mixed:library+base", task)
        first = [one["expert"] for one in store.predictions("mixed:library", task)]
        none = nearness(world, library, task).max(axis=1) < threshold.at(1)
        assert [one["none_fits"] for one in predictions] == none.tolist()
        assert [one["expert"] for one in predictions] == [
            "base" if far else name for far, name in zip(none, first, strict=True)]
        assert_scored_as(predictions, solo, task)
        (row,) = store.rows_of("mixed:library+base", task, "validation")
        shares.append(row["none_fits"])
        assert row["none_fits"] == none.mean() and float(line.split("\t")[-1]) == 100 * none.mean()
    assert shares[0] < shares[1], "of the task from outside more rows are the base's"
    before = (tmp_path / "results.jsonl").read_text()
    assert evaluate(world, tmp_path, *words, "--none_of_these", "base", tasks=tasks) == 0
    assert (tmp_path / "results.jsonl").read_text() == before, "what is there is not scored again"
    assert len({row["model"] for row in store.rows()}) == 2, "told from those of the experts alone"
    for more in (("--none_per", "task"), ("--router", "centroid")):
        assert evaluate(world, tmp_path, *words, "--none_of_these", "base", *more, tasks=tasks) == 2
        assert "of another model of the same id" in capsys.readouterr().err


def test_a_task_that_no_expert_fits_is_the_base_s_as_a_whole(world, outside, at):
    """By the mean over its rows of the similarity with the nearest keys of one expert."""
    own, far = (nearness(world, world.library, task).mean(axis=0).max() for task in (tiny.TOPIC, outside))
    assert far < own
    at((far + own) / 2)
    known, unknown = mixed(world, (tiny.TOPIC, outside), none_of_these="base", none_per="task")
    assert (known["none_fits"], unknown["none_fits"]) == (0, 1)
    at(far + 1e-4)
    assert mixed(world, outside, none_of_these="base", none_per="task")[0]["none_fits"] == 1
    at(far - 1e-4)
    assert mixed(world, outside, none_of_these="base", none_per="task")[0]["none_fits"] == 0


def test_an_expert_may_be_named_of_the_library_or_beside_it(world, solo, multitask, at, tmp_path):
    at(NOBODY)
    for who, name in ((tiny.REVIEW, tiny.REVIEW), (multitask, "multi"),
                      (world.folder / "review", tiny.REVIEW)):
        folder = tmp_path / str(who).replace("/", "_")
        assert evaluate(world, folder, "--mixed", "--library", world.folder / "library", "--none_of_these",
                        who, tasks=[tiny.TOPIC]) == 0
        store = ResultsStore(folder)
        predictions = store.predictions(f"mixed:library+{name}", tiny.TOPIC)
        assert {one["expert"] for one in predictions} == {name}
        assert_scored_as(predictions, solo | {("multi", tiny.TOPIC): solo[tiny.REVIEW, tiny.TOPIC]},
                         tiny.TOPIC)
    (row,) = mixed(world, tiny.TOPIC, none_of_these=elm.load_expert(multitask))
    (kept,) = ResultsStore(tmp_path / str(multitask).replace("/", "_")).rows()
    assert (row["value"], row["none_of_these"]) == (kept["value"], "multi")


LIBRARY = ("--mixed", "--library", "{world}/library")
REFUSED = {
    "no library": (("--none_of_these", "base"), "Only a mixed evaluation.*none_of_these"),
    "an assignment": (("--mixed", "--assignment", "x", "--expert", "{world}/topic", "--none_of_these",
                       "base"), "Only of a library's experts"),
    "nothing asks": ((*LIBRARY, "--none_per", "task"), "Nothing asks whether any expert fits"),
    "nobody": ((*LIBRARY, "--none_of_these", "bsae"), "Unknown expert 'bsae'(.|\n)*nearest: base"),
    "a full expert": ((*LIBRARY, "--none_of_these", "{world}/dataset"), "adapters of one shape"),
    "a base's folder": ((*LIBRARY, "--none_of_these", "{base}"), "expert"),
    "means": (("--mixed", "--library", "{means}", "--none_of_these", "base"), "no instances"),
    "one expert": (("--mixed", "--library", "{one}", "--none_of_these", "base"), "Too few experts"),
}


@pytest.fixture(scope="module")
def libraries(world, tmp_path_factory):
    """Folders of libraries that cannot tell."""
    folder = tmp_path_factory.mktemp("unable")
    both = [world.folder / "topic" / "expert", world.folder / "review"]
    build_library(folder / "means", both, world.data, encoder="tfidf", means=2)
    build_library(folder / "one", both[:1], world.data, encoder="tfidf", instances_per_expert=4)
    return {"means": folder / "means", "one": folder / "one"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_effect_or_cannot_be_told_is_one_error(world, libraries, tmp_path, capsys, case):
    words, message = REFUSED[case]
    words = [word.format(world=world.folder, base=world.base.path, **libraries) for word in words]
    assert evaluate(world, tmp_path / "out", *words, tasks=[tiny.TOPIC]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (tmp_path / "out" / "results.jsonl").exists()
    assert re.search(f"(?s){message}", error), error


def generated(capsys, *words):
    """Answers that `elm generate` gives, as JSON."""
    assert main.main(["generate", *map(str, words), "--max_new_tokens", "6", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["answers"]


def test_a_question_that_no_expert_fits_is_the_base_s(world, multitask, at, capsys, tmp_path):
    texts = ["A dull film.", "The team won the match."]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"inputs": one}) + "\n" for one in texts))
    words = ["--library", world.library.path]
    plain = generated(capsys, *words, *texts)
    at(NOBODY)
    told = generated(capsys, *words, "--none_of_these", "base", *texts)
    assert [row["text"] for row in told] == elm.generate(world.base, None, texts, max_new_tokens=6)
    assert [row["expert"] for row in told] == ["base", "base"]
    assert [row["routed"] for row in told] == [{**row["routed"], "is_sure": False} for row in plain]
    for who, name in ((tiny.REVIEW, tiny.REVIEW), (multitask, "multi")):
        told = generated(capsys, *words, "--none_of_these", who, *texts)
        expected = elm.generate(world.base, world.review, texts, max_new_tokens=6)
        assert [row["text"] for row in told] == expected
        assert {row["expert"] for row in told} == {name}
    assert main.main(["generate", *map(str, words), "--none_of_these", "base", "--max_new_tokens", "6",
                      texts[0]]) == 0
    assert re.search(r"the base; none of the experts fits, mini_\w+ would be first", capsys.readouterr().out)
    at(EVERYBODY)
    told = generated(capsys, *words, "--none_of_these", "base", *texts)
    assert [{**row, "routed": None} for row in told] == [{**row, "routed": None} for row in plain]
    vectors = world.library.encoder.embed([format_text(RoutingInstance(text), world.library.text_format)
                                           for text in texts])
    near = (vectors.astype(np.float64) @ world.library.index.keys.T.astype(np.float64)).max(axis=1)
    at(float(near.mean()))
    asked = [*words, "--none_of_these", "base", "--examples", tmp_path / "questions.jsonl"]
    assert [row["routed"]["is_sure"] for row in generated(capsys, *asked)] == (near >= near.mean()).tolist()
    at(float(near.max()) - 1e-4)  # no expert is as near to both
    assert [row["expert"] for row in generated(capsys, *asked, "--none_per", "task")] == ["base", "base"]


@pytest.mark.parametrize(("words", "reason"), [
    (["--base", "{base}", "--none_of_these", "base", "a"], "no effect without a library"),
    (["--library", "{library}", "--none_per", "row", "a"], "Nothing asks"),
    (["--library", "{library}", "--none_of_these", "base", "--none_per", "task", "a"],
     "questions of one task"),
    (["--library", "{library}", "--none_of_these", "Is it good?", "a"], "Unknown expert 'Is it good?'"),
    (["--library", "{one}", "--none_of_these", "base", "a"], "Too few experts")])
def test_generation_refuses_the_same(world, libraries, capsys, words, reason):
    places = {"base": world.base.path, "library": world.library.path, **libraries}
    assert main.main(["generate", *(word.format(**places) for word in words)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and reason in told.err
