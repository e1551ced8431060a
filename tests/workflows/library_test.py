"""The library: add and remove are inverse, an interrupted change leaves it as it was."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tiny_study as tiny
from older_library import make_older
from report_page import Page

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.experts import library_changes
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.library_changes import LibraryChange
from elm_jax.routing.embed import TfidfEncoder
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import locks, storage
from elm_jax.workflows.build_library import add_experts, build_library, training_instances
from elm_jax.workflows.route import read_examples, route
from elm_jax.workflows.row_routes import explained_routes


@pytest.fixture
def library(world, tmp_path):
    shutil.copytree(world.folder / "library", tmp_path / "library")
    return ExpertLibrary.open(tmp_path / "library")


def test_what_is_opened_is_what_was_built(world, library):
    assert list(library) == [tiny.TOPIC, tiny.REVIEW] and len(library.instances) == 80
    assert np.array_equal(library.index.keys, world.library.index.keys)
    assert library.verify() == []
    assert library.load(tiny.TOPIC).card == world.topic.card


def test_remove_undoes_add(world, library):
    keys = library.index.keys
    add_experts(library, [world.folder / "dataset"], world.data)
    assert len(library) == 3 and ExpertLibrary.open(library.path).verify() == []
    library.remove(["topic-de"])
    again = ExpertLibrary.open(library.path)
    assert list(again) == [tiny.TOPIC, tiny.REVIEW] and np.array_equal(again.index.keys, keys)
    assert not (library.path / "experts" / "topic-de").exists()


def test_keys_of_a_dataset_expert_come_from_all_its_prompts(world):
    instances = training_instances(world.folder / "dataset", world.data, 11, seed=0)
    assert len(instances) == 11
    assert len({instance.choices_expression for instance in instances}) == 2


def test_a_library_of_means_routes_by_them_and_keeps_no_text(world, tmp_path, capsys):
    """The mean of each expert's rows, in float64; the most alike with a query is first."""
    experts = [world.folder / "topic" / "expert", world.folder / "review"]
    library = build_library(tmp_path / "library", experts, world.data, encoder=world.library.encoder,
                            instances_per_expert=40, means=1)
    rows = world.library.index.by_expert().values()
    means = np.stack([own.astype(np.float64).mean(axis=0) for own in rows])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(library.index.keys, means, atol=1e-6)
    texts = [row["source"] for row in world.library.instances[::9]]
    queries = world.library.encoder.embed([f"Answer Choices: None, Instance: {text}" for text in texts])
    found = explained_routes(library, [RoutingInstance(text) for text in texts])
    assert [one.expert for one in found] == [list(library)[row] for row in (queries @ means.T).argmax(axis=1)]
    assert {one.nearest for one in found} == {None}
    files = [file for file in pathlib.Path(library.path).rglob("*") if file.is_file()]
    assert not any(text.encode() in file.read_bytes() for file in files for text in texts)
    asked = ["route", "--library", str(library.path), "--task", tiny.TOPIC, "--module", *tiny.MODULES]
    for more in ([], ["--per_row"], ["--queries", "0"], ["--router", "all"]):
        assert main([*asked, *more]) == 0 and "keeps means" in capsys.readouterr().err
    assert main([*asked, "--none_of_these"]) == 2 and "no instances" in capsys.readouterr().err


def test_means_are_the_same_in_any_order_and_added_one_by_one(world, tmp_path):
    rows = {folder: training_instances(folder, world.data, 12, seed=0)
            for folder in (world.folder / "topic" / "expert", world.folder / "review")}
    made = [ExpertLibrary.create(tmp_path / name, world.library.encoder, "choice_instance", 12, 3)
            for name in ("one", "other")]
    made[0].add(rows)
    for each in rows:
        add_experts(made[1], [each], world.data)
    opened = ExpertLibrary.open(made[1].path)
    assert opened.index.digest() == made[0].index.digest() and opened.verify() == []
    assert opened.means == 3 and len(opened.index) == 6 and opened.instances == []
    assert opened.routed().copies is None
    opened.add({world.folder / "dataset": next(iter(rows.values()))[::-1]})
    assert opened.routed().copies.tolist() == [0, 1, 0]
    assert opened.routed() is opened.routed()  # kept while nothing changes
    opened.remove(["topic-de"])
    assert ExpertLibrary.open(opened.path).index.digest() == made[0].index.digest()
    few = [RoutingInstance(text) for text in ("one", "same", "same", "same")]
    opened.add({world.folder / "dataset": few})
    assert opened["topic-de"].num_keys == 2


@pytest.mark.parametrize(("counts", "words"), [
    ({"means": 11}, "1 to 10"), ({"instances_per_expert": 0}, "instances_per_expert")])
def test_a_library_of_no_such_number_of_keys_is_refused(world, tmp_path, counts, words):
    with pytest.raises(InputError, match=words):
        build_library(tmp_path / "library", [world.folder / "review"], world.data, **counts)
    assert not (tmp_path / "library").exists()


def spoil_twice(library):
    cards = library.path / "cards" / f"{library.facts['cards']}.jsonl"
    cards.write_bytes(2 * cards.read_bytes())
    return {"sizes": {**library.facts["sizes"], "cards": cards.stat().length}}


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda _: {"text_format": "x"}, "text_format"), (lambda _: {"keys": "../experts"}, "no valid name"),
    (lambda _: {"sizes": {"cards": 1}}, "no valid sizes"), (spoil_twice, "an expert twice"),
    (lambda _: {"means_per_expert": 0}, "number of means"),
    (lambda _: {"means_per_expert": 2}, "none behind means")])
def test_what_a_library_says_wrongly_is_named(library, spoil, words):
    (library.path / "library.json").write_text(json.dumps({**library.facts, **spoil(library)}))
    with pytest.raises(InputError, match=words):
        ExpertLibrary.open(library.path)


def test_an_older_version_s_library_opens_and_its_first_change_writes_it_anew(world, library):
    before = ExpertLibrary.open(library.path)
    make_older(library.path)
    older = ExpertLibrary.open(library.path)
    assert older.verify() == [] and older.entries == before.entries
    assert older.instances == before.instances
    assert older.index.digest() == before.index.digest()
    assert main(["library", "list", "--library", str(library.path)]) == 0
    add_experts(older, [world.folder / "dataset"], world.data)
    again = ExpertLibrary.open(library.path)
    assert again.verify() == [] and again.entries == older.entries and again.instances == older.instances
    assert [os.listdir(library.path / name) for name in ("keys", "cards")] == [["000701"], ["000701.jsonl"]]
    assert again.facts == older.facts and "experts" not in again.facts
    older.remove(["topic-de"])
    assert older.index.digest() == before.index.digest() and older.entries == before.entries


def test_an_expert_more_is_written_behind_the_others(world, library):
    """What was there stays to the byte; what was killed half way is cut off by the next change."""
    place = library.path / "keys" / library.facts["keys"]
    files = [place / name for name in ("keys.f32", "experts.jsonl", "instances.jsonl")]
    files.append(library.path / "cards" / f"{library.facts['cards']}.jsonl")
    held = [file.read_bytes() for file in files]
    library_changes.begin_change(library.path, LibraryChange(library.facts["revision"] + 1, ("other",)))
    for file in files:
        file.write_bytes(file.read_bytes() + b"\0half")
    other = ExpertLibrary.open(library.path)
    assert list(other) == list(library) and np.array_equal(other.index.keys, library.index.keys)
    add_experts(library, [world.folder / "dataset"], world.data)
    for file, before in zip(files, held, strict=True):
        assert file.read_bytes().startswith(before) and b"\0half" not in file.read_bytes()
    assert sum(library.facts["sizes"].values()) == sum(len(file.read_bytes()) for file in files)
    assert ExpertLibrary.open(library.path).instances == library.instances
    assert list(other) == [tiny.TOPIC, tiny.REVIEW] and len(library.index) == 80 + len(library.instances[80:])


def test_a_change_that_may_be_under_way_is_not_cleared_where_no_lock_tells(world, library, monkeypatch):
    def refuse(*_):
        raise OSError(9, "Bad file descriptor")  # as NFS does for a folder

    library_changes.begin_change(library.path, LibraryChange(library.facts["revision"] + 1, ("other",)))
    (library.path / "experts" / "other").mkdir()
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(InputError, match="may be changing this library"):
        library.remove([tiny.TOPIC])
    assert (library.path / "experts" / "other").exists()
    os.utime(library.path / "change.json", (0, 0))
    library.remove([tiny.TOPIC])
    assert sorted(os.listdir(library.path / "experts")) == [tiny.REVIEW]


def test_an_interrupted_add_leaves_the_library_as_it_was(world, library, monkeypatch):
    def power_cut(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "commit", power_cut)
    with pytest.raises(KeyboardInterrupt):
        add_experts(library, [world.folder / "dataset"], world.data)
    monkeypatch.undo()
    again = ExpertLibrary.open(library.path)
    assert list(again) == [tiny.TOPIC, tiny.REVIEW] and again.verify() == []
    add_experts(again, [world.folder / "dataset"], world.data)
    assert again.verify() == []


def test_damage_is_found(library):
    shutil.rmtree(library.path / "experts" / tiny.TOPIC / "weights")
    faults = ExpertLibrary.open(library.path).verify()
    assert len(faults) == 1 and tiny.TOPIC in faults[0]


def test_a_truncated_file_is_found(library):
    files = pathlib.Path(library.path / "experts" / tiny.TOPIC / "weights").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    with open(largest, "rb+") as file:
        file.truncate(largest.stat().st_size // 2)
    faults = ExpertLibrary.open(library.path).verify()
    assert len(faults) == 1 and tiny.TOPIC in faults[0]


@pytest.mark.parametrize("expert_id", ["..", ".", "a/b", "", "a\\b", "-x", "x" * 201])
def test_an_id_that_would_leave_its_folder_is_refused(world, expert_id):
    with pytest.raises(InputError, match="becomes a folder's name"):
        dataclasses.replace(world.topic.card, id=expert_id)


def test_the_same_expert_twice_and_an_unknown_one_are_refused(world, library):
    with pytest.raises(InputError, match="already"):
        add_experts(library, [world.folder / "topic"], world.data)
    with pytest.raises(InputError, match=f"nearest: {tiny.TOPIC}"):
        library["mini_topic__about_wat"]


def test_another_encoder_is_refused(library):
    other = TfidfEncoder.fit(["one two three", "two three four", "five six"])
    with pytest.raises(InputError, match="made by another encoder"):
        ExpertLibrary.open(library.path, other)


def test_routing_sends_a_task_home(world, library):
    for task in (tiny.TOPIC, tiny.REVIEW):
        split = world.data.split(task, "validation")
        texts = [split.text(row)["inputs"] for row in range(32)]
        decision = route(library, texts, num_queries=32)
        assert decision.ranking[0].expert == task and decision.num_queries == 32
        assert sum(line.votes for line in decision.ranking) == 32


def test_fewer_instances_than_queries_mean_fewer_votes(library):
    decision = route(library, ["The coach left the team.", "A new film."], num_queries=32)
    assert decision.num_queries == 2
    with pytest.raises(InputError, match="at least one instance"):
        route(library, [])


def test_examples_from_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"inputs": "a b", "choices": ["x", "y"]}\n{"input": "c"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl, line 2"):
        read_examples(path)
    path.write_text('{"inputs": "a b"}\n{"inputs": "c"}\n{"inputs": " "}\n')
    with pytest.raises(InputError, match=r"no text\n  where: .*x\.jsonl, line 3\n  got: inputs=' '"):
        read_examples(path)
    path.write_text('{"inputs": "a b", "choices": ["x", "y"]}\n')
    assert read_examples(path)[0].labels == ("x", "y")


def test_a_librarys_page_shows_experts_scores_routing_and_faults(library, tmp_path, capsys):
    rows = [{"schema_version": 3, "expert": expert, "task": task, "split": "validation", "metric": "accuracy",
             "value": value, "ci95_low": 0.25, "ci95_high": 0.75, "num_instances": 8, "chance": 0.5,
             "settings": "s", "dataset": task, "model": model}
            for expert, task, value, model in (
                ("base", tiny.TOPIC, 0.25, "x"), (tiny.TOPIC, tiny.TOPIC, 0.5, None),
                (tiny.TOPIC, tiny.REVIEW, 0.625, None), (tiny.REVIEW, tiny.REVIEW, 0.5, "of other weights"))]
    store = ResultsStore(tmp_path / "results")
    for row in rows:
        store.append(TaskResult([row], []))
    assert main(["library", "report", str(library.path)]) == 0
    assert f"report: {library.path / 'report.html'}" in capsys.readouterr().out
    page = Page((library.path / "report.html").read_text())
    experts = page.table("expert", "kind")
    assert [row[:5] for row in experts] == [
        [name, "prompt", "base", name.split("__")[0], name] for name in (tiny.TOPIC, tiny.REVIEW)]
    files = pathlib.Path(library.path / "experts" / tiny.TOPIC).rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    assert float(experts[0][8]) == pytest.approx(size / 1e6, abs=0.005) and experts[0][9] == "40"
    assert page.table("expert", "own task") == [
        [tiny.TOPIC, tiny.TOPIC, "validation", "accuracy", "50.0 [25.0, 75.0]", "25.0", "62.5 (1)"]]
    shares = page.table("keys of", "go to others, %")
    assert [float(row[2]) for row in shares] == [float(row[10]) for row in experts]
    assert page.table("expert", "expert 2")[0][:2] == [tiny.TOPIC, tiny.REVIEW]
    assert "2 experts are whole" in page.text and "other weights of the same name: 1." in page.text
    assert page.open == [] and page.links == [f"#{name}" for name in page.ids]
    assert "(report_routing.png)" in (library.path / "report.md").read_text()
    shutil.rmtree(library.path / "experts" / tiny.TOPIC / "weights")
    own = str(tmp_path / "own.html")
    assert main(["library", "report", str(library.path), "--verify", "--output", own]) == 0
    assert f"Faults:\n{tiny.TOPIC}: " in Page((tmp_path / "own.html").read_text()).text.replace("\n\n", "\n")
    for wrong in (["--output", str(tmp_path / "own.md")], ["--results", str(tmp_path / "no")]):
        assert main(["library", "report", str(library.path), *wrong]) == 2
