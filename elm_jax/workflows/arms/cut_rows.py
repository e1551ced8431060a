"""Task data of a run of a study of arms: some rows of a train split, the same for every arm.

The rows of a train split are put in an order by the study's seed: its end is held out, and no run trains on
it. The others are put in an order by the seed of the run, of which a run takes the first ones: fewer rows are
a part of more rows.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, describe

TRAIN, HELDOUT = "train", "heldout"
MOST_MADE = 40
"""Cut splits that stay in memory."""


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """A task of a run, and how many of its rows the run has.

    Attributes:
        task: its name.
        rows: at most this many; None for all.
        shown: the rows are repeated until there are so many of them, and are so many; None: each once.
    """

    task: str
    rows: int | None = None
    shown: int | None = None

    @property
    def label(self) -> str:
        """In the name of a run."""
        return self.task + (f"-{self.rows}" if self.rows is not None else "")


@dataclasses.dataclass(frozen=True)
class RowCuts:
    """Which rows of the train splits the runs of a study have.

    Attributes:
        data: all rows.
        heldout: rows of each train split that are held out.
        seed: of the study.
    """

    data: TaskData
    heldout: int
    seed: int
    _made: dict[tuple[TaskRows, int], PreparedSplit] = dataclasses.field(
        default_factory=dict, compare=False, repr=False)

    def heldout_split(self, task: str) -> PreparedSplit:
        """The rows of a task's train split that nothing is trained on, as a split of their own."""
        split = self.data.split(task, TRAIN)
        kept = split.take(np.sort(self._order(split)[self._cut(split):]))
        return dataclasses.replace(kept, split=HELDOUT)

    def rows_of(self, part: TaskRows, seed: int) -> PreparedSplit:
        """The rows of a task that a run of a seed trains on; the last ones stay in memory, for other arms."""
        if (part, seed) not in self._made:
            self._made[part, seed] = self._make(part, seed)
            while len(self._made) > MOST_MADE:
                self._made.pop(next(iter(self._made)))
        return self._made[part, seed]

    def _make(self, part: TaskRows, seed: int) -> PreparedSplit:
        split = self.data.split(part.task, TRAIN)
        order = self._order(split)[:self._cut(split)]
        order = order[draw_rows(len(order), len(order), (seed, _word(part.task)))]
        rows = np.sort(order if part.rows is None else order[:part.rows])
        if part.shown is not None:
            rows = np.resize(rows, part.shown)
        return split.take(rows)

    def _order(self, split: PreparedSplit) -> np.ndarray:
        return draw_rows(len(split), len(split), (self.seed, _word(split.name), 1))

    def _cut(self, split: PreparedSplit) -> int:
        """How many rows of the order are not held out."""
        left = len(split) - self.heldout
        if left < 1:
            raise InputError(describe("A train split has too few rows for those that are held out",
                                      where=split.name, got=f"{len(split)} rows",
                                      expected=f"more than heldout_rows = {self.heldout}"))
        return left


def _word(name: str) -> int:
    return zlib.crc32(name.encode())


@dataclasses.dataclass
class CutTaskData(TaskData):
    """Task data whose train splits have only the rows of one run.

    Attributes:
        cuts: of the study; its data are those behind this.
        parts: the tasks of the run.
        seed: of the run.
    """

    cuts: RowCuts | None = None
    parts: Sequence[TaskRows] = ()
    seed: int = 0

    @classmethod
    def of(cls, cuts: RowCuts, parts: Sequence[TaskRows], seed: int) -> "CutTaskData":
        """Makes the data of a run from those of the study."""
        return cls(cuts.data.vocabulary, cuts.data.modules, cuts=cuts, parts=parts, seed=seed)

    def split(self, task: str, split: str, max_rows: int | None = None) -> PreparedSplit:
        """One split of a task; a train split has the run's rows only."""
        part = next((part for part in self.parts if part.task == task), None)
        if split != TRAIN or part is None:
            return self.cuts.data.split(task, split, max_rows)
        key = (task, split, None)
        if key not in self._splits:
            self._splits[key] = self.cuts.rows_of(part, self.seed)
        return self._splits[key]

    def tasks_of(self, name: str) -> list[str]:
        """Names of the tasks behind a name."""
        return self.cuts.data.tasks_of(name)
