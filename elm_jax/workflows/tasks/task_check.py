"""Checks data sets: which exist, whether they are complete, and how to get the others (`elm tasks check`)."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from elm_jax.data.registry import registry
from elm_jax.data.registry.prompted_task import PromptedTask
from elm_jax.errors import InputError
from elm_jax.runtime.config_checks import items_of
from elm_jax.workflows.name_patterns import chosen

HOW_TO_GET = """A data set of the hub as JSON lines (a split "test" serves where there is no "validation"):
  python -c "import datasets; [rows.to_json(f'DATA/NAME/CONFIG/{name}.jsonl') \\
for name, rows in datasets.load_dataset('NAME', 'CONFIG').items()]"
and export ELM_DATA_DIR=DATA (no CONFIG folder where there is no config). Or as TFDS has it:
  python -c "import tensorflow_datasets as tfds; \\
tfds.builder('NAME/CONFIG', data_dir='TFDS').download_and_prepare()"
and export ELM_TFDS_DIR=TFDS ('huggingface:NAME/CONFIG' for those of the hub)."""


def check_data(modules: Sequence[str], patterns: Sequence[str] = (), has_data: bool | None = None
               ) -> Iterator[dict[str, Any]]:
    """Checks every data set that a registered task reads: all rows, and each template on the first of them.

    Args:
        modules: registries to import.
        patterns: only data sets whose name (``dataset`` or ``dataset/config``) fits one.
        has_data: only data sets that are there, or that are not; None for all.

    Yields:
        A data set each, ``{dataset, config, roles, tasks, splits (name -> rows), without (splits that its
        tasks have and that are not there), lacking (task -> what its rows lack), faults (in words), origin
        (where the rows come from; None if they are there)}``. A data set without any split is not there.

    Raises:
        InputError: a pattern fits no data set.
    """
    registry.import_tasks(modules)
    by_source: dict[tuple[str, str | None], list[PromptedTask]] = collections.defaultdict(list)
    for name in registry.task_names():
        task = registry.get_task(name)
        by_source[task.row_source].append(task)
    fitting = set(chosen("data set", items_of(patterns), map(_name, by_source)))
    for dataset, config in sorted(by_source, key=lambda source: (source[0], source[1] or "")):
        tasks = by_source[dataset, config]
        if _name((dataset, config)) not in fitting or has_data not in (None, any(map(_has_rows, tasks))):
            continue
        splits, faults = _splits(tasks)
        reasons = {task.name: task.why_unavailable() for task in tasks}
        lacking = {name: reason for name, reason in reasons.items() if reason is not None and splits}
        without = sorted({split for task in tasks for split in task.splits} - set(splits)) if splits else []
        for task in tasks if splits else ():
            if task.name not in lacking:
                faults += _faults(task, next(split for split in task.splits if task.has_rows(split)))
        yield {
            "dataset": dataset, "config": config, "roles": sorted({task.role for task in tasks}),
            "tasks": len(tasks), "splits": splits, "without": without, "lacking": lacking, "faults": faults,
            "origin": None if splits or faults else registry.origin_of(dataset, config),
        }


def _name(source: tuple[str, str | None]) -> str:
    return "/".join(part for part in source if part)


def _has_rows(task: PromptedTask) -> bool:
    return any(map(task.has_rows, task.splits))


def _splits(tasks: Sequence[PromptedTask]) -> tuple[dict[str, int], list[str]]:
    """Counts the rows of each existing split, reading all of them, and lists faults of the others."""
    readers = {split: task for task in tasks for split in task.splits if task.has_rows(split)}
    found, faults = {}, []
    for split, task in readers.items():
        try:
            found[split] = len(task.read_rows(split))
        except InputError as error:
            faults.append(str(error))
    return found, faults


def _faults(task: PromptedTask, split: str) -> list[str]:
    """The reason why a task's template does not fit the rows; empty if it gives a prompt."""
    try:
        if next(task.render_rows(split), None) is None:
            return [f"{task.name}: its template leaves no row of {split}"]
    except InputError as error:
        return [f"{task.name}: {error}"]
    return []
