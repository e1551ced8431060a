"""The registry holds the paper's tasks, no more and no fewer: lists typed from ELM.md and from T0's paper."""

import collections
import functools
import json
import subprocess
import sys

import pytest
from elm_jax.tasks import bbh, bigbench, categories, compositional, generative, recipes, t0_eval, t0_train

from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError
from elm_jax.workflows.tasks import show_tasks

# ELM.md, "36 training datasets (number of prompts; total 296)", to the letter.
TRAIN_COUNTS = """adversarial_qa/adversarialQA 5, ag_news 7, amazon_polarity 9,
app_reviews 4, cnn_dailymail/3.0.0 9, common_gen 9, commonsense_qa 5, cos_e/v1.11 11, cosmos_qa 13, dbpedia_14 4, dream 5,
duorc/ParaphraseRC 9, gigaword 9, hotpot_qa/fullwiki 6, imdb 11, glue/mrpc 7, multi_news 6, paws/labeled_final 12, qasc 8,
glue/qqp 6, quail 13, quarel 5, quartz 8, quoref 11, ropes 12, rotten_tomatoes 10, samsum 7, sciq 5, social_i_qa 6, trec 18,
wiki_bio 1, wiki_hop/original 9, wiki_qa 11, wiqa 8, xsum 10, yelp_review_full 7"""  # noqa: E501
# Where the paper took fewer prompts than promptsource has: those of its published configs.
TRAIN_CHOSEN = {
    ("hotpot_qa", "fullwiki"): {
        "generate_answer_affirmative", "classify_question_type", "generate_title_affirmative",
        "generate_question", "generate_explanations_affirmative", "generate_answer_interrogative"},
    ("wiki_bio", None): {"who"},
}
NLI = ("MNLI crowdsource", "should assume", "does it follow that", "GPT-3 style",
       "based on the previous passage", "justified in saying", "take the following as truth", "must be true",
       "can we infer", "guaranteed/possible/impossible", "always/sometimes/never", "does this imply",
       "consider always/sometimes/never", "claim true/false/inconclusive", "guaranteed true")
# ELM.md, "11 unseen datasets, 113 (dataset, prompt) pairs".
UNSEEN = {
    ("hellaswag", None): (
        "complete_first_then", "Randomized prompts template", "Predict ending with hint", "how_ends",
        "if_begins_how_continues"),
    ("story_cloze", "2016"): (
        "Answer Given options", "Choose Story Ending", "Movie What Happens Next",
        "Story Continuation and Options", "Novel Correct Ending"),
    ("anli", "r1"): NLI, ("anli", "r2"): NLI, ("anli", "r3"): NLI, ("super_glue", "cb"): NLI,
    ("super_glue", "copa"): (
        "exercise", "i_am_hesitating", "plausible_alternatives", "C1 or C2? premise, so/because…",
        "best_option", "more likely", "cause_effect", "choose"),
    ("super_glue", "rte"): (
        "MNLI crowdsource", "guaranteed true", "can we infer", "GPT-3 style", "does this imply",
        "should assume", "does it follow that", "based on the previous passage", "justified in saying",
        "must be true"),
    ("super_glue", "wsc.fixed"): (
        "does the pronoun refer to", "by p they mean", "in other words", "I think they mean",
        "does p stand for", "GPT-3 Style", "replaced with", "p is/are r", "the pronoun refers to",
        "Who or what is/are"),
    ("super_glue", "wic"): (
        "question-context-meaning-with-label", "question-context-meaning", "grammar_homework",
        "affirmation_true_or_false", "GPT-3-prompt", "same_sense", "question-context",
        "GPT-3-prompt-with-label", "polysemous", "similar-sense"),
    ("winogrande", "winogrande_xl"): (
        "does underscore refer to", "stand for", "underscore refer to", "fill in the blank", "Replace"),
}
BIGBENCH = """code_line_description, conceptual_combinations, formal_fallacies_syllogisms_negation,
hindu_knowledge, known_unknowns, language_identification, logic_grid_puzzle, logical_deduction,
misconceptions, movie_dialog_same_or_different, strategyqa, vitaminc_fact_verification, winowhy"""
# Sanh et al. 2022, figure 2, with the closed-book data sets as ELM.md has them.
T0_CATEGORIES = {
    "multiple_choice_qa": "commonsense_qa dream quail quartz social_i_qa wiqa cosmos_qa qasc quarel sciq "
                          "wiki_hop cos_e",
    "extractive_qa": "adversarial_qa quoref ropes duorc",
    "closed_book_qa": "hotpot_qa wiki_qa",
    "structure_to_text": "common_gen wiki_bio",
    "sentiment": "amazon_polarity app_reviews imdb rotten_tomatoes yelp_review_full",
    "summarization": "cnn_dailymail gigaword multi_news samsum xsum",
    "topic_classification": "ag_news dbpedia_14 trec",
    "paraphrase_identification": "mrpc paws qqp",
}


@functools.cache
def registered() -> list[list]:
    """Role, data set, config and template of every task, in a process that no other test has touched."""
    program = ("import json\nfrom elm_jax.data import registry\nregistry.import_tasks(['elm_jax.tasks'])\n"
               "tasks = map(registry.get_task, registry.task_names())\n"
               "print(json.dumps([[t.role, t.dataset, t.config, t.template] for t in tasks]))")
    return json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)


def pairs(role: str) -> dict[tuple[str, str | None], set[str]]:
    """Data sets and template names of the registered tasks of a role."""
    found = collections.defaultdict(set)
    for own, dataset, config, template in registered():
        if own == role:
            found[dataset, config].add(template)
    return dict(found)


def train_counts() -> dict[tuple[str, str | None], int]:
    counts = {}
    for entry in TRAIN_COUNTS.replace("\n", " ").split(", "):
        name, count = entry.split()
        dataset, _, config = name.partition("/")
        counts[dataset, config or None] = int(count)
    return counts


def test_the_typed_lists_are_whole():
    assert len(train_counts()) == 36 and sum(train_counts().values()) == 296
    assert len(UNSEEN) == 11 and sum(map(len, UNSEEN.values())) == 113


def test_training_tasks_are_the_296_of_the_paper():
    found = pairs("train")
    assert {key: len(names) for key, names in found.items()} == train_counts()
    for key, names in found.items():
        whole = set(templates.find_templates(*key, [templates.installed_folder()]))
        assert names == TRAIN_CHOSEN.get(key, whole), key
    assert {"Sentiment with choices ", "given_a_choice_of_categories ", "Read And Extract "} <= set().union(
        *found.values())


def test_unseen_tasks_are_the_113_pairs():
    assert pairs("unseen") == {key: set(names) for key, names in UNSEEN.items()}
    assert {registry.get_task(name).kind for name in t0_eval.TASKS} == {"rank"}
    assert {registry.get_task(name).splits for name in t0_eval.TASKS} == {("validation",)}
    assert set(registry.get_mixture("t0_unseen").tasks) == set(t0_eval.TASKS)
    assert registry.get_mixture("t0_unseen").eval_rows is None


def test_what_the_paper_leaves_out_has_another_role():
    assert pairs("extra") == {
        ("hotpot_qa", "fullwiki"): {
            "generate_answer_and_explanations", "generate_explanations_interrogative"},
        ("kilt_tasks", "hotpotqa"): {
            "complex_question", "combining_facts", "formulate", "final_exam", "straighforward_qa"}}
    assert set(pairs("unseen_extra")) == {("hellaswag", None), ("story_cloze", "2016"),
                                          ("super_glue", "copa"), ("winogrande", "winogrande_xl")}


def test_bigbench_and_bbh():
    assert [registry.get_task(name).config for name in bigbench.TASKS] == BIGBENCH.replace(
        "\n", " ").split(", ")
    assert {config for _, config in pairs("bigbench_extra")} == {"novel_concepts", "linguistics_puzzles"}
    found = {config for _, config in pairs("bbh")}
    assert len(found) == 27
    assert registry.get_mixture("bbh").tasks == tuple(bbh.TASKS)
    folder = row_files.data_dir()
    if folder is not None and (folder / "bbh").exists():
        assert found == {path.name.split(".")[0] for path in (folder / "bbh").iterdir()}


def test_categories_are_t0_s():
    assert {category: {registry.get_task(name).dataset if registry.get_task(name).dataset != "glue"
                       else registry.get_task(name).config for name in registry.get_mixture(mixture).tasks}
            for category in T0_CATEGORIES for mixture in [f"t0_{category}"]} == {
        category: set(names.split()) for category, names in T0_CATEGORIES.items()}
    assert set(categories.CATEGORIES) == set(T0_CATEGORIES) and len(T0_CATEGORIES) == 8
    assert all(registry.get_task(name).category for name in (*t0_train.TASKS, *t0_eval.TASKS))
    assert not set(categories.UNSEEN_CATEGORIES) & set(categories.CATEGORIES)


def test_mixtures_and_their_caps():
    assert set(registry.get_mixture("t0_train").tasks) == set(registry.task_names(role="train")) & set(
        t0_train.TASKS)
    assert registry.get_mixture("t0_train").dataset_cap == 100_000
    for cap in (10_000, 50_000, 500_000):
        capped = registry.get_mixture(f"t0_train_cap_{cap}")
        assert capped.dataset_cap == cap and capped.tasks == registry.get_mixture("t0_train").tasks
        assert registry.get_mixture(f"t0_sentiment_cap_{cap}").dataset_cap == cap
    assert registry.get_mixture("t0_seen").eval_rows == registry.get_mixture("generative").eval_rows == 300
    assert len(registry.get_mixture("hotpot_qa_fullwiki").tasks) == 6
    assert "kilt_tasks_hotpotqa" in registry.mixture_names()


def test_generative_tasks_are_learned_in_elm_md_s_order():
    assert [dataset.name for dataset in generative.DATASETS] == [
        "wiki_auto", "gigaword_constrained", "haiku", "covid_qa_deepset", "eli5", "empathetic_dialogues",
        "esnli", "twitter_top20"]
    assert [dataset.name for dataset in generative.TEST_DATASETS] == ["asset"]


def test_compositions_join_summaries_and_translations():
    languages = [composition.language for composition in compositional.COMPOSITIONS]
    assert languages == ["ko", "es", "zh", "fr", "ja"]
    for composition in compositional.COMPOSITIONS:
        for name in composition.targets:
            task = registry.get_task(name)
            assert task.parts == composition.parts and task.splits == ("validation",)
            asked = task.load_template().render(
                task.adapt({"document": "A long text.", "summary": "z"}), seed=0).inputs
            assert compositional.LANGUAGES[composition.language] in asked and "A long text." in asked
        first, second = map(registry.get_task, composition.parts)
        assert first.category == "summarization" and "train" in second.splits
        row = {"translation": {"en": "Good day", composition.language: "x"}}
        rendered = second.load_template().render(second.adapt(row), seed=0)
        assert rendered.targets == "x" and rendered.inputs.endswith("Good day")


def test_recipes_are_elm_md_s():
    of = {task.dataset_name: task.recipe for task in map(registry.get_task, t0_train.TASKS)}
    capped = {"cnn_dailymail_3_0_0", "gigaword", "hotpot_qa_fullwiki", "multi_news", "samsum", "wiki_bio",
              "wiki_qa", "xsum"}
    assert {key for key, recipe in of.items() if recipe.max_examples == 10_000} == capped
    assert {recipe.max_examples for key, recipe in of.items() if key not in capped} == {50_000}
    assert {key for key, recipe in of.items() if recipe.epochs == 10} == {"trec"}
    assert {recipe.source_length for recipe in of.values()} == {256, 512}
    assert {recipe.target_length for recipe in of.values()} == {128}
    sizes = collections.defaultdict(set)
    for key, recipe in of.items():
        sizes[recipe.batch_size].add(key)
    assert sizes.pop(1) == {"multi_news"}
    assert sizes.pop(2) == {"cnn_dailymail_3_0_0", "hotpot_qa_fullwiki", "samsum", "wiki_qa", "xsum"}
    assert sizes.pop(4) == {"adversarial_qa_adversarialqa", "common_gen", "commonsense_qa",
                            "duorc_paraphraserc", "quoref", "ropes", "wiki_hop_original"}
    assert sizes.pop(16) == {"glue_mrpc", "paws_labeled_final", "qasc", "rotten_tomatoes", "social_i_qa",
                             "trec"}
    assert list(sizes) == [8]
    assert recipes.T0_CAP == 500_000 and len(of) == 36
    with_one = {name for name in registry.task_names() if registry.get_task(name).recipe is not None}
    extra = {name for name in registry.task_names(role="extra") if name.startswith("hotpot_qa_fullwiki")}
    assert with_one == set(t0_train.TASKS) | extra and recipes.recipe_of("my_own") is None
    assert all(registry.get_task(name).recipe is None for name in t0_eval.TASKS + bigbench.TASKS + bbh.TASKS)


@pytest.mark.parametrize("name", [
    "bbh_snarks__bbh", "bigbench_winowhy__bigbench", "bigbench_novel_concepts__bigbench",
    "super_glue_rte__can_we_infer", "hellaswag__open_ended_start"])
def test_tasks_for_evaluation_are_not_trained_on(name):
    with pytest.raises(InputError, match=rf"(?s)for evaluation only.*{name}.*none of unseen, "):
        registry.check_trainable(["ag_news__classify", name])
    registry.check_trainable(["ag_news__classify", "a_task_whose_arrays_alone_are_here"])


@pytest.mark.parametrize("role, count, datasets", [("train", 296, 36), ("unseen", 113, 11)])
def test_listing_filters_by_role(tmp_path, role, count, datasets):
    found = subprocess.run([sys.executable, "-m", "elm_jax.cli", "tasks", "list", "--json", "--role", role],
                           check=True, capture_output=True, text=True, cwd=tmp_path)
    rows = json.loads(found.stdout)["tasks"]
    assert len(rows) == count and len({row["dataset"] for row in rows}) == datasets
    assert {row["role"] for row in rows} == {role}


def test_listing_filters_by_more():
    listed = show_tasks.list_tasks(["elm_jax.tasks"], category="sentiment", kind="generation")
    assert {row["dataset"] for row in listed["tasks"]} == {"app_reviews", "imdb"}
    assert listed["mixtures"] == {}
    with pytest.raises(InputError, match="Unknown category 'sentimental'"):
        show_tasks.list_tasks(["elm_jax.tasks"], category="sentimental")
