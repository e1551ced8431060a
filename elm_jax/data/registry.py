"""Which prompted tasks and mixtures there are: facts only, no TensorFlow, no reading of data.

The modules of ``elm_jax.tasks`` add tasks and mixtures here when they are imported. Templates and
rows are read when somebody asks for them. `pipeline` makes SeqIO tasks and prepared arrays of them.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from elm_jax import storage
from elm_jax.data import sources, templates
from elm_jax.data.prepared import KINDS
from elm_jax.data.templates import PromptTemplate, Rendered
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.storage import PathLike

logger = logging.getLogger(__name__)

ROLES = ("train", "unseen", "generative", "bigbench")
"""What a task is for: experts are trained on ``train``; rows of the others are never trained on,
except that ``generative`` tasks may get experts of their own."""
RowReader = Callable[[str], Sequence[Mapping[str, Any]]]
"""From the name of a split to its rows."""
RowAdapter = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From a source's row to the fields that the template reads."""


@dataclasses.dataclass(frozen=True)
class PromptedTask:
    """One data set with one prompt template.

    Attributes:
        name: ``<dataset>[_<config>]__<template>``.
        dataset: name of the data set.
        config: its config, None without one.
        template: the template's own name.
        kind: ``rank`` or ``generation``.
        role: one of `ROLES`.
        splits: names of the splits.
        prompt: the template, None if it is to be found by name when it is needed.
        rows: reads a split, None for the files below the data folder.
        template_folder: looked in for the template after the data folder, before promptsource.
        truncate: whether fields are cut to 2048 characters, as promptsource does.
        adapt: makes the template's fields of a source's row, None if they are the row's own.
    """

    name: str
    dataset: str
    config: str | None
    template: str
    kind: str
    role: str
    splits: tuple[str, ...]
    prompt: PromptTemplate | None = None
    rows: RowReader | None = None
    template_folder: PathLike | None = None
    truncate: bool = True
    adapt: RowAdapter | None = None

    @property
    def dataset_name(self) -> str:
        """``<dataset>[_<config>]``, also the name of the mixture of the data set's prompts."""
        return templates.dataset_name(self.dataset, self.config)

    def load_template(self) -> PromptTemplate:
        """The template: the one given, or found by its name.

        Raises:
            InputError: no folder has it.
        """
        if self.prompt is not None:
            return self.prompt
        folders = (sources.data_dir(), self.template_folder, templates.installed_folder())
        return templates.find_template(
            self.dataset, self.config, self.template, [folder for folder in folders if folder])

    @property
    def evaluation_split(self) -> str:
        """The split that the task is scored on: ``validation``, or the last of those that it has."""
        return "validation" if "validation" in self.splits else self.splits[-1]

    def check_split(self, split: str) -> None:
        """Raises InputError if the task has no such split."""
        if split not in self.splits:
            raise InputError(describe(f"Task {self.name} has no split {split!r}",
                                      expected=f"one of {', '.join(self.splits)}"))

    def read_rows(self, split: str) -> Sequence[Mapping[str, Any]]:
        """All rows of a split, before rendering."""
        self.check_split(split)
        if self.rows is not None:
            rows = self.rows(split)
        else:
            rows = sources.read_rows(self.dataset, self.config, split)
        return rows if self.adapt is None else [self.adapt(row) for row in rows]

    def num_rows(self, split: str) -> int:
        """Number of rows of a split, before rendering."""
        self.check_split(split)
        if self.rows is not None:
            return len(self.rows(split))
        return sources.num_rows(self.dataset, self.config, split)

    def why_unavailable(self) -> str | None:
        """Why the task cannot be prepared with the data at hand; None if it can. Reads no rows."""
        if self.rows is not None:
            return None
        if not any(sources.find_file(self.dataset, self.config, split) for split in self.splits):
            return "no data"
        entry = sources.read_index().get((self.dataset, self.config), {})
        if self.template in entry.get("unusable_templates", ()):
            return "the data lack a field that the template reads"
        return None

    def source_digest(self, split: str) -> str:
        """Hash of what the split is made of: its template, and the file of its rows (or the rows themselves).

        Raises:
            InputError: no such split, no template, or no data.
        """
        template = self.load_template()
        digest = hashlib.sha256(json.dumps([
            template.jinja, template.answer_choices, self.kind, self.truncate]).encode())
        path = None if self.rows is not None else sources.find_file(self.dataset, self.config, split)
        if path is None:
            rows = self.read_rows(split)
            digest.update(json.dumps([dict(row) for row in rows], sort_keys=True, default=str).encode())
        else:
            digest.update(_file_digest(str(path), path.stat().length, path.stat().mtime).encode())
        return digest.hexdigest()[:16]

    def render_rows(self, split: str) -> Iterator[tuple[int, Rendered]]:
        """Renders a split, row by row.

        A row is left out if its template skips it, or, in a task of kind ``rank``, if its target is
        none of its choices.

        Yields:
            The row's place in the source, and the row as a prompt.

        Raises:
            InputError: a row lacks a field that the template reads, or the template fails on it.
        """
        template = self.load_template()
        rows = self.read_rows(split)
        if not rows:
            raise InputError(describe(f"Task {self.name} has no rows", where=f"split {split}"))
        fields: frozenset[str] | None = None
        for index, row in enumerate(rows):
            if fields != row.keys():  # rows of one file may differ in their fields
                fields = frozenset(row)
                template.check_fields(fields, f"{self.dataset_name} {split}, row {index + 1}")
            rendered = template.render(row, seed=index, truncate=self.truncate)
            if rendered is None:
                continue
            if self.kind == "rank" and rendered.targets not in (rendered.choices or ()):
                continue
            yield index, rendered


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, length: int, mtime: float) -> str:
    """Hash of a file's bytes; length and time say when a remembered one is out of date."""
    del length, mtime
    return hashlib.sha256(storage.as_path(path).read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PromptMixture:
    """Several tasks to be trained on together.

    Attributes:
        name: of the mixture.
        tasks: names of its tasks.
        dataset_cap: most examples that count of one data set, shared by its prompts.
    """

    name: str
    tasks: tuple[str, ...]
    dataset_cap: int


_TASKS: dict[str, PromptedTask] = {}
_MIXTURES: dict[str, PromptMixture] = {}


def add_prompted_task(
    dataset: str,
    config: str | None,
    template: str | PromptTemplate,
    *,
    kind: str,
    role: str,
    splits: Sequence[str] = ("train", "validation"),
    rows: RowReader | None = None,
    template_folder: PathLike | None = None,
    truncate: bool = True,
    adapt: RowAdapter | None = None,
) -> str:
    """Registers one data set with one template; reads nothing.

    Args:
        dataset: name of the data set.
        config: its config, None without one.
        template: the template, or its own name, by which it is found when it is needed.
        kind: ``rank`` (answer choices are ranked) or ``generation``.
        role: one of `ROLES`.
        splits: names of the splits.
        rows: reads a split; None for the files below the data folder.
        template_folder: a folder in promptsource's layout, for templates that come with a registry.
        truncate: see `PromptTemplate.parts`.
        adapt: makes the template's fields of a source's row.

    Returns:
        The task's name.

    Raises:
        InputError: no such kind or role, or the name is taken.
    """
    prompt = template if isinstance(template, PromptTemplate) else None
    own_name = prompt.name if prompt else template
    name = templates.task_name(dataset, config, own_name)
    for what, value, known in (("kind", kind, KINDS), ("role", role, ROLES)):
        if value not in known:
            raise unknown_name(f"{what} of a task", value, known, where=name)
    if name in _TASKS:
        raise InputError(describe(f"The task name {name} is taken", got=repr(own_name),
                                  expected=f"another name than that of {_TASKS[name].template!r}"))
    _TASKS[name] = PromptedTask(
        name, dataset, config, own_name, kind, role, tuple(splits), prompt, rows, template_folder,
        truncate, adapt)
    return name


def add_mixture(name: str, tasks: Sequence[str], *, dataset_cap: int = 100_000) -> None:
    """Registers a mixture of registered tasks.

    Args:
        name: of the mixture.
        tasks: names of its tasks.
        dataset_cap: most examples that count of one data set, shared by its prompts (ELM.md's
            100,000 for dataset experts and the multitask baseline).

    Raises:
        InputError: the name is taken, a task is unknown, or there are none.
    """
    if name in _MIXTURES or name in _TASKS:
        raise InputError(describe(f"The mixture name {name} is taken"))
    if not tasks or dataset_cap < 1:
        raise InputError(describe(f"Mixture {name} needs tasks and a cap of 1 or more",
                                  got=f"{len(tasks)} tasks, cap {dataset_cap}"))
    for task in tasks:
        get_task(task)
    _MIXTURES[name] = PromptMixture(name, tuple(tasks), dataset_cap)


def get_task(name: str) -> PromptedTask:
    """A registered task; an unknown name is an InputError with the three nearest."""
    if name not in _TASKS:
        raise unknown_name("task", name, _TASKS)
    return _TASKS[name]


def get_mixture(name: str) -> PromptMixture:
    """A registered mixture; an unknown name is an InputError with the three nearest."""
    if name not in _MIXTURES:
        raise unknown_name("mixture", name, _MIXTURES)
    return _MIXTURES[name]


def task_names(*, role: str | None = None, available_only: bool = False) -> list[str]:
    """Names of the registered tasks, sorted.

    Args:
        role: only tasks of this role.
        available_only: only tasks that the data at hand can serve.
    """
    names = (name for name, task in _TASKS.items() if role in (None, task.role))
    return sorted(_available(names) if available_only else names)


def mixture_names() -> list[str]:
    """Names of the registered mixtures, sorted."""
    return sorted(_MIXTURES)


def mixture_tasks(name: str, prepared: Collection[str] = ()) -> list[str]:
    """The tasks of a mixture that the data at hand can serve; the log names how many are left out.

    Args:
        name: of the mixture.
        prepared: tasks that need no data, since their arrays are there.

    Raises:
        InputError: no such mixture, or no data for any of its tasks.
    """
    mixture = get_mixture(name)
    found = [task for task in mixture.tasks
             if task in prepared or _TASKS[task].why_unavailable() is None]
    if not found:
        raise InputError(describe(
            f"There are no data for any task of mixture {name}", got=sources.data_dir(),
            cure=f"set {sources.DATA_DIR_VARIABLE} to a folder that has the data sets, or give the "
            "folder of their prepared arrays"))
    if len(found) < len(mixture.tasks):
        logger.info("mixture %s: %d of %d tasks have data", name, len(found), len(mixture.tasks))
    return found


def _available(names: Sequence[str] | Iterator[str]) -> list[str]:
    return [name for name in names if _TASKS[name].why_unavailable() is None]


def mixture_rates(name: str, split: str = "train") -> dict[str, float]:
    """How many examples each task of a mixture counts for.

    A task counts its rows, but at most its share of the data set's cap: the cap divided by the
    number of the data set's prompts in the mixture.
    """
    tasks = [get_task(task) for task in mixture_tasks(name)]
    prompts = collections.Counter(task.dataset_name for task in tasks)
    cap = get_mixture(name).dataset_cap
    return {task.name: float(min(task.num_rows(split), cap / prompts[task.dataset_name]))
            for task in tasks}


def describe_task(name: str) -> dict[str, Any]:
    """Facts of a task for a reader; reads its template, not its rows."""
    task = get_task(name)
    template = task.load_template()
    return {
        "name": task.name, "dataset": task.dataset, "config": task.config,
        "template": task.template, "kind": task.kind, "role": task.role,
        "splits": list(task.splits), "choices_expression": template.answer_choices,
        "metrics": list(template.metrics), "choices_in_prompt": template.choices_in_prompt,
        "original_task": template.original_task, "reference": template.reference,
        "unavailable": task.why_unavailable(),
    }


def import_module(name: str) -> types.ModuleType:
    """Imports a module that the user names; one that is not installed may lie in the current folder.

    The `elm` command does not have that folder on its path. It comes last, and only for such a name, so
    that no file there can hide a package.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] or os.getcwd() in sys.path:
            raise
    sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def import_tasks(module_names: Sequence[str]) -> None:
    """Imports registries by name; a second import of one does nothing.

    Raises:
        InputError: there is no such module.
    """
    for module in module_names:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise InputError(describe(f"The task registry {module} cannot be imported", got=error,
                                      expected="a module's full name, such as elm_jax.tasks, or my_tasks "
                                      "for my_tasks.py in the current folder")) from error
