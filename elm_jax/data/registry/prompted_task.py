"""Prompted tasks: one data set with one prompt template, its facts, its rows, and its rows as prompts."""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from elm_jax.data.arrays.prepared import RIGHT
from elm_jax.data.prompts import templates
from elm_jax.data.prompts.templates import PromptTemplate, Rendered
from elm_jax.data.registry import task_rows
from elm_jax.data.registry.task_rows import NO_LISTS, Places, RowAdapter, RowLists, RowOrder
from elm_jax.data.sources import cached_p3, row_files
from elm_jax.errors import InputError, describe
from elm_jax.runtime.storage import PathLike

RowReader = Callable[[str], Sequence[Mapping[str, Any]]]
"""From the name of a split to its rows, which must not change while the process runs: facts about them are
cached."""
OwnRows = row_files.OwnFile | cached_p3.CachedSplit
"""A split's rows in files that the user named."""
TemplateMaker = Callable[[], PromptTemplate]
"""Gives a template that depends on settings beside the rows, as BIG-bench's do."""
UNKNOWN_VERSION = "unknown"
NOT_A_CHOICE, NONE_RIGHT = "target is none of the choices", "no choice is right"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training settings of the paper for one task.

    Attributes:
        max_examples: at most this many instances of the task.
        epochs: passes over them.
        source_length: tokens of an input while training.
        target_length: tokens of a target.
        batch_size: instances of an optimiser step.
    """

    max_examples: int
    epochs: int
    source_length: int
    target_length: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class PromptedTask:
    """One data set with one prompt template: facts about it, and functions that read and render its rows.

    Attributes:
        name: ``<dataset>[_<config>]__<template>``.
        dataset: name of the data set.
        config: its config, None without one.
        template: the template's own name.
        kind: ``rank`` or ``generation``.
        role: one of `registry.ROLES`.
        splits: names of the splits.
        prompt: the template, or what makes it; None if it is to be found by name when it is needed.
        rows: reads a split, None for files; see `RowReader`.
        own_files: the file of each split, None for those below the data folder.
        template_folder: looked in for a template that the data folder lacks, before promptsource.
        truncate: whether fields are cut to 2048 characters, as promptsource does.
        adapt: makes the template's fields of a source's row, None if they are the row's own.
        source: data set and config whose rows these are, None for the task's own.
        category: kind of task after T0's groups, None without one.
        recipe: how an expert of the task is trained in the paper, None if it says nothing.
        parts: names of the tasks whose instructions this one joins; empty for all but compositions.
        ready: whether the rows are prompts already: ``inputs``, ``targets``, perhaps ``choices``.
        cut_prompt: the side on which prompts that are too long are cut, one of `prepared.PROMPT_CUTS`.
        versions: gives the template's known versions by the digest of its text; None if none are pinned.
        lists: the fields of its rows that hold choices, their scores, or several right texts.
        metrics: that it is scored by beside that of its kind (`evaluation.task_metrics`).
    """

    name: str
    dataset: str
    config: str | None
    template: str
    kind: str
    role: str
    splits: tuple[str, ...]
    prompt: PromptTemplate | TemplateMaker | None = None
    rows: RowReader | None = None
    template_folder: PathLike | None = None
    truncate: bool = True
    adapt: RowAdapter | None = None
    source: tuple[str, str | None] | None = None
    category: str | None = None
    recipe: Recipe | None = None
    parts: tuple[str, ...] = ()
    versions: Callable[[str], Mapping[str, str]] | None = None
    ready: bool = False
    own_files: tuple[OwnRows, ...] | None = None
    cut_prompt: str = RIGHT
    lists: RowLists = NO_LISTS
    metrics: tuple[str, ...] = ()

    @property
    def dataset_name(self) -> str:
        """``<dataset>[_<config>]``, also the name of the mixture of the data set's prompts."""
        return templates.dataset_name(self.dataset, self.config)

    @property
    def row_source(self) -> tuple[str, str | None]:
        """Data set and config that the task's rows come from."""
        return self.source or (self.dataset, self.config)

    def load_template(self) -> PromptTemplate:
        """Returns the task's template: the given one, or the one found by its name.

        Raises:
            InputError: no folder has it.
        """
        if self.ready:
            return PromptTemplate(self.template, "", None)
        if isinstance(self.prompt, PromptTemplate):
            return self.prompt
        if self.prompt is not None:
            return self.prompt()
        folders = (row_files.data_dir(), self.template_folder, templates.installed_folder())
        return templates.find_template(
            self.dataset, self.config, self.template, [folder for folder in folders if folder])

    def template_version(self) -> str | None:
        """Version of the template's text; None if none are pinned, ``unknown`` if the text is no pinned one.

        Raises:
            InputError: no folder has the template.
        """
        if self.versions is None:
            return None
        return self.versions(self.name).get(self.load_template().digest, UNKNOWN_VERSION)

    @property
    def evaluation_split(self) -> str:
        """The split that the task is scored on: ``validation``, or its last one."""
        return "validation" if "validation" in self.splits else self.splits[-1]

    def check_split(self, split: str) -> None:
        """Raises InputError if the task has no split of this name."""
        if split not in self.splits:
            raise InputError(describe(f"Task {self.name} has no split {split!r}",
                                      expected=f"one of {', '.join(self.splits)}"))

    def read_rows(self, split: str) -> Sequence[Mapping[str, Any]]:
        """Reads all rows of a split, before rendering."""
        rows = self._source_rows(split)
        return rows if self.adapt is None else [
            row for _, row in task_rows.in_order(rows, range, self.adapt, self.name, self.places(split))]

    def _source_rows(self, split: str) -> Sequence[Mapping[str, Any]]:
        """Reads all rows of a split as the source has them."""
        self.check_split(split)
        if self.rows is not None:
            return self.rows(split)
        if self.own_files is not None:
            return self._own_file(split).read()
        return row_files.read_rows(*self.row_source, split)

    def places(self, split: str) -> Places:
        """Returns a function from a row's index to its place: file and line, or split and number."""
        found = self._find(split)
        return (lambda index: f"{self.dataset_name} {split}, row {index + 1}") if found is None else (
            found.place_of)

    def _find(self, split: str) -> row_files.FoundSplit | OwnRows | None:
        if self.own_files is not None:
            own = self._own_file(split)
            return own if own.exists() else None
        found = None if self.rows is not None else row_files.find_split(*self.row_source, split)
        return None if found is None or _lacks_fields(self, found) else found

    def _own_file(self, split: str) -> OwnRows:
        return next(own for own in self.own_files if own.split == split)

    def has_rows(self, split: str) -> bool:
        """Whether the split's data exist; a function of rows counts as existing."""
        return self.rows is not None or self._find(split) is not None

    def num_rows(self, split: str) -> int:
        """Number of rows of a split, before rendering."""
        self.check_split(split)
        if self.rows is not None or self.own_files is not None:
            return len(self.read_rows(split))
        return row_files.num_rows(*self.row_source, split)

    def why_unavailable(self) -> str | None:
        """Reason why the task cannot be prepared with the data that exist; None if it can. Reads no rows."""
        if self.rows is not None:
            return None
        if not any(self._find(split) for split in self.splits):
            return "no data"
        if self.own_files is not None:
            return None
        if self.template in row_files.read_index().get(self.row_source, {}).get("unusable_templates", ()):
            return "the data lack a field that the template reads"
        return None

    def source_digest(self, split: str) -> str:
        """Hash of a split's sources: its template, and the file of its rows (or the rows themselves).

        Raises:
            InputError: no such split, no template, or no data.
        """
        digest = hashlib.sha256(json.dumps(_rendering_facts(self, self.load_template())).encode())
        found = self._find(split)
        files = () if found is None else tuple(
            task_rows.file_digest(str(path), path.stat().length, path.stat().mtime) for path in found.files())
        if found is None or self.adapt is not None or found.transforms:
            digest.update(_rows_digest(self, split, files))  # what is made of the files may change as well
        else:
            digest.update("".join(files).encode())
        return digest.hexdigest()[:16]

    def render_rows(self, split: str, dropped: collections.Counter[str] | None = None, *,
                    order: RowOrder = range) -> Iterator[tuple[int, Rendered]]:
        """Renders a split row by row, as rows are asked for, and drops the rows that T0 drops.

        A row is dropped if its template skips it, if its input or target is empty, or, in a task of
        kind ``rank``, if its target is none of its choices (to train on, also if all have a score of 0).

        Args:
            split: one of the task's.
            dropped: counts the rows that are left out, by the reason.
            order: gives the places of the rows to render, in order; all as they come.

        Yields:
            The row's place in the source, and the row as a prompt.

        Raises:
            InputError: a row lacks a field that the template reads, or the template fails on it.
        """
        template, rows, places = self.load_template(), self._source_rows(split), self.places(split)
        if not rows:
            raise InputError(describe(f"Task {self.name} has no rows", where=f"split {split}"))
        dropped = collections.Counter() if dropped is None else dropped
        made = task_rows.in_order(rows, order, self.adapt, self.name, places)
        rendered = task_rows.rendered(made, template, places, truncate=self.truncate, ready=self.ready)
        for index, fields, row in rendered:
            if not isinstance(row, str):
                row = task_rows.with_lists(row, self.lists.of(fields), places, index)
                row = _kept(row, self.kind, split)
            if isinstance(row, str):
                dropped[row] += 1
            else:
                yield index, row


def _rendering_facts(task: PromptedTask, template: PromptTemplate) -> list[Any]:
    """What decides how a row becomes a prompt; what `adapt` makes of it is hashed with the rows."""
    facts: list[Any] = [template.jinja, template.answer_choices, task.kind, task.truncate]
    facts += [task.cut_prompt] * (task.cut_prompt != RIGHT)  # as it was before there was a choice
    return facts + [task.lists.references] * (task.lists.references is not None and task.adapt is None)


def _kept(row: Rendered, kind: str, split: str) -> Rendered | str:
    """A row; or, of one to rank, the reason why it is dropped: no choice is right."""
    if kind != "rank":
        return row
    if row.scores is None:
        return row if row.targets in (row.choices or ()) else NOT_A_CHOICE
    return NONE_RIGHT if split == "train" and not any(row.scores) else row


def _lacks_fields(task: PromptedTask, found: row_files.FoundSplit) -> bool:
    """Whether TFDS's version of the data set lacks fields of the template, so that it cannot be used."""
    fields = found.fields() if task.adapt is None else None
    if fields is None:
        return False
    try:
        return not task.load_template().required_fields() <= fields
    except InputError:
        return False  # rendering will report that there is no template


@functools.lru_cache(maxsize=1024)
def _rows_digest(task: PromptedTask, split: str, files: tuple[str, ...]) -> bytes:
    """Hash of the rows as the template receives them.

    The files' own hashes say when a remembered one is out of date; a function of rows is asked but once.
    """
    del files
    rows = [dict(row) for row in task.read_rows(split)]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).digest()
