"""Cells of a study's matrix of experts and tasks, and statistics over rows of cells.

A cell holds per-instance values (credit of an answer for a classification, ROUGE-L for a generation), so that
every row of a table can be compared with every other instance by instance. Values are fractions.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.evaluation import intervals
from elm_jax.evaluation.intervals import Estimate

SINGLE_VARIANCE = 1.0
"""Assumed variance of a single instance's value, larger than that of any fraction."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Scores of one expert on one task.

    Attributes:
        values: f64[n], one an instance.
        indices: i64[n], the instances' places in the source, ascending.
        metric: ``accuracy`` or ``rouge_l``.
        dataset: of the task.
        chance: expected accuracy of guessing, None for ROUGE-L.
        majority: f64[n], the values of always giving the most frequent right answer; None for ROUGE-L,
            and where that answer is not known.
        by_position: whether the majority answer is the position of a choice, not its text.
        constant: whether one expert gave one and the same answer on all instances; False for a cell that is
            put together of several experts' values.
        num_cut: instances whose input was cut; None where old results do not tell.
    """

    values: np.ndarray
    indices: np.ndarray
    metric: str
    dataset: str
    chance: float | None = None
    majority: np.ndarray | None = None
    by_position: bool = False
    constant: bool = False
    num_cut: int | None = None


Matrix = Mapping[tuple[str, str], Cell]
"""(expert, task) -> its cell."""
Row = dict[str, Cell]
"""task -> the cell that a row of the table uses."""


def cell_of(matrix: Matrix, expert: str, task: str) -> Cell:
    """Returns a cell of the matrix; a missing one is an InputError that names it."""
    if (expert, task) not in matrix:
        raise InputError(describe("A cell of the expert x task matrix is missing",
                                  where=f"expert {expert}, task {task}",
                                  cure="run the study again: it evaluates what is missing"))
    return matrix[expert, task]


def stacked(matrix: Matrix, experts: Sequence[str], task: str) -> tuple[Cell, np.ndarray]:
    """Values of one task under several experts: the first one's cell, and f64[E, n].

    Raises:
        InputError: a cell is missing, or an expert was scored on other instances than the first.
    """
    cells = [cell_of(matrix, expert, task) for expert in experts]
    for expert, cell in zip(experts, cells, strict=True):
        if not np.array_equal(cell.indices, cells[0].indices):
            raise InputError(describe(
                "Experts were not scored on the same instances", where=f"task {task}",
                got=f"{len(cell.indices)} instances of {expert}",
                expected=f"the {len(cells[0].indices)} of {experts[0]}",
                cure="evaluate them again with one setting of max_rows"))
    return cells[0], np.stack([cell.values for cell in cells])


def macro_mean(row: Row) -> Estimate:
    """Mean over data sets of the means over their tasks, with its 95% interval.

    Each data set has Wilson's interval for as many instances as make its mean as uncertain as it is: the
    prompts of one share instances (`dataset_variance`). Data sets are independent of each other
    (`intervals.combined`).
    """
    if not row:
        return Estimate(math.nan, math.nan, math.nan, 0)
    parts = [_dataset_mean(cells) for cells in _by_dataset(row).values()]
    return intervals.combined(parts, sum(part.n for part in parts))


def _by_dataset(row: Row) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in row.values():
        found.setdefault(cell.dataset, []).append(cell)
    return found


def _dataset_mean(cells: Sequence[Cell]) -> Estimate:
    """Mean over one data set's prompts of their means over instances."""
    mean = float(np.mean([cell.values.mean() for cell in cells]))
    count = len({int(index) for cell in cells for index in cell.indices})
    low, high = intervals.wilson(mean, intervals.effective_count(mean, dataset_variance(cells), count))
    return Estimate(mean, low, high, count)


def dataset_variance(cells: Sequence[Cell]) -> float:
    """Variance of the mean over one data set's P prompts of their means over n_p instances.

    An instance counts 1 / (P n_p) for every prompt that asks it. The instances are the independent
    units, so its departures from the prompts' means are added up before they are squared. With the
    factor n_p / (n_p - 1) this is the textbook estimate both for prompts that ask the same instances
    and for prompts that share none. Prompts of one instance add `SINGLE_VARIANCE`.
    """
    departures: dict[int, float] = {}
    single = 0.0
    for cell in cells:
        count = len(cell.values)
        if count == 1:
            single += 1 / len(cells)
            continue
        weight = 1 / (len(cells) * math.sqrt(count * (count - 1)))
        for index, departure in zip(cell.indices, cell.values - cell.values.mean(), strict=True):
            departures[int(index)] = departures.get(int(index), 0.0) + weight * float(departure)
    return sum(total**2 for total in departures.values()) + SINGLE_VARIANCE * single**2


def paired_difference(row: Row, other: Row) -> Estimate:
    """Macro mean of `row` minus that of `other`, with the paired bootstrap's interval.

    The instances of a data set are drawn again together, with all prompts that ask them
    (`intervals.paired_difference`).

    Raises:
        InputError: the rows were not scored on the same instances of the same tasks.
    """
    difference = {}
    for task, cell in row.items():
        against = other.get(task)
        if against is None or not np.array_equal(cell.indices, against.indices):
            raise InputError(describe("Rows were not scored on the same instances", where=task))
        difference[task] = dataclasses.replace(cell, values=cell.values - against.values)
    if not row:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return intervals.paired_difference([_table(cells) for cells in _by_dataset(difference).values()])


def _table(cells: Sequence[Cell]) -> np.ndarray:
    """Values f64[n, P] of a data set's n instances under P prompts; NaN where a prompt does not ask one."""
    indices = np.unique(np.concatenate([cell.indices for cell in cells]))
    table = np.full((len(indices), len(cells)), np.nan)
    for column, cell in enumerate(cells):
        table[np.searchsorted(indices, cell.indices), column] = cell.values
    return table


def majority_row(row: Row) -> Row:
    """Values of each task's most frequent right answer; tasks without one are left out."""
    return {task: dataclasses.replace(cell, values=cell.majority)
            for task, cell in row.items() if cell.majority is not None}


def majority_of(row: Row) -> float | None:
    """Macro mean of the majority answers; None unless every task of the row has one."""
    majority = majority_row(row)
    return macro_mean(majority).value if row and len(majority) == len(row) else None


def over_majority(row: Row) -> Estimate | None:
    """Paired difference between a row and its majority answers; None unless every task has one."""
    return None if majority_of(row) is None else paired_difference(row, majority_row(row))


def chance_of(row: Row) -> float:
    """Expected accuracy of guessing, averaged as `macro_mean` averages."""
    by_dataset: dict[str, list[float]] = {}
    for cell in row.values():
        by_dataset.setdefault(cell.dataset, []).append(cell.chance or 0.0)
    return float(np.mean([np.mean(values) for values in by_dataset.values()])) if by_dataset else math.nan


def always_constant(row: Row) -> bool:
    """Whether a row has tasks, and on all instances of each of them one and the same answer."""
    return bool(row) and all(cell.constant for cell in row.values())


def select(row: Row, tasks: Sequence[str], metric: str) -> Row:
    """The part of a row that belongs to some tasks and one metric."""
    return {task: row[task] for task in tasks if row[task].metric == metric}
