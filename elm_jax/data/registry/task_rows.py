"""Rows of a task: adapted by a function, rendered as prompts, hashed."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def rendered(rows: Sequence[Mapping[str, Any]], template: PromptTemplate, places: Places, *,
             truncate: bool, ready: bool) -> Iterator[Rendered | str]:
    """Renders each row as a prompt, or gives the reason why it is dropped.

    Args:
        rows: of a split.
        template: that renders them.
        places: file and line of each row, for errors.
        truncate: see `PromptTemplate.parts`.
        ready: whether the rows are prompts already, and `template` is but a name.

    Raises:
        InputError: a row lacks a field that the template reads, or the template fails on it; a text that
            holds what is no character.
    """
    checks = RowChecks(template, places)
    for index, row in enumerate(rows):
        checks.check(row, index)
        made = ready_prompt(row, places(index)) if ready else template.render_or_drop(
            row, seed=index, truncate=truncate, where=places(index))
        if isinstance(made, Rendered):
            check_characters("\0".join((made.inputs, made.targets, *(made.choices or ()))), places(index))
        yield made


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
