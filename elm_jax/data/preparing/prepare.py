"""Renders and tokenises the rows of a task into prepared arrays, without TensorFlow.

The arrays equal those of the task's SeqIO form (`seqio_tasks.prepare`), and are made many times faster: to
pass a text through tf.data costs more than to render and tokenise it.
"""

import collections
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.data.arrays.prepared import RIGHT, PreparedSplit, check_max_rows
from elm_jax.data.draw import draw_rows
from elm_jax.data.prompts.templates import Rendered
from elm_jax.data.registry import registry
from elm_jax.data.registry.prompted_task import UNKNOWN_VERSION, PromptedTask
from elm_jax.data.registry.task_rows import describe_dropped
from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
REMEMBERED = 1 << 16
"""Number of targets and choices whose tokens are cached: most tasks have the same choices in every row."""


RowsOf = Callable[[PromptedTask, str, Vocabulary, "collections.Counter[str]"], Iterable[Mapping[str, Any]]]
"""A function with the arguments and result of `tokenised_rows`."""


def prepare(task: str, split: str, vocabulary: Vocabulary, *, max_rows: int | None = None,
            seed: int = 0, rows_of: RowsOf | None = None) -> PreparedSplit:
    """Renders and tokenises a task's split.

    Args:
        task: name of a registered task.
        split: one of its splits.
        vocabulary: of the tokens.
        max_rows: a random subset of at most this many rows, in the source's order.
        seed: of the subset.
        rows_of: renders and tokenises; None for `tokenised_rows`.

    Returns:
        The rows in the source's order, untrimmed. Of a subset no other rows are tokenised.

    Raises:
        InputError: no such task or split, no data, a template that does not fit the rows, or no row
            left after rendering.
    """
    facts = registry.get_task(task)
    facts.check_split(split)
    check_max_rows(max_rows, task)
    dropped: collections.Counter[str] = collections.Counter()
    if max_rows is not None and rows_of is None:
        rendered = list(facts.render_rows(split, dropped))
        drawn = [rendered[place] for place in np.sort(draw_rows(len(rendered), max_rows, seed))]
        info = _info_of(facts, split, vocabulary, len(rendered), dropped, seed) | {"max_rows": max_rows}
        return PreparedSplit.from_rows(task, split, info, _tokenised(facts, drawn, vocabulary))
    rows = (rows_of or tokenised_rows)(facts, split, vocabulary, dropped)
    prepared = PreparedSplit.from_rows(task, split, {"kind": facts.kind}, rows)
    prepared.info.update(_info_of(facts, split, vocabulary, len(prepared), dropped, seed))
    return prepared if max_rows is None else prepared.subset(max_rows, seed)


def tokenised_rows(task: PromptedTask, split: str, vocabulary: Vocabulary,
                   dropped: collections.Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, rendered and tokenised, as `PreparedSplit.from_rows` takes them.

    Args:
        task: a registered task.
        split: one of its splits.
        vocabulary: of the tokens.
        dropped: counts the rows that are left out, by the reason.
    """
    return _tokenised(task, task.render_rows(split, dropped), vocabulary)


def _tokenised(task: PromptedTask, rows: Iterable[tuple[int, Rendered]], vocabulary: Vocabulary
               ) -> Iterator[dict[str, Any]]:
    """Tokenises rendered rows, which come behind their places in the source."""
    @functools.lru_cache(REMEMBERED)
    def tokens_of(text: str) -> Sequence[int]:
        return [*vocabulary.encode_target(text), vocabulary.eos_id]

    for index, rendered in rows:
        choices = list(rendered.choices or ()) if task.kind == "rank" else []
        yield {
            "inputs": [*vocabulary.encode(rendered.inputs), vocabulary.eos_id],
            "targets": tokens_of(rendered.targets),
            "choices": [tokens_of(choice) for choice in choices],
            "text": {"inputs": rendered.inputs, "targets": rendered.targets, "choices": choices,
                     "index": index, **several_right(rendered)},
        }


def several_right(rendered: Rendered) -> dict[str, list]:
    """The scores of a row's choices and its right texts, where one right answer does not say it all."""
    found = {"scores": rendered.scores, "references": rendered.references}
    return {name: list(value) for name, value in found.items() if value}


def _info_of(task: PromptedTask, split: str, vocabulary: Vocabulary, kept: int, dropped: Mapping[str, int],
             seed: int) -> dict[str, Any]:
    """The facts that prepared arrays keep.

    Args:
        task: a registered task.
        split: of the arrays.
        vocabulary: of the tokens.
        kept: rows of the whole split that are left after rendering.
        dropped: the others, by the reason.
        seed: of subsets.

    Raises:
        InputError: no row is left.
    """
    num_dropped = sum(dropped.values())
    if not kept:
        raise InputError(describe(f"Task {task.name} has no row left after rendering", where=f"split {split}",
                                  got=describe_dropped(dropped)))
    template, version = task.load_template(), task.template_version()
    if version == UNKNOWN_VERSION:
        logger.warning("%s: the text of template %r is of no pinned version (digest %s)", task.name,
                       task.template, template.digest)
    return {
        "dataset": task.dataset, "config": task.config, "template": task.template,
        "kind": task.kind, "role": task.role, **({"metrics": list(task.metrics)} if task.metrics else {}),
        "template_digest": template.digest, "template_version": version or "",
        "choices_expression": template.answer_choices,
        "vocabulary": vocabulary.fingerprint, "vocabulary_facts": vocabulary.facts(),
        "source": task.source_digest(split),
        "num_source": kept + num_dropped, "num_dropped": num_dropped, "dropped": dict(dropped),
        "max_rows": None, "seed": seed,
        **({} if task.cut_prompt == RIGHT else {"cut_prompt": task.cut_prompt}),
    }
