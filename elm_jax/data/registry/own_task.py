"""Registers a user's own task in a few lines: a file of rows, and a template or a function."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elm_jax.data.arrays.prepared import RIGHT
from elm_jax.data.prompts.templates import SEPARATOR, PromptTemplate
from elm_jax.data.registry import registry
from elm_jax.data.registry.prompted_task import RowReader
from elm_jax.data.sources.row_files import OwnFile
from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.storage import PathLike

PromptFunction = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From a row to ``inputs``, ``targets`` (a text, or a list of texts that are all right) and, to be ranked,
``choices``, a list of texts; with ``scores``, a credit from 0 to 1 for each of them, it needs no targets."""
_ONE_FIELD = re.compile(r"\s*\{\{\s*(\w+)\s*\}\}\s*")


def add_task(
    dataset: str, template: str, rows: PathLike | Mapping[str, PathLike] | RowReader,
    prompt: str | PromptFunction, *, choices: Sequence[str] | str | None = None, kind: str | None = None,
    role: str = "train", held_out: float = 0.1, splits: Sequence[str] = ("train", "validation"),
    cut_prompt: str = RIGHT, metrics: Sequence[str] = (),
) -> str:
    """Registers a user's own task; reads no rows.

    Args:
        dataset: a name for the rows.
        template: a name for what is asked of them.
        rows: a file of JSON lines (gzip by its suffix), of which a share is held out for validation; or a
            file for each split; or a function from the name of a split (``train``, ``validation``) to rows.
        prompt: a Jinja template over the row's fields, ``input ||| target`` as promptsource's are; or a
            function that makes inputs, targets and perhaps choices of a row. A target that is but a field, as
            ``{{answers}}``, may be a list of texts that are all right; the first is trained on.
        choices: the answers among which the right one is picked: a list of texts, or an expression over the
            row's fields that gives them with ``|||`` between; None where the answer is written.
        kind: ``rank`` or ``generation``; None for ``rank`` if `choices` are given. A function that gives
            choices needs ``rank``.
        role: one of `registry.ROLES`.
        held_out: share of a single file that is its validation split, drawn by a fixed seed.
        splits: that a function has; files say theirs.
        cut_prompt: ``left`` keeps the end of a prompt that is too long; ``right`` its start.
        metrics: to score it by beside accuracy or ROUGE-L: ``acc_norm``, ``acc_norm_tokens``,
            ``exact_match``, ``squad_em``, ``squad_f1``, ``bleu`` (`evaluation.task_metrics`).

    Returns:
        The task's name, ``<dataset>__<template>``.

    Raises:
        InputError: the name is taken, a share or side that is none, or choices that hold ``|||``.
    """
    own_files, reader, splits = _rows(rows, held_out, tuple(items_of(splits)), f"{dataset} {template}")
    kind = kind or ("generation" if choices is None else "rank")
    if callable(prompt):
        if choices is not None:
            raise InputError(describe("A prompt function gives the choices itself", where=template,
                                      got="choices=", cure="return them as 'choices', with kind='rank'"))
        return registry.add_prompted_task(
            dataset, None, template, kind=kind, role=role, splits=splits, rows=reader, own_files=own_files,
            adapt=prompt, ready=True, cut_prompt=cut_prompt, metrics=metrics)
    made = PromptTemplate(template, prompt, _expression(choices, template))
    target = _ONE_FIELD.fullmatch(prompt.rpartition(SEPARATOR)[2])
    lists = registry.RowLists(references=target[1] if target and kind == "generation" else None)
    return registry.add_prompted_task(dataset, None, made, kind=kind, role=role, splits=splits, rows=reader,
                                      own_files=own_files, truncate=False, lists=lists, metrics=metrics,
                                      cut_prompt=cut_prompt)


def _rows(rows: Any, held_out: float, splits: tuple[str, ...], where: str
          ) -> tuple[tuple[OwnFile, ...] | None, RowReader | None, tuple[str, ...]]:
    """The files or the function that give the rows, and the names of the splits."""
    if callable(rows):
        return None, rows, splits
    if isinstance(rows, Mapping):
        files = tuple(OwnFile(_absolute(path), split) for split, path in rows.items())
        return files, None, tuple(rows)
    if not 0 < held_out < 1:
        raise InputError(describe("held_out is no share of a file", where=where, got=held_out,
                                  expected="more than 0, less than 1"))
    both = ("train", "validation")
    return tuple(OwnFile(_absolute(rows), split, held_out) for split in both), None, both


def _absolute(path: PathLike) -> Any:
    path = storage.as_path(path)
    return storage.as_path(os.path.abspath(path)) if storage.is_local(path) else path


def _expression(choices: Sequence[str] | str | None, template: str) -> str | None:
    if choices is None or isinstance(choices, str):
        return choices
    signs = (SEPARATOR, "{{", "{%", "{#")
    wrong = [choice for choice in choices if not choice.strip() or any(sign in choice for sign in signs)]
    if wrong:
        raise InputError(describe("A choice is empty, or holds a sign of templates", where=template,
                                  got=repr(wrong[0]), expected=f"texts without {' '.join(signs)}",
                                  cure="give an expression over the fields, or a prompt function"))
    return f" {SEPARATOR} ".join(choices)
