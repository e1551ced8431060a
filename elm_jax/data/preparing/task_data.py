"""Task data of a workflow: prepared arrays, made from rows and templates where they are missing.

A task's split is rendered and tokenised once and kept as prepared arrays. Every later use, also on a machine
that has neither data nor templates, reads the arrays.
"""

import collections
import dataclasses
import logging
from collections.abc import Sequence

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.chat_rows import ChatFrame, with_chat
from elm_jax.data.preparing.few_shot import with_exemplars
from elm_jax.data.preparing.prepare import prepare
from elm_jax.data.preparing.prepared_folder import PreparedFolder
from elm_jax.data.registry import registry
from elm_jax.data.registry.task_rows import describe_dropped
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime import hosts, storage
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_range, items_of
from elm_jax.runtime.terminal.progress import tell_item
from elm_jax.vocabularies.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
MOST_OPEN = 100
"""Splits on disk that are kept open; each holds two files, of the 1,024 that systems often allow."""


@dataclasses.dataclass
class TaskData:
    """Gives prepared splits by task name, and prepares those that are missing.

    Attributes:
        vocabulary: of the base that will read the tokens.
        modules: registries to import by name before a task is prepared, e.g. ``elm_jax.tasks``.
        prepared_dir: folder of prepared arrays, ``<task>/<split>``; None keeps them in memory only.
        few_shot: rows of `exemplar_split` to put before each input, see `few_shot.with_exemplars`.
        few_shot_length: tokens of an input with them.
        frame: of a chat template, around every input; None leaves inputs as they are.
    """

    vocabulary: Vocabulary
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: storage.PathLike | None = None
    few_shot: int = 0
    few_shot_length: int = 512
    frame: ChatFrame | None = None

    def __post_init__(self) -> None:
        self.modules = items_of(self.modules)
        check_range("few_shot", self.few_shot, 0)
        if self.few_shot and self.frame is not None:
            raise InputError(describe("Exemplars are not put into chat templates", where="few_shot",
                                      got=f"few_shot = {self.few_shot}, rendering chat",
                                      cure="leave one of them out"))
        self._framed: dict[ChatFrame | None, TaskData] = {}
        self._splits: collections.OrderedDict[tuple[str, str, int | None], PreparedSplit] = (
            collections.OrderedDict())
        self._folder = None if self.prepared_dir is None else PreparedFolder(
            storage.as_path(self.prepared_dir), self.vocabulary)

    def split(self, task: str, split: str, max_rows: int | None = None) -> PreparedSplit:
        """Returns one split of a task as prepared arrays; prepares and keeps it if it is missing.

        Args:
            task: registered name of a task (not of a mixture).
            split: ``train`` or ``validation``.
            max_rows: a seeded random subset of at most this many rows.

        Raises:
            InputError: no such task, no such split, or arrays of another vocabulary.
        """
        key = (task, split, max_rows)
        if key not in self._splits:
            found = self._open(task, split, max_rows)
            found = self._with_exemplars(found) if self.few_shot else found
            self._splits[key] = found if self.frame is None else with_chat(found, self.vocabulary, self.frame)
            in_memory = self._folder is None or self.few_shot or self.frame is not None
            if len(self._splits) > MOST_OPEN and not in_memory:
                self._splits.popitem(last=False)
        self._splits.move_to_end(key)
        return self._splits[key]

    @property
    def needs_arrays(self) -> bool:
        """Whether a split is more than its rendered rows: kept in a folder, with exemplars or in a frame."""
        return self._folder is not None or bool(self.few_shot) or self.frame is not None

    def with_frame(self, frame: ChatFrame | None) -> "TaskData":
        """The same data with inputs in another frame; the same object each time."""
        if frame == self.frame:
            return self
        if frame not in self._framed:
            self._framed[frame] = dataclasses.replace(self, frame=frame)
        return self._framed[frame]

    def has_rows(self, task: str, split: str, max_rows: int | None = None) -> bool:
        """Whether a split has rows, as prepared arrays or, of a registered task, in the data folder."""
        if self._folder is not None and self._folder.has(task, split, max_rows):
            return True
        registry.import_tasks(self.modules)
        known = registry.find_task(task)
        return known is not None and known.has_rows(split)

    def clear_leftovers(self) -> None:
        """Removes arrays that killed processes had not finished; those that a living one writes stay."""
        if self._folder is not None:
            self._folder.clear()

    def _with_exemplars(self, found: PreparedSplit) -> PreparedSplit:
        train = self._open(found.name, self.exemplar_split(found.name), None)
        made = with_exemplars(found, train, self.vocabulary, few_shot=self.few_shot,
                              max_length=self.few_shot_length)
        tell_item(logger, "%s %s: %.2f of %d exemplars a row fit into %d tokens", found.name, found.split,
                  made.info["few_shot_taken"] / max(len(made), 1), self.few_shot, self.few_shot_length)
        return made

    def _open(self, task: str, split: str, max_rows: int | None) -> PreparedSplit:
        if self._folder is None:
            return self._prepare(task, split, max_rows)
        # One process prepares, the others wait for it and read.
        hosts.by_first(lambda: self._ensure(task, split, max_rows))
        found = self._folder.find(task, split, max_rows)
        if found is None:
            raise InputError(describe(
                "Prepared arrays were written, but this process does not see them", where=self.prepared_dir,
                got=f"no {task} {split}", cure="give a folder that all processes share"))
        return found

    def _ensure(self, task: str, split: str, max_rows: int | None) -> None:
        """Prepares and writes the arrays of a split unless they exist."""
        if self._folder.find(task, split, max_rows) is None:
            self._folder.write(self._prepare(task, split, max_rows), task, split, max_rows)

    def _prepare(self, task: str, split: str, max_rows: int | None) -> PreparedSplit:
        registry.import_tasks(self.modules)
        made = prepare(task, split, self.vocabulary, max_rows=max_rows)
        tell_item(logger, "prepared %s %s: %d rows, %s", task, split, len(made),
                  describe_dropped(made.info["dropped"]))
        return made

    def exemplar_split(self, task: str) -> str:
        """The split that few-shot exemplars come from: ``train``, else the one that is scored."""
        registry.import_tasks(self.modules)
        known = task in registry.task_names()
        return self.evaluation_split(task) if known and "train" not in self.splits_of(task) else "train"

    def splits_of(self, task: str) -> tuple[str, ...]:
        """The splits that a registered task has."""
        registry.import_tasks(self.modules)
        return registry.get_task(task).splits

    def evaluation_split(self, task: str) -> str:
        """The split that a task is scored on: ``validation``, or its only one (BIG-bench: ``test``)."""
        registry.import_tasks(self.modules)
        return registry.get_task(task).evaluation_split if task in registry.task_names() else "validation"

    def evaluation_rows(self, names: Sequence[str]) -> int | None:
        """Number of rows to score of each task, as the mixtures among `names` say; None for all.

        Raises:
            InputError: the mixtures say different numbers.
        """
        registry.import_tasks(self.modules)
        limits = {name: registry.get_mixture(name).eval_rows if name in registry.mixture_names() else None
                  for name in items_of(names)}
        if len(set(limits.values())) > 1:
            raise InputError(describe(
                "Of these tasks unlike numbers of rows are scored", got=", ".join(
                    f"{name}: {limit or 'all'}" for name, limit in limits.items()),
                expected="one number", cure="score them in two runs, or give --max_rows"))
        return next(iter(limits.values()), None)

    def tasks_of(self, name: str) -> list[str]:
        """Names of the tasks behind a name: the task itself, or the members of a mixture.

        Only those members of a mixture count that have data or prepared arrays where the first process runs.

        Raises:
            InputError: there is neither a task nor a mixture of that name (the nearest are named).
        """
        return hosts.by_first(lambda: self._tasks_of(name))

    def _tasks_of(self, name: str) -> list[str]:
        if self._folder is not None and (self._folder.path / name).exists():
            return [name]
        registry.import_tasks(self.modules)
        if name in registry.task_names():
            return [name]
        if name in registry.mixture_names():
            tasks = registry.get_mixture(name).tasks
            prepared = set() if self._folder is None else self._folder.prepared_of(tasks)
            return registry.mixture_tasks(name, prepared)
        raise unknown_name("task or mixture", name,
                           [*registry.task_names(), *registry.mixture_names()],
                           where=", ".join(self.modules), cure=registry.OWN_MODULE)
