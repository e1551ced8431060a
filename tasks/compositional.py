"""Instructions built from two tasks: "summarise and translate".

A summarisation expert (xsum) and a translation expert (en -> ko, es, zh, fr, ja) are merged and asked for a
summary in the other language, which neither was trained on. ``xsum_translated/<language>`` holds rows with
the fields ``document`` and ``summary`` (in that language); ``opus100/en-<language>``, as on the hub, a field
``translation`` with a text for each of its two languages.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from elm_jax.tasks.facts import TEMPLATE_FOLDER
from elm_jax.tasks.pins import versions_of
from elm_jax.tasks.recipes import SEEN_ROWS
from elm_jax.tasks.t0_train import TASKS as TRAIN_TASKS

from elm_jax.data.registry import registry

LANGUAGES = {"ko": "Korean", "es": "Spanish", "zh": "Chinese", "fr": "French", "ja": "Japanese"}
SUMMARIES = TRAIN_TASKS[TRAIN_TASKS.index("xsum__summarize_this_doc_summary")]
"""The task whose expert knows how to summarise."""
TRANSLATE = "translate"
COMPOSED = ("summarize and translate", "translated summary")


@dataclasses.dataclass(frozen=True)
class Composition:
    """One language's tasks.

    Attributes:
        language: its code.
        parts: the two tasks whose experts are merged.
        targets: the tasks that the merged expert is tested on.
    """

    language: str
    parts: tuple[str, str]
    targets: tuple[str, ...]


def _sentences(row: Mapping[str, Any], code: str) -> dict[str, Any]:
    pair = row["translation"]
    return {"text": pair["en"], "translation": pair[code], "language": LANGUAGES[code]}


def _with_language(row: Mapping[str, Any], code: str) -> dict[str, Any]:
    return {**row, "language": LANGUAGES[code]}


def _add(code: str) -> Composition:
    def add(dataset: str, config: str, template: str, **facts: Any) -> str:
        return registry.add_prompted_task(dataset, config, template, kind="generation", role="compositional",
                                          template_folder=TEMPLATE_FOLDER, versions=versions_of, **facts)

    translation = add("opus100", f"en-{code}", TRANSLATE, adapt=functools.partial(_sentences, code=code))
    parts = (SUMMARIES, translation)
    targets = tuple(
        add("xsum_translated", code, template, splits=("validation",), parts=parts,
            adapt=functools.partial(_with_language, code=code)) for template in COMPOSED)
    return Composition(code, parts, targets)


COMPOSITIONS = tuple(_add(code) for code in LANGUAGES)
registry.add_mixture("compositional", [target for composition in COMPOSITIONS
                                       for target in composition.targets], eval_rows=SEEN_ROWS)
