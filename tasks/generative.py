"""The generative tasks, in the order in which ELM.md lets experts learn them one after another.

Four of the data sets have no promptsource templates; ours lie in ``tasks/templates``.
"""

from elm_jax.tasks.facts import Dataset, add_datasets

DATASETS = (
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
)

TASKS = add_datasets(DATASETS, role="generative", splits=("train", "validation"))
