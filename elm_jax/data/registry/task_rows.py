"""Rows of a task: adapted by a function, rendered as prompts, hashed."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from elm_jax.data.prompts.row_checks import RowChecks, ready_prompt
from elm_jax.data.prompts.templates import PromptTemplate, Rendered
from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import check_characters

RowAdapter = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From a source's row to the fields that the template reads."""
Places = Callable[[int], str]
"""From a row's index to its file and line, for errors."""
RowOrder = Callable[[int], Iterable[int]]
"""From the number of a source's rows to the places of some of them, in an order."""


@dataclasses.dataclass(frozen=True)
class RowLists:
    """Names of fields that hold lists, which are taken as they are and not out of a rendered text.

    A row may lack any of them.

    Attributes:
        choices: field of the answer choices.
        scores: field of the credit of each choice, from 0 to 1.
        references: field of all texts that are right.
    """

    choices: str | None = None
    scores: str | None = None
    references: str | None = None

    def of(self, row: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The lists that a row has."""
        found = {name: row.get(field) for name, field in vars(self).items() if field is not None}
        return {name: list(value) for name, value in found.items() if isinstance(value, list | tuple)}


NO_LISTS = RowLists()


def adapted(row: Mapping[str, Any], index: int, adapt: RowAdapter, task: str, places: Places
            ) -> Mapping[str, Any]:
    """Applies a task's own function to a row of the source; returns the template's fields.

    Args:
        row: of the source.
        index: the row's.
        adapt: the function, which the user gave and which can fail in any way.
        task: its name, for errors.
        places: file and line of each row, for errors.

    Raises:
        InputError: the function fails, or gives something else than fields.
    """
    try:
        made = adapt(row)
    except InputError:
        raise
    except Exception as error:
        what = "lacks a field that" if isinstance(error, KeyError) else "cannot be read as"
        raise InputError(describe(f"A row {what} task {task} reads", where=places(index),
                                  got=f"{type(error).__name__}: {error}",
                                  expected=f"fields among {', '.join(sorted(row))}")) from error
    if not isinstance(made, Mapping):
        raise InputError(describe(f"The function of task {task} does not give fields",
                                  where=places(index), got=repr(made)[:60],
                                  expected="a dictionary, such as {'inputs': ..., 'targets': ...}"))
    return made


def in_order(rows: Sequence[Mapping[str, Any]], order: RowOrder, adapt: RowAdapter | None, task: str,
             places: Places) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the template's fields of a source's rows behind their places, made as they are asked for.

    Args:
        rows: of the source.
        order: says which rows, and in which order.
        adapt: makes the fields of a row; None if they are the row's own.
        task: its name, for errors.
        places: file and line of each row, for errors.

    Raises:
        InputError: see `adapted`.
    """
    for index in map(int, order(len(rows))):
        row = rows[index]
        yield index, row if adapt is None else adapted(row, index, adapt, task, places)


def rendered(rows: Iterable[tuple[int, Mapping[str, Any]]], template: PromptTemplate, places: Places, *,
             truncate: bool, ready: bool) -> Iterator[tuple[int, Mapping[str, Any], Rendered | str]]:
    """Renders each row as a prompt, or gives the reason why it is dropped, behind its place and the row.

    Args:
        rows: of a split, each with its place there, in any order.
        template: that renders them.
        places: file and line of each row, for errors.
        truncate: see `PromptTemplate.parts`.
        ready: whether the rows are prompts already, and `template` is but a name.

    Raises:
        InputError: a row lacks a field that the template reads, or the template fails on it; a text that
            holds what is no character.
    """
    checks = RowChecks(template, places)
    for index, row in rows:
        checks.check(row, index)
        made = ready_prompt(row, places(index)) if ready else template.render_or_drop(
            row, seed=index, truncate=truncate, where=places(index))
        if isinstance(made, Rendered):
            check_characters("\0".join((made.inputs, made.targets, *(made.choices or ()))), places(index))
        yield index, row, made


def with_lists(row: Rendered, lists: Mapping[str, Sequence[Any]], places: Places, index: int) -> Rendered:
    """Puts a row's own lists into its prompt.

    With scores the target is the first choice of the highest one, and none where all are 0. References count
    where the rendered target is one of them; a target that is the list itself, as text, becomes the first.

    Args:
        row: the row as a prompt.
        lists: ``choices``, ``scores`` and ``references``, as far as the row has them.
        places: file and line of each row, for errors.
        index: the row's.

    Raises:
        InputError: not a score from 0 to 1 for each choice, or no reference.
    """
    if "choices" in lists and row.choices is not None:
        row = dataclasses.replace(row, choices=tuple(str(choice).strip() for choice in lists["choices"]))
    if "scores" in lists:
        scores, choices = lists["scores"], row.choices or ()
        if len(scores) != len(choices) or not choices or not all(map(_is_credit, scores)):
            raise InputError(describe("A row needs a score from 0 to 1 for each choice", where=places(index),
                                      got=f"{list(scores)} for {len(choices)} choices"))
        target = choices[max(range(len(scores)), key=scores.__getitem__)] if max(scores) > 0 else ""
        row = dataclasses.replace(row, scores=tuple(map(float, scores)), targets=target)
    if "references" in lists:
        texts = tuple(dict.fromkeys(str(text).strip() for text in lists["references"]))
        if not any(texts):
            raise InputError(describe("A row has no right answer", where=places(index), got=list(texts),
                                      expected="at least one text"))
        texts = tuple(filter(None, texts))
        if row.targets == str(lists["references"]):
            row = dataclasses.replace(row, targets=texts[0])
        if row.targets.strip() in texts and len(texts) > 1:
            row = dataclasses.replace(row, references=texts)
    return row


def _is_credit(score: Any) -> bool:
    return isinstance(score, int | float) and math.isfinite(score) and 0 <= score <= 1


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """Says in words how many rows were dropped and why.

    >>> describe_dropped({"target is empty": 2, "skipped by the template": 1})
    '3 dropped (2 target is empty, 1 skipped by the template)'
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return f"{sum(dropped.values())} dropped" + (f" ({reasons})" if reasons else "")


@functools.lru_cache(maxsize=1024)
def file_digest(path: str, length: int, mtime: float) -> str:
    """Hash of a file's bytes; cached as long as the file's length and time stay the same."""
    del length, mtime
    return hashlib.sha256(storage.as_path(path).read_bytes()).hexdigest()
