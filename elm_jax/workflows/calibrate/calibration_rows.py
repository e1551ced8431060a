"""What a calibration scores: tasks that experts were trained on, and rows of them that are no keys."""

import dataclasses
import itertools

import numpy as np

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.data.registry.task_kin import kin_of
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.results import ResultsStore
from elm_jax.experts.library import ExpertLibrary
from elm_jax.workflows.evaluate.evaluate_models import ScoringSetup

TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class CalibrationSetup(ScoringSetup):
    """A scoring setup whose rows are of the split that a task is scored on, or train rows that are no keys.

    Train rows, of a task that has no others, stay those of the first expert that was scored on them: a
    library that grows has other keys.

    Attributes:
        keys: inputs behind the library's keys.
        store: results of the calibration.
    """

    keys: frozenset[str] = frozenset()
    store: ResultsStore | None = None
    _splits: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    _kept: dict[tuple[str, int], PreparedSplit] = dataclasses.field(default_factory=dict, repr=False)

    def split_of(self, task: str) -> str:
        """The split that the task is scored on, unless only ``train`` has rows."""
        if task not in self._splits:
            split = super().split_of(task)
            only_train = not self.has_rows(task, split) and self.has_rows(task, TRAIN)
            self._splits[task] = TRAIN if only_train else split
        return self._splits[task]

    def has_rows(self, task: str, split: str) -> bool:
        """Whether there are rows of a split here."""
        return self.data.has_rows(task, split, self.max_rows)

    def drawn(self, task: str, data: TaskData) -> PreparedSplit:
        """The rows of a task that are scored; InputError for train rows that are all keys."""
        if self.split_of(task) != TRAIN:
            return super().drawn(task, data)
        place = task, id(data)
        if place not in self._kept:
            whole = data.split(task, TRAIN)
            plain = whole if data is self.data else self.data.split(task, TRAIN)
            self._kept[place] = whole.take(self._numbers(task, plain), max_rows=self.max_rows, seed=0)
        return self._kept[place]

    def _numbers(self, task: str, plain: PreparedSplit) -> list[int]:
        """Numbers of the train rows to score: as they were scored before, or new ones, no keys."""
        texts = [plain.text(number) for number in range(len(plain))]
        wanted = (task, TRAIN, self.max_rows)
        scored = [row["expert"] for row in self.store.rows()
                  if (row["task"], row["split"], row["max_rows"]) == wanted
                  and self.store.has_predictions(row["expert"], task, TRAIN)]
        if scored:
            places = {text["index"]: number for number, text in enumerate(texts)}
            indices = [one["index"] for one in self.store.predictions(scored[0], task, TRAIN)]
            if places.keys() >= set(indices):
                return [places[index] for index in indices]
        taken = [number for number, text in enumerate(texts) if text["inputs"] in self.keys]
        numbers = draw_rows(len(texts), self.max_rows, 0, taken=taken)
        if not len(numbers):
            raise InputError(describe(
                "All rows of a task are keys of the library", where=f"{task} train",
                got=f"{len(texts)} rows", cure="calibrate on other tasks: --task NAME"))
        return np.sort(numbers).tolist()


def tasks_of_training(library: ExpertLibrary, setup: CalibrationSetup, count: int
                      ) -> tuple[list[str], list[str]]:
    """Chooses tasks that the library's experts were trained on.

    Of each data set ranked tasks come first, which cost less than texts to generate, then those of older
    experts: what was chosen stays chosen as a library grows.

    Args:
        library: the experts.
        setup: whose data must have the tasks' rows.
        count: tasks of each data set.

    Returns:
        (tasks; data sets without rows here).
    """
    by_dataset: dict[str, list[str]] = {}
    for entry in library.entries.values():
        for task in entry.card.tasks:
            of = by_dataset.setdefault(kin_of(task).dataset, [])
            if task not in of:
                of.append(task)
    chosen, absent = [], []
    for dataset, tasks in by_dataset.items():
        here = (task for task in sorted(tasks, key=_is_generated)
                if setup.has_rows(task, setup.split_of(task)))
        found = list(itertools.islice(here, count))
        chosen += found
        absent += [] if found else [dataset]
    return chosen, absent


def _is_generated(task: str) -> bool:
    known = registry.find_task(task)
    return known is not None and known.kind != "rank"
