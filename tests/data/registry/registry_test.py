"""The registry knows tasks by name without data, and serves those that have some."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from checkout import ROOT
from elm_jax.tasks import facts, generative, passages, t0_eval, t0_train

from elm_jax.data.prompts import templates
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError

DATA = pathlib.Path(os.environ.get("ELM_DATA_DIR")
                    or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not (DATA / "index.json").exists(),
                                reason="no data folder: set ELM_DATA_DIR")
ASK = PromptTemplate("Ask", "{{text}} ||| {{answer_choices[label]}}", "no ||| yes", ("Accuracy",))


@pytest.fixture
def own_registry(monkeypatch):
    """An empty registry for one test."""
    monkeypatch.setattr(registry, "_TASKS", {})
    monkeypatch.setattr(registry, "_MIXTURES", {})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    (tmp_path / "toys").mkdir()
    return tmp_path


def write_rows(folder: pathlib.Path, split: str, rows: list[dict]) -> None:
    (folder / "toys" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add(template: PromptTemplate = ASK, **changes: object) -> str:
    return registry.add_prompted_task(
        "toys", None, template, **{"kind": "rank", "role": "train", **changes})


def test_rows_are_rendered_in_order_and_skipped_rows_left_out(own_registry, folder):
    rows = [{"text": f"t{number}", "label": number % 2} for number in range(4)]
    write_rows(folder, "train", [*rows, {"text": "", "label": 1}])
    task = registry.get_task(add())
    found = list(task.render_rows("train"))
    assert [(index, rendered.inputs, rendered.targets) for index, rendered in found] == [
        (0, "t0", "no"), (1, "t1", "yes"), (2, "t2", "no"), (3, "t3", "yes")]
    assert task.num_rows("train") == 5
    assert found[0][1].choices == ("no", "yes")


def test_rank_rows_need_a_right_choice(own_registry, folder):
    write_rows(folder, "train", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    odd = PromptTemplate("Odd", "{{text}} ||| {{'no' if label else 'maybe'}}", "no ||| yes")
    ranked = registry.get_task(add(odd))
    assert [index for index, _ in ranked.render_rows("train")] == [1]
    free = registry.get_task(registry.add_prompted_task(
        "toys", "free", odd, kind="generation", role="train",
        rows=lambda split: row_files.read_rows("toys", None, split)))
    assert [index for index, _ in free.render_rows("train")] == [0, 1]


def test_a_function_s_rows_are_read_once_for_their_digest(own_registry):
    calls = []

    def rows(split: str) -> list[dict]:
        calls.append(split)
        return [{"text": split, "label": 0}]

    task = registry.get_task(add(rows=rows))
    digests = {split: task.source_digest(split) for split in ("train", "validation")}
    assert digests["train"] != digests["validation"]
    assert digests == {split: task.source_digest(split) for split in ("train", "validation")}
    assert calls == ["train", "validation"]


def test_lacking_field_is_named_with_its_row(own_registry, folder):
    write_rows(folder, "train", [{"text": "a", "label": 0}, {"body": "b", "label": 1}])
    with pytest.raises(InputError, match=r"(?s)'Ask'.*train.jsonl, line 2\n.*missing text.*body, label"):
        list(registry.get_task(add()).render_rows("train"))


def test_adapted_rows(own_registry, folder):
    write_rows(folder, "train", [{"body": "a", "right": True}])
    task = registry.get_task(
        add(adapt=lambda row: {"text": row["body"], "label": int(row["right"])}))
    assert next(task.render_rows("train"))[1].targets == "yes"


def test_unknown_names_give_the_three_nearest(own_registry):
    for letter in "abcde":
        add(PromptTemplate(f"ask {letter}", "a ||| b", None))
    with pytest.raises(InputError, match=r"nearest: toys__ask_b, toys__ask_\w, toys__ask_\w\n"):
        registry.get_task("toys__ask_bb")
    registry.add_mixture("toys", registry.task_names())
    with pytest.raises(InputError, match=r"(?s)Unknown mixture 'toy'.*nearest: toys\n"):
        registry.mixture_tasks("toy")


@pytest.mark.parametrize("change, message", [
    ({"kind": "ranks"}, r"Unknown kind of a task 'ranks'(?s:.*)nearest: rank"),
    ({"role": "seen"}, r"Unknown role of a task 'seen'"),
    ({}, r"(?s)name toys__ask is taken.*'ASK'.*'Ask'"),
])
def test_bad_tasks_are_refused(own_registry, change, message):
    if not change:
        add()
    with pytest.raises(InputError, match=message):
        add(PromptTemplate("ASK", "a ||| b", None), **change)


def test_bad_mixtures_are_refused(own_registry):
    task = add()
    for tasks, cap, message in (([], 1, "needs tasks"), ([task], 0, "cap"), (["x"], 1, "Unknown")):
        with pytest.raises(InputError, match=message):
            registry.add_mixture("toys", tasks, dataset_cap=cap)
    registry.add_mixture("toys", [task])
    with pytest.raises(InputError, match="taken"):
        registry.add_mixture("toys", [task])


def test_split_must_be_one_of_the_task(own_registry):
    task = registry.get_task(add(splits=("validation",)))
    with pytest.raises(InputError, match=r"(?s)no split 'train'.*validation"):
        task.read_rows("train")


def test_availability_follows_data_and_index(own_registry, folder):
    task, other = add(), add(PromptTemplate("Other", "{{title}} ||| b", None))
    registry.add_mixture("toys", [task, other])
    assert registry.task_names() == [task, other]
    assert registry.task_names(available_only=True) == []
    with pytest.raises(InputError, match=r"(?s)no data for any task of mixture toys.*ELM_DATA_DIR"):
        registry.mixture_tasks("toys")
    write_rows(folder, "train", [{"text": "a", "label": 0}])
    assert registry.mixture_tasks("toys") == [task, other]
    (folder / "index.json").write_text(json.dumps([{
        "name": "toys", "config": None, "splits": {"train": 9}, "unusable_templates": ["Other"]}]))
    assert registry.mixture_tasks("toys") == [task]
    assert "lack a field" in registry.describe_task(other)["unavailable"]


def test_mixture_rates_share_the_cap_of_a_data_set(own_registry):
    def rows(count: int) -> registry.RowReader:
        return lambda split: [{"text": "a", "label": 0}] * count

    names = [
        registry.add_prompted_task(dataset, None, PromptTemplate(own, "a ||| b", None),
                                   kind="generation", role="train", rows=rows(count))
        for dataset, own, count in (("big", "x", 90), ("big", "y", 20), ("tiny", "x", 30))]
    registry.add_mixture("all", names, dataset_cap=60)
    assert registry.mixture_rates("all") == {"big__x": 30.0, "big__y": 20.0, "tiny__x": 30.0}
    # T0 counts rows of a data set up to the cap in every prompt, and shares the cap above it.
    for cap, x in ((61, 30.0), (89, 44.0), (90, 90.0)):
        name = registry.capped_mixture("all", cap, t0_rates=True)
        assert registry.mixture_rates(name) == {"big__x": x, "big__y": 20.0, "tiny__x": 30.0}


def test_unknown_registry_module_is_one_clear_error():
    with pytest.raises(InputError, match="no_such_module cannot be imported"):
        registry.import_tasks(["no_such_module"])


def test_unseen_data_sets_offer_no_training_rows():
    for name in t0_eval.TASKS:
        assert registry.get_task(name).splits == ("validation",)
    seen = {(dataset.name, dataset.config) for dataset in t0_train.DATASETS}
    assert not seen & {(dataset.name, dataset.config) for dataset in t0_eval.DATASETS}


def test_own_templates_are_those_of_the_table():
    own = {dataset.name: dataset for dataset in (*generative.DATASETS, *generative.TEST_DATASETS)
           if dataset.name != "esnli"}
    assert set(os.listdir(facts.TEMPLATE_FOLDER)) == {*own, "opus100", "xsum_translated"}
    for name, dataset in own.items():
        found = templates.find_templates(name, None, [facts.TEMPLATE_FOLDER])
        assert set(found) == set(dataset.templates)


def test_importing_the_tables_reads_nothing_and_needs_no_tensorflow(tmp_path):
    code = (
        "import sys, builtins\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0]))"
        " if event == 'open' else None)\n"
        "import elm_jax.tasks\n"
        "from elm_jax.data import registry\n"
        "assert len(registry.task_names()) > 400\n"
        "assert not {'tensorflow', 'seqio', 'promptsource'} & set(sys.modules)\n"
        "assert not [p for p in opened if p.endswith(('.yaml', '.jsonl', '.gz', 'index.json'))]\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path,
                   env={**os.environ, "ELM_DATA_DIR": str(DATA)})


@needs_data
def test_every_pair_of_the_data_folder_is_served(monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    entries = json.loads((DATA / "index.json").read_text())
    served = {(task.dataset, task.config, task.template)
              for task in map(registry.get_task, registry.task_names(available_only=True))}
    for entry in entries:
        key = (entry["name"], entry["config"])
        if entry["templates"]:
            usable = set(templates.find_templates(*key, [DATA]))
            usable -= set(entry.get("unusable_templates", ()))
            assert usable == {name for *found, name in served if tuple(found) == key}, key
        else:
            assert key in {found[:2] for found in served}, key
    assert len(registry.task_names(available_only=True)) >= 282


@needs_data
def test_every_served_task_renders_and_is_of_its_template_s_kind(monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    # The reader of whole files is replaced: some rows of each are enough.
    monkeypatch.setattr(row_files, "read_rows", lambda *name: [
        row for row, _ in zip(row_files.read_lines(row_files.find_file(*name)), range(500),
                              strict=False)])
    for name in registry.task_names(available_only=True):
        task = registry.get_task(name)
        if task.rows is not None:  # another test's
            continue
        for split in task.splits[-1:]:
            assert next(task.render_rows(split), None), name
        unlike = {"imdb__negation_template_for_positive_and_negative"}
        assert (task.load_template().kind == task.kind) != (name in unlike), name


@needs_data
def test_template_that_the_rows_do_not_fit_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    task = registry.get_task("dbpedia_14__given_a_choice_of_categories_")
    with pytest.raises(InputError, match=r"(?s)'given_a_choice_of_categories '.*missing title"):
        next(task.render_rows("train"))


def test_passages_come_from_training_data_sets_only():
    training = {(dataset.name, dataset.config) for dataset in t0_train.DATASETS}
    assert {(field.dataset, field.config) for field in passages.PASSAGES} <= training
    answers = {"label", "answer", "answers", "target", "summary", "question", "choices", "correct_answer"}
    assert not answers & {name for field in passages.PASSAGES for name in field.fields}


@pytest.mark.slow  # reads the real data whole
@needs_data
def test_passages_hold_no_text_that_is_evaluated_on(monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    found = passages.read_passages()
    assert len(found) > 19_000
    seen = {run for passage in found for run in _runs_of_words(passage)}
    scored = 0
    for dataset, config, split in _scored_files():
        for row in row_files.read_rows(dataset, config, split):
            for text in _strings(row):
                shared = seen.intersection(_runs_of_words(text))
                assert not shared, (dataset, config, split, shared)
                scored += 1
    assert scored > 20_000


def _scored_files() -> set[tuple[str, str | None, str]]:
    """What the registry says that can be scored: all of the unseen, validation rows of the others."""
    found = set()
    for name in registry.task_names(available_only=True):
        task = registry.get_task(name)
        splits = {"validation"} if task.role == "train" else {"train", "validation", "test"}
        found |= {(task.dataset, task.config, split) for split in splits
                  if row_files.find_file(task.dataset, task.config, split)}
    return found


def _strings(value):
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _runs_of_words(text: str) -> list[int]:
    """Hashes of all runs of twelve words, in lower case and without punctuation."""
    words = "".join(character if character.isalnum() or character == "_" else " "
                    for character in text.casefold()).split()
    return [hash(" ".join(words[start:start + 12])) for start in range(len(words) - 11)]
