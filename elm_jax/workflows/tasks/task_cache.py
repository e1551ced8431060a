"""Prepares the arrays of many tasks' splits, with several processes and resumable (`elm tasks cache`)."""

import concurrent.futures
import concurrent.futures.process
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, RunError, describe
from elm_jax.runtime.config_checks import items_of
from elm_jax.vocabularies.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Job = tuple[str, str]
"""Task and split."""


def jobs_of(data: TaskData, names: Sequence[str], splits: Sequence[str] | None = None) -> list[Job]:
    """The splits of tasks and mixtures that have data or prepared arrays, each once.

    Args:
        data: says what there is.
        names: tasks and mixtures, or one; none for every registered task that has data.
        splits: only these, or this one, of the tasks that have them; None for all.

    Raises:
        InputError: an unknown name, or no task has any of the splits.
    """
    registry.import_tasks(data.modules)
    names, splits = items_of(names), items_of(splits)
    tasks = ([task for name in names for task in data.tasks_of(name)] if names
             else registry.task_names(available_only=True))
    own = [(task, split) for task in dict.fromkeys(tasks) for split in data.splits_of(task)]
    wanted = [(task, split) for task, split in own if splits is None or split in splits]
    if not wanted:
        raise InputError(describe("None of the tasks has such a split", got=", ".join(splits or ()) or "none",
                                  expected=", ".join(dict.fromkeys(split for _, split in own)) or "tasks"))
    found = [(task, split) for task, split in wanted if data.has_rows(task, split)]
    if len(names) == 1 and not found:  # reading it gives the best error message
        return wanted
    for task, split in wanted:
        if names and (task, split) not in found:
            logger.warning("%s: there are no rows of %s", task, split)
    if not found:
        raise InputError(describe("There are no data for any of the tasks", got=", ".join(names) or "(all)",
                                  cure="`elm tasks check` says what data there are"))
    return found


def cache(data: TaskData, jobs: Sequence[Job], max_rows: int | None = None,
          num_workers: int = 1) -> Iterator[PreparedSplit]:
    """Prepares missing splits; yields every split in the order of `jobs`.

    Args:
        data: with a folder of prepared arrays, which is what is written.
        jobs: tasks and splits.
        max_rows: a seeded random subset of at most this many rows of each.
        num_workers: processes that render and tokenise at the same time.

    Raises:
        InputError: of the first split that cannot be prepared; those before it are kept.
        RunError: a process died.
    """
    data.clear_leftovers()
    if num_workers < 2:
        yield from (data.split(task, split, max_rows) for task, split in jobs)
        return
    # Spawned: a fork would copy threads of JAX, and a registry is imported again by its name.
    context = multiprocessing.get_context("spawn")
    settings = (data.vocabulary.file(), data.modules, data.prepared_dir)
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent)
    try:
        running = [pool.submit(_prepare, settings, job, max_rows) for job in jobs]
        for (task, split), one in zip(jobs, running, strict=True):
            try:
                message = one.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise RunError(describe(
                    "A process that prepares tasks was lost", where=f"{task} {split}, or another beside it",
                    got=error, cure="the same command goes on; with fewer --num_workers if memory ran out"
                )) from error
            if message is not None:
                raise InputError(message)
            yield data.split(task, split, max_rows)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process when its parent process is gone, which cannot tell it when it is killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(settings: tuple[str, tuple[str, ...], str], job: Job, max_rows: int | None) -> str | None:
    """Prepares one split in a separate process; returns the message of an input error."""
    vocabulary, modules, prepared_dir = settings
    try:
        TaskData(_vocabulary(vocabulary), modules, prepared_dir).split(*job, max_rows)
    except InputError as error:
        return str(error)
    return None


_vocabulary = functools.cache(Vocabulary.load)
