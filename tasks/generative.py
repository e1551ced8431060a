"""The generative tasks, in the order in which ELM.md lets experts learn them one after another.

Eight of the data sets have no promptsource templates, or none that fit; ours lie in ``tasks/templates``.
``gigaword_constrained`` asks of gigaword's rows a title that starts with, contains or ends with a word.
"""

from elm_jax.tasks.facts import Dataset, add_datasets
from elm_jax.tasks.recipes import SEEN_ROWS

from elm_jax.data.registry import registry

DATASETS = (
    Dataset(
        "wiki_auto", "auto_full_with_split",
        rank=(),
        generation=("easier to read", "simpler words"),
        metrics=("bleu",),
    ),
    Dataset(
        "gigaword_constrained", None,
        rank=(),
        generation=("title that starts with", "title that contains", "title that ends with"),
        source=("gigaword", None),
    ),
    Dataset(
        "haiku", None,
        rank=(),
        generation=("as asked", "poem wanted"),
    ),
    Dataset(
        "covid_qa_deepset", None,
        rank=(),
        generation=("question after abstract", "question before context"),
    ),
    Dataset(
        "eli5", None,
        rank=(),
        generation=("explain simply", "forum answer"),
    ),
    Dataset(
        "empathetic_dialogues", None,
        rank=(),
        generation=("feeling and situation to words", "situation to words"),
    ),
    Dataset(
        "esnli", None,
        rank=(
            "determine_premise_hypothesis_relation", "premise_hypothesis_relation",
            "choose_the_correct_class", "determine_the_relation", "does_premise_imply_hypothesis",
            "does_premise_contradicts_hypothesis",
        ),
        generation=(
            "explain_the_choice", "elaborate_on_the_choice", "provide_explaination_to_the_choice",
            "relate_premise_to_hypothesis_with_explanation",
        ),
    ),
    Dataset(
        "twitter_top20", None,
        rank=(),
        generation=("tweet by and about", "in the manner of"),
    ),
)
"""In the order of learning."""
TEST_DATASETS = (
    Dataset(
        "asset", "simplification",
        rank=(),
        generation=("easier to read", "simpler words"),
        metrics=("bleu",),
        references="simplifications",
    ),
)
"""Scored only: simplification is learned on wiki_auto and tested on both."""

CATEGORIES = {"esnli": "natural_language_inference", "gigaword_constrained": "summarization"}
"""Of those whose rows, or the rows' kin, T0 sorts."""
TASKS = add_datasets(DATASETS, role="generative", splits=("train", "validation"), categories=CATEGORIES)
TEST_TASKS = add_datasets(TEST_DATASETS, role="generative", splits=("validation",))
registry.add_mixture("generative", [*TASKS, *TEST_TASKS], eval_rows=SEEN_ROWS)
