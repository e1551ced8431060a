"""The unseen classification tasks: 11 data sets that no expert and no base may ever be trained on.

Only their validation rows are registered. The 113 (data set, prompt) pairs of the published comparison have
the role ``unseen`` and are the mixture ``t0_unseen``, scored on all rows; the data sets' other prompts have
the role ``unseen_extra``.
"""

from elm_jax.tasks.categories import UNSEEN_CATEGORY_OF
from elm_jax.tasks.facts import Dataset, add_datasets

from elm_jax.data.registry import registry

DATASETS = (
    Dataset(
        "anli", "r1",
        rank=(
            "MNLI crowdsource", "should assume", "does it follow that", "GPT-3 style",
            "based on the previous passage", "justified in saying", "take the following as truth",
            "must be true", "can we infer", "guaranteed/possible/impossible",
            "always/sometimes/never", "does this imply", "consider always/sometimes/never",
            "claim true/false/inconclusive", "guaranteed true",
        ),
        generation=(),
    ),
    Dataset(
        "anli", "r2",
        rank=(
            "MNLI crowdsource", "should assume", "does it follow that", "GPT-3 style",
            "based on the previous passage", "justified in saying", "take the following as truth",
            "must be true", "can we infer", "guaranteed/possible/impossible",
            "always/sometimes/never", "does this imply", "consider always/sometimes/never",
            "claim true/false/inconclusive", "guaranteed true",
        ),
        generation=(),
    ),
    Dataset(
        "anli", "r3",
        rank=(
            "MNLI crowdsource", "should assume", "does it follow that", "GPT-3 style",
            "based on the previous passage", "justified in saying", "take the following as truth",
            "must be true", "can we infer", "guaranteed/possible/impossible",
            "always/sometimes/never", "does this imply", "consider always/sometimes/never",
            "claim true/false/inconclusive", "guaranteed true",
        ),
        generation=(),
    ),
    Dataset(
        "hellaswag", None,
        rank=(
            "complete_first_then", "Randomized prompts template",
            "Appropriate continuation - Yes or No", "Predict ending with hint",
            "Reversed appropriate continuation - Yes or No", "how_ends",
            "if_begins_how_continues",
        ),
        generation=(
            "Topic without the ending answer", "Open-ended completion", "Topic of the context",
            "Open-ended start",
        ),
        extra=(
            "Appropriate continuation - Yes or No",
            "Reversed appropriate continuation - Yes or No", "Topic without the ending answer",
            "Open-ended completion", "Topic of the context", "Open-ended start",
        ),
        metrics=("acc_norm", "acc_norm_tokens"),
    ),
    Dataset(
        "story_cloze", "2016",
        rank=(
            "Answer Given options", "Choose Story Ending", "Movie What Happens Next",
            "Story Continuation and Options", "Novel Correct Ending",
        ),
        generation=(
            "Generate Ending",
        ),
        extra=(
            "Generate Ending",
        ),
    ),
    Dataset(
        "super_glue", "cb",
        rank=(
            "can we infer", "based on the previous passage", "claim true/false/inconclusive",
            "does it follow that", "justified in saying", "always/sometimes/never", "GPT-3 style",
            "consider always/sometimes/never", "guaranteed true", "must be true",
            "guaranteed/possible/impossible", "does this imply", "MNLI crowdsource",
            "should assume", "take the following as truth",
        ),
        generation=(),
    ),
    Dataset(
        "super_glue", "copa",
        rank=(
            "exercise", "…What could happen next, C1 or C2?", "i_am_hesitating",
            "plausible_alternatives", "C1 or C2? premise, so/because…", "…As a result, C1 or C2?",
            "best_option", "…which may be caused by", "more likely", "cause_effect",
            "…why? C1 or C2", "choose",
        ),
        generation=(),
        extra=(
            "…What could happen next, C1 or C2?", "…As a result, C1 or C2?",
            "…which may be caused by", "…why? C1 or C2",
        ),
    ),
    Dataset(
        "super_glue", "rte",
        rank=(
            "MNLI crowdsource", "guaranteed true", "can we infer", "GPT-3 style",
            "does this imply", "should assume", "does it follow that",
            "based on the previous passage", "justified in saying", "must be true",
        ),
        generation=(),
    ),
    Dataset(
        "super_glue", "wic",
        rank=(
            "question-context-meaning-with-label", "question-context-meaning", "grammar_homework",
            "affirmation_true_or_false", "GPT-3-prompt", "same_sense", "question-context",
            "GPT-3-prompt-with-label", "polysemous", "similar-sense",
        ),
        generation=(),
    ),
    Dataset(
        "super_glue", "wsc.fixed",
        rank=(
            "does the pronoun refer to", "by p they mean", "in other words", "I think they mean",
            "does p stand for", "GPT-3 Style", "replaced with", "p is/are r",
            "the pronoun refers to", "Who or what is/are",
        ),
        generation=(),
    ),
    Dataset(
        "winogrande", "winogrande_xl",
        rank=(
            "does underscore refer to", "stand for", "underscore refer to", "fill in the blank",
            "True or False", "Replace",
        ),
        generation=(),
        extra=(
            "True or False",
        ),
    ),
)

TASKS = add_datasets(DATASETS, role="unseen", splits=("validation",), extra_role="unseen_extra",
                     categories=UNSEEN_CATEGORY_OF)
registry.add_mixture("t0_unseen", TASKS)
