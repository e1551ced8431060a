"""The study over a whole data folder names everything that the folder can serve, once."""

import collections
import json
import os
import pathlib

import pytest
from checkout import ROOT

from elm_jax.cli import gin_config
from elm_jax.data.registry import registry
from elm_jax.workflows.study import study_checks

TRAIN = [
    ("ag_news", None), ("common_gen", None), ("commonsense_qa", None), ("cos_e", "v1.11"),
    ("cosmos_qa", None), ("dbpedia_14", None), ("dream", None), ("gigaword", None), ("glue", "mrpc"),
    ("imdb", None), ("kilt_tasks", "hotpotqa"), ("quail", None), ("ropes", None), ("sciq", None),
    ("social_i_qa", None), ("trec", None), ("wiki_qa", None), ("xsum", None),
]
UNSEEN = [
    ("anli", "r1"), ("anli", "r2"), ("anli", "r3"), ("hellaswag", None), ("story_cloze", "2016"),
    ("super_glue", "rte"), ("super_glue", "wic"), ("super_glue", "wsc.fixed"),
    ("winogrande", "winogrande_xl"),
]
BIGBENCH = (
    "code_line_description", "conceptual_combinations", "formal_fallacies_syllogisms_negation",
    "hindu_knowledge", "known_unknowns", "language_identification", "linguistics_puzzles",
    "logic_grid_puzzle", "logical_deduction", "misconceptions", "movie_dialog_same_or_different",
    "novel_concepts", "strategyqa", "vitaminc_fact_verification", "winowhy",
)
BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa",
    "dyck_languages", "formal_fallacies", "geometric_shapes", "hyperbaton",
    "logical_deduction_five_objects", "logical_deduction_seven_objects",
    "logical_deduction_three_objects", "movie_recommendation", "multistep_arithmetic_two", "navigate",
    "object_counting", "penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names",
    "salient_translation_error_detection", "snarks", "sports_understanding", "temporal_sequences",
    "tracking_shuffled_objects_five_objects", "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)


@pytest.fixture(scope="module")
def study():
    gin_config.parse(["studies/t0_data.gin"], ["WORKDIR='t0data'"])
    return study_checks.expanded(gin_config.build("study"))


def sources(tasks):
    """(data set, config) of each task, in the tasks' order."""
    return [(registry.get_task(task).dataset, registry.get_task(task).config) for task in tasks]


def test_each_training_data_set_has_one_expert(study):
    assert sorted(sources(study.prompt_tasks), key=str) == sorted(TRAIN, key=str)
    assert study.multitask_names == study.prompt_tasks
    categories = {registry.get_task(task).category for task in study.prompt_tasks}
    assert len(categories) == 8 and None not in categories
    assert len(study.datasets) >= 2


def test_each_unseen_data_set_is_scored_with_one_prompt_of_the_paper(study):
    assert sources(study.unseen_tasks) == UNSEEN
    assert {registry.get_task(task).role for task in study.unseen_tasks} == {"unseen"}


def test_every_benchmark_task_is_scored(study):
    assert sorted(study.bigbench_tasks) == [f"bigbench_{name}__bigbench" for name in sorted(BIGBENCH)]
    assert sorted(study.bbh_tasks) == [f"bbh_{name}__bbh" for name in sorted(BBH)]


def test_the_lists_are_those_of_the_data_folder(study, monkeypatch):
    folder = os.environ.get("ELM_DATA_DIR") or ROOT.parent / "shared" / "data"
    path = pathlib.Path(folder) / "index.json"
    if not path.exists():
        pytest.skip("no data folder with an index.json")
    monkeypatch.setenv("ELM_DATA_DIR", str(folder))
    by_role = collections.defaultdict(list)
    for row in json.loads(path.read_text()):
        by_role[row["role"]].append((row["name"], row["config"]))
    assert sorted(by_role["train"], key=str) == sorted(TRAIN, key=str)
    assert sorted(by_role["unseen"], key=str) == UNSEEN
    assert set(by_role["generative_eval"]) <= set(sources(study.generative_tasks))
    scored = {f"{name}_{of}__{name}" for name in ("bigbench", "bbh") for _, of in by_role[name]}
    absent = {row["task"] for row in study_checks.absent_tasks(study)}
    assert absent == {*study.bigbench_tasks, *study.bbh_tasks} - scored
