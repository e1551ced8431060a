"""Prepared arrays serve every documented use of a task's data, with no data folder and no TensorFlow."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import tiny_study as tiny

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing import task_data
from elm_jax.data.preparing.prepared_folder import PreparedFolder
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError
from elm_jax.vocabularies.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()


def save_split(folder, task, split):
    text = {"inputs": "a", "targets": "b", "choices": [], "index": 0}
    row = {"inputs": np.array([5, 1]), "targets": np.array([6, 1]), "text": text}
    info = {"kind": "generation", "vocabulary": VOCABULARY.fingerprint,
            "vocabulary_facts": VOCABULARY.facts()}
    PreparedSplit.from_rows(task, split, info, [row]).save(folder / task / split)


@pytest.fixture
def no_data(monkeypatch):
    """Neither a data folder nor a way to prepare."""
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    monkeypatch.setattr(TaskData, "_prepare", lambda *_: pytest.fail("arrays that are there are not used"))


@pytest.mark.parametrize("max_rows", [8, 149, 10_000])
def test_a_whole_split_serves_every_subset_as_preparing_would(world, monkeypatch, max_rows):
    made = TaskData(world.base.vocabulary, tiny.MODULES).split(
        tiny.REVIEW, "validation", max_rows)
    world.data.split(tiny.REVIEW, "validation")
    monkeypatch.setattr(TaskData, "_prepare", lambda *_: pytest.fail("the whole split is not used"))
    cut = tiny.make_data(world.base, world.folder).split(tiny.REVIEW, "validation", max_rows)
    assert cut.info == made.info and len(cut) == min(max_rows, 150)
    for name, values in made.arrays.items():
        np.testing.assert_array_equal(cut.arrays[name], values, err_msg=name)


def test_a_limit_without_rows_is_refused(world):
    world.data.split(tiny.REVIEW, "validation")
    with pytest.raises(InputError, match="max_rows is not a number of rows"):
        world.data.split(tiny.REVIEW, "validation", 0)


def test_a_mixture_is_what_is_prepared_of_it(tmp_path, no_data, caplog):
    save_split(tmp_path, "trec__trec2", "train")
    save_split(tmp_path, "trec__trec1", "train")
    (tmp_path / "trec__pick_the_best_descriptor" / "train").mkdir(parents=True)  # half written
    data = TaskData(VOCABULARY, prepared_dir=str(tmp_path))
    with caplog.at_level(logging.INFO):
        tasks = data.tasks_of("trec")
    assert sorted(tasks) == ["trec__trec1", "trec__trec2"]
    assert "mixture trec: 2 of 18 tasks have data" in caplog.text
    assert [len(data.split(task, "train")) for task in tasks] == [1, 1]


def test_a_mixture_without_data_and_arrays_says_both_cures(tmp_path, no_data):
    with pytest.raises(InputError, match=r"no data for any task of mixture trec(.|\n)*prepared arrays"):
        TaskData(VOCABULARY, prepared_dir=str(tmp_path)).tasks_of("trec")


def test_the_splits_of_a_task_are_its_own():
    data = TaskData(VOCABULARY)
    assert data.splits_of("super_glue_rte__can_we_infer") == ("validation",)
    assert data.splits_of("ag_news__classify") == ("train", "validation")
    bigbench = next(name for name in task_data.registry.task_names(role="bigbench"))
    assert data.splits_of(bigbench) == ("test",)


def test_arrays_serve_where_the_data_have_only_the_other_split(world, tmp_path, monkeypatch):
    rows = tmp_path / "data" / "ag_news"
    rows.mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"passage {number}", "label": 1}) + "\n" for number in range(5))
    for split in ("train", "validation"):
        (rows / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path / "data"))

    def data() -> TaskData:
        return TaskData(world.base.vocabulary, prepared_dir=str(tmp_path / "arrays"))

    assert len(data().split("ag_news__classify", "validation")) == 5
    (rows / "validation.jsonl").unlink()
    assert len(data().split("ag_news__classify", "validation")) == 5
    (rows / "validation.jsonl").write_text(lines + lines)
    with pytest.raises(InputError, match="made of other rows"):
        data().split("ag_news__classify", "validation")
    (rows / "validation.jsonl").write_text(lines)
    task = task_data.registry.get_task("ag_news__classify")
    monkeypatch.setitem(task_data.registry._TASKS, task.name, dataclasses.replace(task, cut_prompt="left"))
    with pytest.raises(InputError, match="made with cut_prompt='right', and now the task has 'left'"):
        data().split(task.name, "validation")
    assert TaskData(world.base.vocabulary).split(task.name, "validation").subset(2).cut_prompt == "left"


def test_what_a_kill_leaves_is_not_taken_for_arrays(tmp_path, no_data):
    save_split(tmp_path, "trec__trec1", "train")
    save_split(tmp_path, "trec__trec2", "train.0badcafe.partial")
    assert TaskData(VOCABULARY, prepared_dir=str(tmp_path)).tasks_of("trec") == ["trec__trec1"]


@pytest.mark.parametrize(("key", "name"), [("name", "../../x"), ("split", "../x"), ("name", None)])
def test_a_prepared_split_names_no_place_outside(key, name, tmp_path):
    save_split(tmp_path, "d__t", "train")
    place = tmp_path / "d__t" / "train"
    head = json.loads((place / "info.json").read_text())
    (place / "info.json").write_text(json.dumps({**head, key: name}))
    with pytest.raises(InputError, match=f"split's {key} must be the name of a file|info.json: {key}"):
        PreparedSplit.open(place)
    with pytest.raises(InputError, match="name of a task must be"):
        PreparedFolder(tmp_path, VOCABULARY).find("../x", "train", None)


def test_arrays_of_another_vocabulary_say_what_differs(tmp_path, no_data):
    save_split(tmp_path, "d__t", "train")
    other = TaskData(ByteVocabulary(7), prepared_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"another voc(.|\n)*ids: 384 there, 266 here; sentinels: 125"):
        other.split("d__t", "train")


def test_contents_are_compared_with_digests_once_a_run_and_ids_with_the_vocabulary(tmp_path, no_data):
    save_split(tmp_path, "d__t", "train")
    path = tmp_path / "d__t" / "train" / "tokens.npy"
    written = path.read_bytes()
    data = TaskData(VOCABULARY, prepared_dir=str(tmp_path))
    data.split("d__t", "train")
    path.write_bytes(written[:-4] + b"\x02\0\0\0")
    assert len(data.split("d__t", "train", 1)) == 1, "read again, not hashed again"
    with pytest.raises(InputError, match=r"not the one that was written(.|\n)*tokens\.npy"):
        TaskData(VOCABULARY, prepared_dir=str(tmp_path)).split("d__t", "train")
    path.write_bytes(written)
    info = json.loads((path.parent / "info.json").read_text())
    del info["arrays"]  # as older versions wrote it
    (path.parent / "info.json").write_text(json.dumps(info))
    (path.parent / "COMMITTED.json").write_text('{"schema_version": 1}')
    assert len(TaskData(VOCABULARY, prepared_dir=str(tmp_path)).split("d__t", "train")) == 1
    path.write_bytes(written[:-4] + b"\x00\x02\0\0")
    with pytest.raises(InputError, match=r"no such id(.|\n)*1 to 512(.|\n)*0 to 383"):
        TaskData(VOCABULARY, prepared_dir=str(tmp_path)).split("d__t", "train")
