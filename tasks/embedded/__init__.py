"""Small tasks that come with the package: English from a grammar, of fixed seeds, with no data folder.

Adds a task for each prompt (of the roles ``extra`` and ``unseen_extra``: they are none of the paper's), a
mixture for each data set, and ``embedded_train`` for all training tasks. Of the unseen data sets, as of all
unseen ones, only validation rows are registered.
"""

import functools
import os

from elm_jax.tasks.embedded.datasets import TRAIN, UNSEEN, passages, rows

from elm_jax.data.registry import registry

__all__ = ["TICKETS", "TRAIN_TASKS", "UNSEEN_TASKS", "passages", "rows"]

TEMPLATE_FOLDER = os.path.join(os.path.dirname(__file__), "templates")
TICKETS = os.path.join(os.path.dirname(__file__), "tickets.jsonl")
"""A file of rows for a first task of one's own: letters to a shop, each written by itself, not from the
grammar; JSON lines of ``text`` and the ``team`` to answer: billing, shipping, repairs, returns, account."""

_KINDS = {"mini_data_to_text": "generation", "mini_headline": "generation",
          "mini_extraction": "generation", "mini_note": "generation"}
"""The data sets whose prompts ask for a text; all others rank choices."""
_CATEGORIES = {
    "mini_topic": "topic_classification", "mini_review": "sentiment", "mini_question": "topic_classification",
    "mini_reading": "multiple_choice_qa", "mini_data_to_text": "structure_to_text",
    "mini_headline": "summarization", "mini_extraction": "extractive_qa",
    "mini_emotion": "sentiment", "mini_product": "topic_classification",
    "mini_ending": "sentence_completion", "mini_paraphrase": "paraphrase_identification",
    "mini_note": "summarization",
}
"""After T0's groups; of entailment there is one data set, and so no group."""
PROMPTS: dict[str, tuple[str, str]] = {
    "mini_topic": ("which section", "about what"),
    "mini_review": ("writer feeling", "good or bad"),
    "mini_question": ("asks for", "what kind of answer"),
    "mini_entailment": ("does it follow", "must be true"),
    "mini_reading": ("pick the answer", "read and answer"),
    "mini_data_to_text": ("describe the record", "fields to sentence"),
    "mini_headline": ("write a headline", "title of the report"),
    "mini_extraction": ("find the words", "question first"),
    "mini_emotion": ("how does the writer feel", "name the emotion"),
    "mini_product": ("which department", "what is sold"),
    "mini_ending": ("choose the ending", "what happens next"),
    "mini_paraphrase": ("same meaning", "say the same"),
    "mini_note": ("sum up", "main point"),
}
"""The two prompts of each data set, by their templates' names."""


def _add(dataset: str, role: str, splits: tuple[str, ...]) -> list[str]:
    tasks = [
        registry.add_prompted_task(
            dataset, None, template, kind=_KINDS.get(dataset, "rank"), role=role, splits=splits,
            rows=functools.partial(rows, dataset), template_folder=TEMPLATE_FOLDER,
            category=_CATEGORIES.get(dataset))
        for template in PROMPTS[dataset]]
    registry.add_mixture(dataset, tasks)
    return tasks


TRAIN_TASKS = tuple(
    task for name in TRAIN for task in _add(name, "extra", ("train", "validation")))
UNSEEN_TASKS = tuple(task for name in UNSEEN for task in _add(name, "unseen_extra", ("validation",)))
registry.add_mixture("embedded_train", TRAIN_TASKS)
