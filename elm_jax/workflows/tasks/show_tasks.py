"""Lists registered tasks, and shows a task's rows as prompts. Needs no TensorFlow."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.data.arrays.batches import trim
from elm_jax.data.preparing.prepare import several_right
from elm_jax.data.registry import registry
from elm_jax.errors import unknown_name
from elm_jax.vocabularies.vocabulary import Vocabulary
from elm_jax.workflows.tasks import task_stats


def list_tasks(modules: Sequence[str], **wanted: str | None) -> dict[str, Any]:
    """Facts of registered tasks, and of mixtures that consist of them alone.

    Args:
        modules: registries to import.
        **wanted: ``role``, ``dataset``, ``category``, ``kind``: only tasks of this one; None for any.

    Raises:
        InputError: no task is of that role, data set, category or kind.
    """
    registry.import_tasks(modules)
    tasks = []
    for name in registry.task_names():
        task = registry.get_task(name)
        tasks.append({"name": name, "dataset": task.dataset_name, "template": task.template,
                      "role": task.role, "category": task.category, "kind": task.kind,
                      "unavailable": task.why_unavailable()})
    for fact, value in wanted.items():
        known = {row[fact] for row in tasks if row[fact] is not None}
        if value is not None and value not in known:
            raise unknown_name(fact, value, known)
    tasks = [row for row in tasks if all(value in (None, row[fact]) for fact, value in wanted.items())]
    names = {row["name"] for row in tasks}
    mixtures = {name: list(registry.get_mixture(name).tasks) for name in registry.mixture_names()}
    return {"tasks": tasks,
            "mixtures": {name: members for name, members in mixtures.items() if names.issuperset(members)}}


def show_task(name: str, split: str | None, count: int, *, modules: Sequence[str],
              vocabulary: Vocabulary | None = None, source_length: int | None = None,
              target_length: int | None = None) -> dict[str, Any]:
    """First rows of a task as prompts; with a vocabulary, their numbers of tokens and what is cut off.

    Args:
        name: of the task.
        split: one of the task's; None for the one that it is scored on.
        count: at most this many rows.
        modules: registries to import.
        vocabulary: counts tokens.
        source_length: tokens of an input that are kept; None for the task's own (`task_stats.lengths_of`).
        target_length: tokens of a target that are kept.

    Returns:
        ``task``, ``split``, ``rows`` (with ``scores`` of the choices, or ``references``, where several
        answers are right), and ``dropped``: how many rows before these were left out, by reason.

    Raises:
        InputError: an unknown task, a split that it has not, or data that are not there.
    """
    registry.import_tasks(modules)
    task = registry.get_task(name)
    lengths = task_stats.lengths_of(name, source_length, target_length)
    split, dropped, rows = split or task.evaluation_split, collections.Counter(), []
    for index, rendered in task.render_rows(split, dropped):
        row: dict[str, Any] = {"row": index, "input": rendered.inputs, "target": rendered.targets,
                               "choices": list(rendered.choices or ()),
                               "choices_expression": rendered.choices_expression,
                               **several_right(rendered)}
        if vocabulary is not None:
            ids = {name: [*encode(row[name]), vocabulary.eos_id] for name, encode in (
                ("input", vocabulary.encode), ("target", vocabulary.encode_target))}
            row["tokens"] = {name: len(own) for name, own in ids.items()}
            row["cut"] = {name: _cut(own, lengths[f"{name}s"], vocabulary) for name, own in ids.items()}
        rows.append(row)
        if len(rows) == count:
            break
    return {"task": name, "split": split, "rows": rows, "dropped": dict(dropped)}


def _cut(ids: list[int], length: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Number of tokens that a length keeps, and the text that is cut off in training and scoring."""
    kept = len(trim(ids, length, vocabulary.eos_id))
    return {"length": length, "text": vocabulary.decode(ids[kept - 1:]) if kept < len(ids) else ""}


def right_answers(row: Mapping[str, Any]) -> str:
    """The right answer of a row of `show_task`; of several all, with ``or`` between them."""
    scored = [choice for choice, score in zip(row["choices"], row.get("scores", ()), strict=False) if score]
    return " or ".join(row.get("references") or scored or [row["target"]])


def printable(row: dict[str, Any]) -> dict[str, str]:
    """Formats a row of `show_task` as text."""
    shown = {key: str(value) for key, value in row.items() if key not in ("tokens", "cut")}
    for name, tokens in row.get("tokens", {}).items():
        cut = row["cut"][name]
        shown[f"{name} tokens"] = f"{tokens} of at most {cut['length']}" + (
            f", cut off: {cut['text']!r}" if cut["text"] else "")
    return shown
