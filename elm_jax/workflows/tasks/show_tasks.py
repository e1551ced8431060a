"""Lists registered tasks, and shows a task's rows as prompts. Needs no TensorFlow."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.data.arrays.batch_forms import BatchForm
from elm_jax.data.arrays.batches import Lengths
from elm_jax.data.arrays.prepared import LEFT
from elm_jax.data.preparing.prepare import several_right
from elm_jax.data.registry import registry
from elm_jax.errors import unknown_name
from elm_jax.experts.base import load_reading
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.storage import PathLike
from elm_jax.vocabularies.vocabulary import Vocabulary
from elm_jax.workflows.name_patterns import chosen
from elm_jax.workflows.tasks import task_stats


def list_tasks(modules: Sequence[str], patterns: Sequence[str] = (), has_data: bool | None = None,
               **wanted: str | None) -> dict[str, Any]:
    """Facts of registered tasks, and of mixtures that consist of them alone.

    Args:
        modules: registries to import.
        patterns: only tasks and mixtures whose name fits one (`name_patterns.chosen`).
        has_data: only tasks that can be prepared, or that cannot; None for all.
        **wanted: ``role``, ``dataset``, ``category``, ``kind``: only tasks of this one; None for any.

    Raises:
        InputError: no task is of that role, data set, category or kind, or a pattern fits no name.
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
    mixtures = {name: list(registry.get_mixture(name).tasks) for name in registry.mixture_names()}
    fitting = set(chosen("task or mixture", items_of(patterns), [*(row["name"] for row in tasks), *mixtures]))
    tasks = [row for row in tasks if has_data in (None, row["unavailable"] is None)]
    names = {row["name"] for row in tasks}
    return {"tasks": [row for row in tasks if row["name"] in fitting],
            "mixtures": {name: members for name, members in mixtures.items()
                         if name in fitting and names.issuperset(members)}}


def show_task(name: str, split: str | None, count: int, *, modules: Sequence[str],
              base: PathLike | None = None, source_length: int | None = None,
              target_length: int | None = None) -> dict[str, Any]:
    """First rows of a task as prompts; with a base, their numbers of tokens and what is cut off.

    Args:
        name: of the task.
        split: one of the task's; None for the one that it is scored on.
        count: at most this many rows.
        modules: registries to import.
        base: folder of a base, in whose prompts and targets tokens are counted; None counts none.
        source_length: tokens of an input that are kept; None for the task's own (`task_stats.lengths_of`).
        target_length: tokens of a target that are kept.

    Returns:
        ``task``, ``split``, ``cut_prompt`` (the side), ``rows`` (with ``scores`` of the choices, or
        ``references``, where several answers are right), and ``dropped``: how many rows before these were
        left out, by reason.

    Raises:
        InputError: an unknown task, a split that it has not, or data that are not there.
    """
    registry.import_tasks(modules)
    task = registry.get_task(name)
    lengths = task_stats.lengths_of(name, source_length, target_length)
    vocabulary, form = (None, None) if base is None else load_reading(base)
    split, dropped, rows = split or task.evaluation_split, collections.Counter(), []
    for index, rendered in task.render_rows(split, dropped):
        row: dict[str, Any] = {"row": index, "input": rendered.inputs, "target": rendered.targets,
                               "choices": list(rendered.choices or ()),
                               "choices_expression": rendered.choices_expression,
                               **several_right(rendered)}
        if vocabulary is not None:
            row |= _counted(row, task.cut_prompt, lengths, vocabulary, form)
        rows.append(row)
        if len(rows) == count:
            break
    return {"task": name, "split": split, "cut_prompt": task.cut_prompt, "rows": rows,
            "dropped": dict(dropped)}


def _counted(row: Mapping[str, Any], side: str, lengths: Lengths, vocabulary: Vocabulary, form: BatchForm
             ) -> dict[str, Any]:
    """Numbers of tokens of a row's prompt and target, and what lengths cut off in training and scoring."""
    counts, cut = {}, {}
    for name, encode in (("input", vocabulary.encode), ("target", vocabulary.encode_target)):
        own, length = encode(row[name]), lengths[f"{name}s"]
        size = len(own) + 1
        counts[name] = form.prompt_length(size) if name == "input" else size
        lost = max(0, counts[name] - length)
        is_left = name == "input" and side == LEFT
        tokens = own[:lost] if is_left else own[len(own) - lost:]
        cut[name] = {"length": length, "text": vocabulary.decode(tokens) if lost else ""}
    return {"tokens": counts, "cut": cut}


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
