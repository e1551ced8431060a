"""Statistics of a task's tokens, and of what its lengths cut off (`elm tasks stats`, `elm tasks show`)."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.data.arrays.batch_forms import BatchForm
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.registry import registry

PERCENTILES = (50, 90, 99)
LENGTHS = {"inputs": 512, "targets": 128}
"""Tokens where a task has no recipe: the lengths of the paper's evaluation."""


def lengths_of(task: str, source_length: int | None = None, target_length: int | None = None
               ) -> dict[str, int]:
    """Lengths of inputs and targets for a task: those given, else its recipe's, else `LENGTHS`."""
    recipe = registry.get_task(task).recipe if task in registry.task_names() else None
    own = LENGTHS if recipe is None else {"inputs": recipe.source_length, "targets": recipe.target_length}
    return {"inputs": source_length or own["inputs"], "targets": target_length or own["targets"]}


def stats_of(split: PreparedSplit, lengths: Mapping[str, int], form: BatchForm) -> dict[str, Any]:
    """Computes counts and lengths of one split of a task.

    Args:
        split: the whole split as prepared arrays, or a part of it.
        lengths: tokens of ``inputs`` and of ``targets`` that are kept, EOS among them.
        form: of the base's batches, which says how many tokens a prompt has.

    Returns:
        ``instances`` (of the source), ``dropped`` (of them, by reason), ``rows``, ``choices`` (least and most
        of a row, None for generation), and for ``inputs`` and ``targets`` ``{length, percentiles (as
        {"50": tokens, ...}), max, cut (rows that lose tokens), cut_share}``.
    """
    sizes = (split.lengths_of(row) for row in range(len(split)))
    counts = np.array([(form.prompt_length(inputs), targets) for inputs, targets in sizes], np.int64)
    counts = counts.reshape(-1, 2)
    choices = np.diff(split.arrays["rows"]) - 2
    return {
        "task": split.name, "split": split.split, "kind": split.kind,
        "instances": split.info.get("num_source", len(split)), "rows": len(split),
        "of_at_most": split.info.get("max_rows"), "dropped": dict(split.info.get("dropped", {})),
        "choices": [int(choices.min()), int(choices.max())] if split.kind == "rank" else None,
        **{name: _lengths(counts[:, column], lengths[name])
           for column, name in enumerate(("inputs", "targets"))},
    }


def _lengths(tokens: np.ndarray, length: int) -> dict[str, Any]:
    return {
        "length": length,
        # The smallest length that keeps so many percent of the rows whole.
        "percentiles": {str(share): int(np.percentile(tokens, share, method="inverted_cdf"))
                        for share in PERCENTILES},
        "max": int(tokens.max()), "cut": int((tokens > length).sum()),
        "cut_share": float((tokens > length).mean()),
    }


def dropped_in_all(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Dropped rows of several splits together, by reason."""
    total: collections.Counter[str] = collections.Counter()
    for row in rows:
        total.update(row["dropped"])
    return dict(total)
