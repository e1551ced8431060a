"""BIG-Bench-Hard (Suzgun et al. 2022, arXiv 2210.09261), for evaluation only, as BIG-bench itself.

A row holds ``input`` and ``target``. Its answer choices are the options that the input lists, or the task's
fixed answers; where a task has neither, its answer is written.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from elm_jax.tasks.bigbench import LISTS, right_texts

from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry

FIXED = {"boolean_expressions": ("True", "False"), "sports_understanding": ("yes", "no"),
         "web_of_lies": ("Yes", "No")}
"""Tasks whose answers are always the same, without a list in the input."""
OPTIONS = (
    "causal_judgement", "date_understanding", "disambiguation_qa", "formal_fallacies", "geometric_shapes",
    "hyperbaton", "logical_deduction_five_objects", "logical_deduction_seven_objects",
    "logical_deduction_three_objects", "movie_recommendation", "navigate", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects",
)
"""Tasks whose inputs end in a list of options: ``(A) ...``, of which the letter answers, or ``- ...``."""
GENERATED = ("dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting")

_PROMPT = "Q: {{input}}\nA: ||| {{target}}"
RANKING = PromptTemplate("bbh", _PROMPT, '{{choices | join("|||")}}', ("Accuracy",))
GENERATION = PromptTemplate("bbh", _PROMPT, None, ("ROUGE",))
_LETTER, _DASH = re.compile(r"^\s*(\([A-Z]\))", re.MULTILINE), re.compile(r"^- (.+)$", re.MULTILINE)


def choices_of(text: str) -> list[str]:
    """The answers that an input offers, each once, in its order; none where it offers but one.

    >>> choices_of("Which?\\nOptions:\\n(A) one\\n(B) two")
    ['(A)', '(B)']
    """
    _, _, options = text.partition("Options:")
    found = _LETTER.findall(options) or [option.strip() for option in _DASH.findall(options)]
    choices = list(dict.fromkeys(found))
    return choices if len(choices) > 1 else []


def _adapt(row: Mapping[str, Any], task: str) -> dict[str, Any]:
    choices = list(FIXED.get(task) or choices_of(row["input"]))
    if isinstance(row["target"], list) and task not in GENERATED:
        return {**row, "target": row["target"][0], "choices": choices,
                "scores": [int(choice in row["target"]) for choice in choices]}
    return {**row, **right_texts(row["target"]), "choices": choices}


def _add(task: str) -> str:
    generated = task in GENERATED
    return registry.add_prompted_task(
        "bbh", task, GENERATION if generated else RANKING, kind="generation" if generated else "rank",
        role="bbh", splits=("test",), truncate=False, adapt=functools.partial(_adapt, task=task),
        lists=LISTS, metrics=("exact_match",) if generated else ())


TASKS = [_add(task) for task in sorted((*FIXED, *OPTIONS, *GENERATED))]
registry.add_mixture("bbh", TASKS)
