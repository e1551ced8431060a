"""The workflow behind `elm route` and `elm merge --library`: queries from a task or a file, to a decision."""

import json
import shutil

import numpy as np
import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.cli.route import _notes
from elm_jax.data.registry import registry
from elm_jax.data.registry.task_kin import kin_of
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings
from elm_jax.experts.generality import (
    CalibratedDataset,
    CalibratedExpert,
    Generality,
    write_generality,
)
from elm_jax.routing.fitted import Threshold
from elm_jax.routing.none_of_these import fit_threshold
from elm_jax.routing.router import ROUTERS
from elm_jax.routing.text import format_text
from elm_jax.routing.vote import ExpertVotes, RoutingDecision
from elm_jax.workflows import route as route_module
from elm_jax.workflows.evaluate.evaluate_models import ScoringSetup, model_of
from elm_jax.workflows.merge.in_memory import best_of_library
from elm_jax.workflows.route import task_instances
from elm_jax.workflows.route_report import RouteReport, report_route
from elm_jax.workflows.row_routes import route_rows
from elm_jax.workflows.target_task import kin_in, read_labelled, target_options


@pytest.mark.parametrize(("known", "priors", "said"), [
    (True, (0.5, -0.5), (True, False)), (False, (0.5, 0.0), (False, False)),
    (None, (0.0, 0.0), (False, True)), (None, (None, None), (False, False))])
def test_the_notes_say_when_a_task_is_known_and_when_no_prior_tells_experts_apart(known, priors, said):
    lines = tuple(ExpertVotes(f"e{n}", 0, 0.0, 0.0, prior=prior) for n, prior in enumerate(priors))
    decision = RoutingDecision(lines, 1, "instance", "tfidf-svd", "prior+nearest", is_known=known)
    notes = " ".join(_notes(RouteReport(decision, {}, {}, ())))
    assert ("library knows tasks like this" in notes, "every prior is 0" in notes) == said


@pytest.mark.parametrize("prepared", [False, True])
def test_config_and_verb_decide_as_route_does_on_the_drawn_instances(world, capsys, prepared):
    world.data.split(tiny.REVIEW, "validation")
    folder = str(world.folder / "prepared") if prepared else None
    config = elm.RouteConfig(str(world.folder / "library"), task=tiny.REVIEW, num_queries=9, seed=4,
                             modules=tiny.MODULES, prepared_dir=folder)
    decision = elm.route_task(config)
    assert decision == elm.route(world.library, task_instances(config), num_queries=9)
    assert decision.num_queries == 9 and decision.top(1) == [tiny.REVIEW]
    words = ["--module", *tiny.MODULES, *(["--prepared", folder] if folder else [])]
    assert main.main(["route", "--library", config.library, "--task", tiny.REVIEW, "--queries", "9", "--seed",
                      "4", "--json", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    matches = printed.pop("matches")
    assert printed == decision.to_dict()
    assert [one["expert"] for one in matches] == [line.expert for line in decision.ranking]
    for one, line in zip(matches, decision.ranking, strict=True):
        assert one["similarity"] == pytest.approx(line.best_similarity, abs=1e-4)
        assert one["query"] in [instance.source for instance in task_instances(config)]
        assert one["nearest"] in [row["source"] for row in world.library.instances
                                  if row["expert"] == one["expert"]]


def test_the_best_experts_of_a_library_and_their_weights(world):
    config = elm.RouteConfig(str(world.folder / "library"), task=tiny.REVIEW, modules=tiny.MODULES)
    decision = elm.route_task(config)
    folders, weights = best_of_library(config, 2, "votes")
    assert [elm.load_expert(folder).card.id for folder in folders] == decision.top(2)
    assert weights == [line.votes for line in decision.ranking] and sum(weights) == 32
    assert best_of_library(config, 1, "0.5")[1] == "0.5", "numbers are the caller's to read"


def test_without_queries_a_task_is_its_template_or_an_instruction(world):
    """At Q = 0 a text is compared with the means of the experts' keys, in the library's format."""
    folder, library = world.folder / "library", world.library
    template = registry.get_task(tiny.REVIEW).load_template()
    given = elm.RoutingInstance(template.jinja.split("|||")[0].strip(), template.answer_choices)
    decision = elm.route_task(elm.RouteConfig(folder, task=tiny.REVIEW, num_queries=0, modules=tiny.MODULES))
    assert decision == elm.route(library, instruction=given)
    assert (decision.num_queries, decision.router) == (0, "centroid")
    vector = library.encoder.embed([format_text(given, library.text_format)])[0].astype(np.float64)
    for line in decision.ranking:
        mean = library.index.keys[library.index.owners == library.index.experts.index(line.expert)].mean(0)
        assert line.score == pytest.approx(mean @ vector / np.linalg.norm(mean), abs=1e-5)
    every = report_route(elm.RouteConfig(folder, task=tiny.REVIEW, num_queries=0, modules=tiny.MODULES),
                         every=True)
    assert every.decision == decision and "needs queries" in every.unable["vote"]
    assert "--labelled" in every.unable["labelled"]
    told = elm.route_task(elm.RouteConfig(folder, instruction="Was the meal good or bad?"))
    assert told == elm.route(library, instruction="Was the meal good or bad?")


def test_a_stream_of_texts_decides_as_all_at_once_and_rows_each_by_itself(world, capsys, tmp_path):
    texts = ["The meal was cold.", "The court rejected the appeal.", "A dull film."]
    stream = elm.RouteStream(world.library)
    assert stream.update(texts[0]).num_queries == 1
    at_once, last = elm.route(world.library, texts), stream.update(texts[1:])
    for one, other in zip(last.ranking, at_once.ranking, strict=True):
        assert (one.expert, one.votes) == (other.expert, other.votes)
        assert one.mean_similarity == pytest.approx(other.mean_similarity)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"inputs": text}) + "\n" for text in texts))
    words = ["route", "--library", str(world.folder / "library"), "--examples", str(file)]
    for router in ("vote", "centroid"):
        assert main.main([*words, "--per_row", "--router", router, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        alone = [elm.route(world.library, text, router=router).top(2) for text in texts]
        assert [[row["expert"], row["next_expert"]] for row in rows] == alone
        assert [row["inputs"] for row in rows] == texts
    assert main.main([*words, "--router", "all"]) == 0
    head, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head[:3] == ["expert", "vote", "centroid"] and [line[1] for line in lines] == ["1", "2"]


def test_a_library_s_experts_are_scored_on_rows_as_evaluation_scores_them(world):
    split = world.data.split(tiny.REVIEW, "validation", 8)
    texts = [split.text(row) for row in range(8)]
    rows = [elm.ScoredRow(one["inputs"], tuple(one["choices"]), one["targets"]) for one in texts]
    mesh, settings = tiny.one_device(), EvaluationSettings(source_length=64)
    scorer = elm.LibraryScorer(world.library, world.base, rows, settings=settings, mesh=mesh)
    found = scorer(np.array([1, 0]), 2, 8)
    for line, expert in enumerate((world.review, world.topic)):
        setup = ScoringSetup(world.base, world.data, settings, mesh, max_rows=8)
        (result,) = model_of(world.base, expert).score([tiny.REVIEW], setup)
        np.testing.assert_array_equal(found[line], [one["correct"] for one in result.predictions[2:]])


@pytest.mark.parametrize(("given", "fault"), [
    ({}, "one of the two"), ({"task": "a", "examples": "b"}, "one of the two"),
    ({"task": "a", "router": "centroids"}, "Unknown router 'centroids'(.|\n)*nearest: centroid"),
    ({"instruction": "Sort it.", "num_queries": 32}, "Queries come from a task"),
    ({"instruction": "Sort it.", "examples": "b", "num_queries": 0}, "and no examples"),
    ({"instruction": " "}, "empty"), ({"examples": "b", "num_queries": 0}, "--instruction TEXT"),
    ({"examples": "b", "router": "vote", "labelled": "c"}, "no use for labelled rows"),
    ({"examples": "b", "router": "vote", "base": "c"}, "need a base"),
    ({"instruction": "b", "none_of_these": True}, "Whether none of the experts fits"),
    ({"task": "a", "dataset": "b"}, "itself says")])
def test_settings_that_exclude_each_other_or_have_no_effect_are_refused(given, fault):
    with pytest.raises(InputError, match=fault):
        elm.RouteConfig("library", **given)


@pytest.mark.parametrize(("words", "fault"), [
    (["--router", "prior"], "elm library calibrate"), (["--router", "centroyd"], "nearest: centroid"),
    (["--router", "confidence"], "Unknown router 'confidence'"),
    (["--router", "all", "--base", "b"], "vote decides; or give labelled rows"),
    (["--instruction", "Sort it."], "no use for an instruction"),
    (["--queries", "3"], "fewer rows than queries"), (["--dataset", "b"], "the library has none"),
    (["--per_row", "--router", "all"], "One router decides"), (["--top_k", "0"], "top_k"),
    (["--base", "b"], "leave it out: vote decides"), (["--base", "b", "--router", "vote"], "need a base")])
def test_what_a_library_or_the_rows_lack_is_one_error(world, words, fault, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"inputs": "a"}\n{"inputs": "b", "choices": ["c", "d"]}\n')
    assert main.main(["route", "--library", str(world.folder / "library"), "--examples",
                      str(tmp_path / "rows.jsonl"), *words]) == 2
    printed = capsys.readouterr()
    assert fault in printed.err and not printed.out


def test_labelled_rows_have_labels(tmp_path):
    file = tmp_path / "rows.jsonl"
    for targets, fault in (("", "has no label"), (', "targets": 3', "targets=3")):
        file.write_text('{"inputs": "b", "choices": ["c", "d"]' + targets + "}\n")
        with pytest.raises(InputError, match=f"line 1(.|\n)*{fault}|{fault}(.|\n)*line 1"):
            read_labelled(file)
    with pytest.raises(InputError, match="none of a row's choices"):
        elm.ScoredRow("b", ("c", "d"), "e").check("line 1")


@pytest.fixture(scope="module")
def calibrated(world, tmp_path_factory):
    """A copy of the library whose topic expert is the more general one, but on reviews."""
    folder = tmp_path_factory.mktemp("calibrated") / "library"
    shutil.copytree(world.library.path, folder)
    library = elm.ExpertLibrary.open(folder)
    own = kin_of(tiny.REVIEW)
    datasets = [CalibratedDataset("other", "others", 1), CalibratedDataset(own.dataset, own.family, 1)]
    write_generality(library.path, Generality(datasets, {
        name: CalibratedExpert(entry.card.created, None, [score, -3 * score])
        for (name, entry), score in zip(library.entries.items(), (1.0, -1.0), strict=True)}))
    return folder


def test_priors_leave_out_what_the_task_says_of_itself(world, calibrated, capsys):
    words = ["route", "--library", str(calibrated), "--queries", "5", "--module", *tiny.MODULES]
    assert main.main([*words, "--task", tiny.REVIEW, "--json"]) == 0
    printed, own = json.loads(capsys.readouterr().out), kin_of(tiny.REVIEW)
    assert (printed["router"], printed["dataset"], printed["family"]) == ("prior+nearest", *own)
    assert {line["expert"]: line["prior"] for line in printed["ranking"]} == {tiny.TOPIC: 1, tiny.REVIEW: -1}
    config = elm.RouteConfig(calibrated, task=tiny.REVIEW, num_queries=5, modules=tiny.MODULES)
    library = elm.ExpertLibrary.open(calibrated)
    instances, template = task_instances(config), registry.get_task(tiny.REVIEW).load_template()
    text = elm.RoutingInstance(template.jinja.split("|||")[0].strip(), template.answer_choices)
    told = elm.route(library, instances, dataset=own.dataset, family=own.family, instruction=text)
    assert elm.route_task(config) == told
    assert main.main([*words, "--task", tiny.REVIEW, "--per_row", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    options = target_options(tiny.REVIEW, library.routed(), "prior+nearest")
    assert [row["expert"] for row in rows] == route_rows(library, instances, **options)
    # The best by priors may have no votes: whoever weighs by votes takes the most voted.
    assert best_of_library(config, 1, "votes") == ([str(calibrated / "experts" / tiny.REVIEW)], [5.0])
    # Of a task that is not registered, the user says it.
    bare = elm.route_task(elm.RouteConfig(calibrated, instruction="Sort it.", dataset=own.dataset))
    assert {line.expert: line.prior for line in bare.ranking} == {tiny.TOPIC: 1, tiny.REVIEW: -1}
    with pytest.raises(InputError, match=r"nearest: .*other"):
        elm.route_task(elm.RouteConfig(calibrated, instruction="Sort it.", family="othres"))
    assert main.main([*words, "--task", tiny.REVIEW, "--router", "all"]) == 0
    head, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    ranks = {name: dict(zip([line[0] for line in lines], [line[place] for line in lines], strict=True))
             for place, name in enumerate(head) if place}
    assert ranks["prior"] == {tiny.TOPIC: "1", tiny.REVIEW: "2"} != ranks["vote"]


def test_a_task_that_is_not_registered_has_the_family_that_the_priors_know(calibrated, caplog):
    """Its name says the data set; of one that they do not know it is told that no family is left out."""
    routed, own = elm.ExpertLibrary.open(calibrated).routed(), kin_of(tiny.REVIEW)
    other = f"{own.dataset}__not_registered"
    assert own.family != own.dataset and registry.find_task(other) is None
    assert kin_in(tiny.REVIEW, routed) == kin_in(other, routed) == own and not caplog.records
    assert kin_in("new__task", routed) == ("new", None)
    assert "leave out nothing of its family" in caplog.text
    assert target_options(other, routed, "prior") == {**own._asdict(), "instruction": None}


def test_whether_none_of_the_experts_fits_is_told_by_a_threshold_of_the_library(world, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"inputs": "A dull film."}\n{"inputs": "Frotz quendor."}\n')
    assert main.main(["route", "--library", str(world.folder / "library"), "--examples",
                      str(tmp_path / "rows.jsonl"), "--none_of_these", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    nearest = max(line["mean_similarity"] for line in told["ranking"])
    assert told["is_sure"] is bool(nearest >= fit_threshold(world.library.routed()).at(2))


def test_of_each_row_by_itself_it_is_told_whether_any_expert_fits(world, capsys, tmp_path, monkeypatch):
    """Whoever is first: the nearest key of the library counts, by the threshold of one query."""
    monkeypatch.setattr(route_module, "fit_threshold", lambda _: Threshold((1, 3), (0.52, 2.0), (1.0, 1.0)))
    texts = ["A dull film.", "Frotz quendor.", "The meal was cold and the waiter rude."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"inputs": text}) + "\n" for text in texts))
    words = ["route", "--library", str(world.folder / "library"), "--examples", str(tmp_path / "rows.jsonl"),
             "--per_row"]
    keys = world.library.index.keys.astype(np.float64)
    vectors = world.library.encoder.embed([format_text(elm.RoutingInstance(text), world.library.text_format)
                                           for text in texts])
    expected = ((keys @ vectors.T).max(axis=0) >= 0.52).tolist()
    assert set(expected) == {True, False}
    for router in ("vote", "centroid"):
        assert main.main([*words, "--none_of_these", "--router", router, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["is_sure"] for row in rows] == expected
        first = route_rows(world.library, [elm.RoutingInstance(text) for text in texts], router)
        assert [row["expert"] for row in rows] == first
        told = route_rows(world.library, [elm.RoutingInstance(text) for text in texts], router,
                          settings=elm.RouterSettings(none_of_these=True))
        assert told == [name if sure else None for name, sure in zip(first, expected, strict=True)]
    assert main.main([*words, "--none_of_these"]) == 0
    printed = capsys.readouterr()
    cells = [line.split("\t")[-1] for line in printed.out.splitlines()]
    assert cells[0] == "any fits" and len(set(cells[1:])) == 2
    assert f"{expected.count(False)} of the 3 rows" in printed.err
    assert main.main([*words, "--json"]) == 0
    assert "is_sure" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_verb_scores_experts_on_labelled_rows_and_on_the_queries(world, calibrated, capsys, tmp_path):
    """The base is that of the cards; most accurate experts come first."""
    split, file = world.data.split(tiny.REVIEW, "validation", 12), tmp_path / "rows.jsonl"
    texts = [split.text(row) for row in range(12)]
    file.write_text("".join(json.dumps(
        {name: one[name] for name in ("inputs", "choices", "targets")}) + "\n" for one in texts))
    words = ["route", "--library", str(calibrated), "--labelled", str(file), "--json"]
    assert main.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["router"] == "labelled" and printed["num_queries"] == 12
    accuracies = [line["accuracy"] for line in printed["ranking"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [line["rows"] for line in printed["ranking"]] == [12, 12]
    for line in printed["ranking"]:
        expert = world.topic if line["expert"] == tiny.TOPIC else world.review
        rows = elm.evaluate(world.base, expert, tiny.REVIEW, data=world.data, max_rows=12)
        assert rows[0]["value"] == pytest.approx(line["accuracy"])
    assert main.main([*words, "--router", "all"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert set(every["routers"]) | set(every["unable"]) == set(ROUTERS)
    assert set(every["unable"]) <= {"fitted"}, "for which two experts are too few"
