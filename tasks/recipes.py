"""How the paper trains and scores, where data sets differ (ELM.md: caps, lengths, epochs, batch sizes).

Of a prompt expert: at most 50,000 instances a task, 10,000 of eight data sets; 5 epochs, 10 of trec; 256
tokens of input, 512 of the long ones; 128 tokens of target; batches of 1 to 16. Lengths and batch sizes are
those of the published configs (joeljang/ELM, ``configs/experiment``); where one data set's configs differ
from prompt to prompt, the value of most. `elm train` takes them with ``train.task_recipe = True``.
"""

from elm_jax.tasks.categories import CATEGORY_OF

from elm_jax.data.registry.registry import Recipe

PROMPT_CAP = 50_000
GENERATION_CAP = 10_000
DATASET_CAP = 100_000
"""Most instances of a data set, for dataset experts and the multitask baseline."""
T0_CAP = 500_000
"""T0's own cap of a data set in its mixture, shared by the data set's prompts."""
SEEN_ROWS = 300
"""Instances of a prompt that are scored on seen and on generative tasks; of unseen ones, all are."""

_EPOCHS, _TREC_EPOCHS = 5, 10
_SOURCE_LENGTH, _LONG_SOURCE_LENGTH, _TARGET_LENGTH = 256, 512, 128
_BATCH_SIZE = 8

_CAPPED = {"cnn_dailymail_3_0_0", "gigaword", "hotpot_qa_fullwiki", "multi_news", "samsum", "wiki_bio",
           "wiki_qa", "xsum"}
_LONG = {"cnn_dailymail_3_0_0", "common_gen", "duorc_paraphraserc", "hotpot_qa_fullwiki", "multi_news",
         "samsum", "wiki_bio", "wiki_qa", "xsum"}
_BATCH_SIZES = {
    1: ("multi_news",),
    2: ("cnn_dailymail_3_0_0", "hotpot_qa_fullwiki", "samsum", "wiki_qa", "xsum"),
    4: ("adversarial_qa_adversarialqa", "common_gen", "commonsense_qa", "duorc_paraphraserc", "quoref",
        "ropes", "wiki_hop_original"),
    16: ("glue_mrpc", "paws_labeled_final", "qasc", "rotten_tomatoes", "social_i_qa", "trec"),
}
_BATCH_SIZE_OF = {key: size for size, keys in _BATCH_SIZES.items() for key in keys}


def recipe_of(key: str) -> Recipe | None:
    """How a prompt expert of a training data set, ``<dataset>[_<config>]``, is trained; None for others."""
    if key not in CATEGORY_OF:
        return None
    return Recipe(
        max_examples=GENERATION_CAP if key in _CAPPED else PROMPT_CAP,
        epochs=_TREC_EPOCHS if key == "trec" else _EPOCHS,
        source_length=_LONG_SOURCE_LENGTH if key in _LONG else _SOURCE_LENGTH,
        target_length=_TARGET_LENGTH,
        batch_size=_BATCH_SIZE_OF.get(key, _BATCH_SIZE))
