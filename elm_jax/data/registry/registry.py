"""The registry of prompted tasks and mixtures: facts only, no TensorFlow, no data.

The modules of ``elm_jax.tasks`` add tasks and mixtures here when they are imported. Templates and
rows are read on first use. `seqio_tasks` makes SeqIO tasks and prepared arrays of them.
"""

import collections
import dataclasses
import importlib
import logging
import os
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from elm_jax.data.arrays.prepared import KINDS, PROMPT_CUTS, RIGHT
from elm_jax.data.prompts import templates
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry.prompted_task import (
    OwnRows,
    PromptedTask,
    Recipe,
    RowReader,
    TemplateMaker,
)
from elm_jax.data.registry.task_rows import NO_LISTS, RowAdapter, RowLists
from elm_jax.data.sources import cached_p3, row_files
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.storage import PathLike

__all__ = [
    "EVALUATION_ONLY",
    "ROLES",
    "OwnRows",
    "PromptMixture",
    "PromptedTask",
    "Recipe",
    "RowAdapter",
    "RowLists",
    "RowReader",
    "TemplateMaker",
    "add_mixture",
    "add_origin",
    "add_prompted_task",
    "capped_mixture",
    "check_trainable",
    "describe_task",
    "evaluation_only",
    "find_mixture",
    "find_task",
    "get_mixture",
    "get_task",
    "import_module",
    "import_tasks",
    "mixture_names",
    "mixture_rates",
    "mixture_tasks",
    "origin_of",
    "task_names",
]

logger = logging.getLogger(__name__)

ROLES = ("train", "extra", "unseen", "unseen_extra", "generative", "compositional", "bigbench",
         "bigbench_extra", "bbh")
"""What a task is for. Experts of the published comparison are trained on ``train`` and scored on ``unseen``;
``generative`` tasks may get experts of their own, and so may the parts of ``compositional`` ones. An
``extra`` role is that of tasks beside those of the comparison, from the same or like data sets."""
OWN_MODULE = ("a name of your own is known when its module is named: --module my_tasks for my_tasks.py (gin: "
              "TASK_MODULES, Python: modules=)")
"""What to do about the name of a task or mixture that nothing has registered."""
EVALUATION_ONLY = ("unseen", "unseen_extra", "bigbench", "bigbench_extra", "bbh")
"""Roles of tasks that nothing is ever trained on."""


@dataclasses.dataclass(frozen=True)
class PromptMixture:
    """Several tasks that are trained on together.

    Attributes:
        name: of the mixture.
        tasks: names of its tasks.
        dataset_cap: most examples that count of one data set, shared by its prompts.
        eval_rows: at most this many rows a task when the mixture is evaluated; None for all.
        t0_rates: whether the prompts of a data set that is no larger than the cap count all its rows each.
        capped: whether it is another mixture's tasks with another cap, which a training run keeps to.
    """

    name: str
    tasks: tuple[str, ...]
    dataset_cap: int
    eval_rows: int | None = None
    t0_rates: bool = False
    capped: bool = False

    def share_of(self, rows: int, prompts: int) -> float:
        """Number of rows that one prompt of a data set contributes, if `prompts` prompts share the data set.

        All, but at most the prompt's share of the data set's cap. With T0's rates that share counts only for
        a data set of more rows than the cap; each prompt of a smaller one counts all of its rows. Source:
        bigscience-workshop/t-zero, ``t0/seqio_tasks/tasks.py``.
        """
        share = self.dataset_cap / prompts
        if self.t0_rates:
            return float(rows if rows <= self.dataset_cap else int(share))
        return float(min(rows, share))


READY_LISTS = RowLists(scores="scores", references="targets")
"""Fields of rows that are prompts already."""
_TASKS: dict[str, PromptedTask] = {}
_MIXTURES: dict[str, PromptMixture] = {}
_ORIGINS: dict[tuple[str, str | None], str] = {}


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
    make_template: TemplateMaker | None = None,
    source: tuple[str, str | None] | None = None,
    category: str | None = None,
    recipe: Recipe | None = None,
    parts: Sequence[str] = (),
    versions: Callable[[str], Mapping[str, str]] | None = None,
    ready: bool = False,
    own_files: Sequence[OwnRows] | None = None,
    cut_prompt: str = RIGHT,
    lists: RowLists = NO_LISTS,
    metrics: Sequence[str] = (),
) -> str:
    """Registers a task of one data set with one template; reads nothing.

    Args:
        dataset: name of the data set.
        config: its config, None without one.
        template: the template, or its own name, by which it is found when it is needed.
        kind: ``rank`` (answer choices are ranked) or ``generation``.
        role: one of `ROLES`.
        splits: names of the splits.
        rows: reads a split; None for the files below the data folder. It is taken to give the same rows of a
            split as long as the process runs.
        template_folder: a folder in promptsource's layout, for templates that come with a registry.
        truncate: see `PromptTemplate.parts`.
        adapt: makes the template's fields of a source's row.
        make_template: gives the template when it is needed, in place of the search by its name.
        source: data set and config whose rows these are, if not the task's own.
        category: kind of task after T0's groups.
        recipe: how the paper trains an expert of the task.
        parts: registered tasks whose instructions this one joins.
        versions: gives the known versions of a task's template by the digest of its text.
        ready: whether the rows are prompts already, with the fields ``inputs``, ``targets`` (a list if
            several texts are right) and, to be ranked, ``choices`` (and ``scores``, if several have a
            credit); `template` is but a name then.
        own_files: one for each split (a file of rows, or a cached split), in place of those below the data
            folder.
        cut_prompt: the side on which a prompt that is longer than a run's length is cut: ``right`` keeps its
            start, ``left`` its end. EOS stays, and so does BOS where a network has one.
        lists: fields of the rows that hold choices, their scores, or several right texts.
        metrics: beside that of its kind: names of `evaluation.task_metrics`.

    Returns:
        The task's name.

    Raises:
        InputError: no such kind, role, side or part, or the name is taken.
    """
    prompt = template if isinstance(template, PromptTemplate) else None
    own_name = prompt.name if prompt else template
    name = templates.task_name(dataset, config, own_name)
    for what, value, known in (("kind", kind, KINDS), ("role", role, ROLES),
                               ("cut_prompt", cut_prompt, PROMPT_CUTS)):
        if value not in known:
            raise unknown_name(f"{what} of a task", str(value), known, where=name)
    if name in _TASKS:
        raise InputError(describe(f"The task name {name} is taken", got=repr(own_name),
                                  expected=f"another name than that of {_TASKS[name].template!r}"))
    for part in parts:
        get_task(part)
    _TASKS[name] = PromptedTask(
        name, dataset, config, own_name, kind, role, tuple(items_of(splits)), prompt or make_template, rows,
        template_folder, truncate, adapt, source, category, recipe, tuple(items_of(parts)), versions,
        ready, None if own_files is None else tuple(own_files), cut_prompt,
        READY_LISTS if ready else lists, tuple(items_of(metrics)))
    return name


def add_cached_task(
    dataset: str, config: str | None, template: str, folder: PathLike, *, kind: str, role: str,
    splits: Sequence[str] = ("train", "validation"), vocabulary: PathLike | None = None,
    cut_prompt: str = RIGHT,
) -> str:
    """Registers a task of T0's cached P3 (`cached_p3`), which needs no rendering; reads nothing.

    Args:
        dataset: name of the data set.
        config: its config, None without one.
        template: the template's own name.
        folder: of the cached task.
        kind: ``rank`` for a cache of scored choices (``..._score_eval``), else ``generation``.
        role: one of `ROLES`.
        splits: names of the splits that are cached.
        vocabulary: file of that of the cached token ids, where the texts are left out.
        cut_prompt: see `add_prompted_task`.

    Returns:
        The task's name.
    """
    own = [cached_p3.CachedSplit(storage.as_path(folder), split, vocabulary and storage.as_path(vocabulary))
           for split in items_of(splits)]
    return add_prompted_task(dataset, config, template, kind=kind, role=role, splits=splits, own_files=own,
                             ready=True, cut_prompt=cut_prompt)


def add_mixture(name: str, tasks: Sequence[str], *, dataset_cap: int = 100_000,
                eval_rows: int | None = None, t0_rates: bool = False) -> None:
    """Registers a mixture of registered tasks.

    Args:
        name: of the mixture.
        tasks: names of its tasks.
        dataset_cap: most examples that count of one data set, shared by its prompts (ELM.md's
            100,000 for dataset experts and the multitask baseline).
        eval_rows: at most this many rows a task when the mixture is evaluated; None for all.
        t0_rates: whether the cap is T0's, see `mixture_rates`.

    Raises:
        InputError: the name is taken, a task is unknown, or there are none.
    """
    if name in _MIXTURES or name in _TASKS:
        raise InputError(describe(f"The mixture name {name} is taken"))
    if not tasks or dataset_cap < 1 or (eval_rows is not None and eval_rows < 1):
        raise InputError(describe(f"Mixture {name} needs tasks, and caps of 1 or more",
                                  got=f"{len(tasks)} tasks, cap {dataset_cap}, evaluated rows {eval_rows}"))
    tasks = items_of(tasks)
    for task in tasks:
        get_task(task)
    _MIXTURES[name] = PromptMixture(name, tuple(tasks), dataset_cap, eval_rows, t0_rates)


def add_origin(dataset: str, config: str | None, text: str) -> None:
    """Records, in words, where a data set's rows come from, if not from the hub under its own name."""
    _ORIGINS[dataset, config] = text


def origin_of(dataset: str, config: str | None) -> str:
    """Describes in words where a data set's rows come from."""
    words = f"datasets.load_dataset({', '.join(map(repr, filter(None, (dataset, config))))})"
    return _ORIGINS.get((dataset, config), words)


def capped_mixture(name: str, dataset_cap: int, *, t0_rates: bool = False) -> str:
    """Registers a mixture's tasks as a second mixture with another cap on each data set.

    Args:
        name: of the mixture.
        dataset_cap: see `add_mixture`, as for `t0_rates`.
        t0_rates: see there.

    Returns:
        The new mixture's name, ``<name>_cap_<dataset_cap>``.
    """
    capped = f"{name}_cap_{dataset_cap}"
    add_mixture(capped, get_mixture(name).tasks, dataset_cap=dataset_cap, t0_rates=t0_rates)
    _MIXTURES[capped] = dataclasses.replace(_MIXTURES[capped], capped=True)
    return capped


def check_trainable(names: Sequence[str]) -> None:
    """Raises InputError if any of the tasks is for evaluation only.

    Args:
        names: of tasks; those that are not registered, whose arrays alone are there, are skipped.
    """
    refused = [name for name in items_of(names) if name in _TASKS and _TASKS[name].role in EVALUATION_ONLY]
    if refused:
        raise evaluation_only(refused, {_TASKS[name].role for name in refused})


def evaluation_only(names: Sequence[str], roles: Collection[str]) -> InputError:
    """The error for training on tasks that are for evaluation only."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return InputError(describe(
        "A task that is for evaluation only cannot be trained on", where=shown,
        got=f"role {', '.join(sorted(roles))}", expected=f"none of {', '.join(EVALUATION_ONLY)}",
        cure="train on tasks of another role: `elm tasks list` names them"))


def get_task(name: str) -> PromptedTask:
    """Returns a registered task; an unknown name is an InputError with the three nearest."""
    if name not in _TASKS:
        raise unknown_name("task", name, _TASKS, cure=OWN_MODULE)
    return _TASKS[name]


def find_task(name: str) -> PromptedTask | None:
    """Returns a registered task, or None if no task has the name."""
    return _TASKS.get(name)


def get_mixture(name: str) -> PromptMixture:
    """Returns a registered mixture; an unknown name is an InputError with the three nearest."""
    if name not in _MIXTURES:
        raise unknown_name("mixture", name, _MIXTURES, cure=OWN_MODULE)
    return _MIXTURES[name]


def find_mixture(name: str) -> PromptMixture | None:
    """Returns a registered mixture, or None if no mixture has the name."""
    return _MIXTURES.get(name)


def task_names(*, role: str | None = None, available_only: bool = False) -> list[str]:
    """Names of the registered tasks, sorted.

    Args:
        role: only tasks of this role.
        available_only: only tasks whose data exist here.
    """
    names = (name for name, task in _TASKS.items() if role in (None, task.role))
    return sorted(_available(names) if available_only else names)


def mixture_names() -> list[str]:
    """Names of the registered mixtures, sorted."""
    return sorted(_MIXTURES)


def mixture_tasks(name: str, prepared: Collection[str] = ()) -> list[str]:
    """Names of a mixture's tasks whose data exist here; logs how many tasks have none.

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
            f"There are no data for any task of mixture {name}", got=row_files.data_dir(),
            cure=f"set {row_files.DATA_DIR_VARIABLE} to a folder that has the data sets, or give the "
            "folder of their prepared arrays"))
    if len(found) < len(mixture.tasks):
        logger.info("mixture %s: %d of %d tasks have data", name, len(found), len(mixture.tasks))
    return found


def _available(names: Sequence[str] | Iterator[str]) -> list[str]:
    return [name for name in names if _TASKS[name].why_unavailable() is None]


def mixture_rates(name: str, split: str | None = None) -> dict[str, float]:
    """Number of examples that each task of a mixture counts for, see `PromptMixture.share_of`.

    Args:
        name: of the mixture.
        split: whose rows are counted; None for ``train``, or what a task has that has no train rows.
    """
    tasks = [get_task(task) for task in mixture_tasks(name)]
    prompts = collections.Counter(task.dataset_name for task in tasks)
    return {task.name: get_mixture(name).share_of(task.num_rows(split or _counted_split(task)),
                                                  prompts[task.dataset_name]) for task in tasks}


def _counted_split(task: PromptedTask) -> str:
    """The split whose rows are counted: ``train`` if it has rows, else the first one that has some."""
    return next(split for split in sorted(task.splits, key=lambda split: split != "train")
                if task.has_rows(split))


def describe_task(name: str) -> dict[str, Any]:
    """Facts of a task for display; reads its template, not its rows."""
    task = get_task(name)
    template = task.load_template()
    return {
        "name": task.name, "dataset": task.dataset, "config": task.config,
        "template": task.template, "template_digest": template.digest,
        "template_version": task.template_version(), "kind": task.kind, "role": task.role,
        "cut_prompt": task.cut_prompt,
        "splits": list(task.splits), "choices_expression": template.answer_choices,
        "category": task.category, "parts": list(task.parts),
        "recipe": dataclasses.asdict(task.recipe) if task.recipe else None,
        "metrics": list(template.metrics), "choices_in_prompt": template.choices_in_prompt,
        "original_task": template.original_task, "reference": template.reference,
        "unavailable": task.why_unavailable(),
    }


def import_module(name: str) -> types.ModuleType:
    """Imports a module that the user names; if it is not installed, from the current folder.

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
    """Imports task registries by name (a string is one name); importing one a second time does nothing.

    Raises:
        InputError: there is no such module.
    """
    for module in items_of(module_names):
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise InputError(describe(f"The task registry {module} cannot be imported", got=error,
                                      expected="a module's full name, such as elm_jax.tasks, or my_tasks "
                                      "for my_tasks.py in the current folder")) from error
