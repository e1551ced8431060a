"""BIG-bench tasks, for evaluation only (the makers ask that their data stay out of training).

The input is ELM.md's: ``{task_prefix}\\nQ: {input}\\n choice: {c} ...\\nA: ``, with the task file's own
prefixes where it gives them. The only split is called ``test``.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from elm_jax import storage
from elm_jax.data import registry, sources
from elm_jax.data.templates import PromptTemplate
from elm_jax.errors import InputError, describe

PAPER = (
    "code_line_description", "conceptual_combinations", "formal_fallacies_syllogisms_negation",
    "hindu_knowledge", "known_unknowns", "language_identification", "logic_grid_puzzle", "logical_deduction",
    "misconceptions", "movie_dialog_same_or_different", "strategyqa", "vitaminc_fact_verification", "winowhy",
)
"""The 13 tasks that the paper scores."""
RANKED = (*PAPER, "novel_concepts")
"""Tasks with choices; in novel_concepts several can be right."""
GENERATED = ("linguistics_puzzles",)

_DEFAULTS = {"task_prefix": "", "example_input_prefix": "\nQ: ", "choice_prefix": "\n choice: ",
             "example_output_prefix": "\nA: "}
_INPUT = ("{{task_prefix}}{{example_input_prefix}}{{input}}"
          "{% for choice in choices %}{{choice_prefix}}{{choice}}{% endfor %}"
          "{{example_output_prefix}}|||{{target}}")
RANKING = PromptTemplate(name="bigbench", jinja=_INPUT, metrics=("Accuracy",),
                         answer_choices='{{choices | join("|||")}}')
GENERATION = PromptTemplate(name="bigbench", jinja=_INPUT, answer_choices=None, metrics=("ROUGE",))


@functools.cache
def _settings(path: str) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(storage.read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(describe("The settings of BIG-bench are not valid JSON",
                                  where=f"{path}, line {error.lineno}", got=error.msg)) from error


def _adapt(row: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A row's prefixes, input, choices and target (the first of the best choices)."""
    settings = _settings(str(sources.data_dir() / "bigbench" / "tasks.json"))
    key = f"{task}/{row['subtask']}" if "subtask" in row else task
    if key not in settings:
        raise InputError(describe("A BIG-bench task has no settings", where="bigbench/tasks.json",
                                  got=key))
    prefixes = {name: settings[key].get(name, value) for name, value in _DEFAULTS.items()}
    if task in GENERATED:
        return {**prefixes, "input": row["input"], "choices": [], "target": row["target"]}
    scores = row["target_scores"]
    return {**prefixes, "input": row["input"], "choices": list(scores),
            "target": max(scores, key=scores.__getitem__)}


TASKS = [
    registry.add_prompted_task(
        "bigbench", task, RANKING if task in RANKED else GENERATION,
        kind="rank" if task in RANKED else "generation", role="bigbench", splits=("test",),
        truncate=False, adapt=functools.partial(_adapt, task=task))
    for task in RANKED + GENERATED
]
registry.add_mixture("bigbench", TASKS)
