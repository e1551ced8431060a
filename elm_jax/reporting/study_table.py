"""The table of a study: rows of models and of ways to choose experts, columns of tasks.

All numbers come from per-instance values (1 or 0 for a classification, ROUGE-L for a generation), so
every row can be compared with every other instance by instance. Values are fractions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.intervals import Estimate
from elm_jax.reporting.cells import (
    Matrix,
    Row,
    always_constant,
    cell_of,
    chance_of,
    macro_mean,
    majority_of,
    over_majority,
    paired_difference,
    select,
    stacked,
)
from elm_jax.reporting.groups import BENCHMARKS, benchmarks, by_category, by_dataset

SPLIT_SEED = 0


def oracle_row(matrix: Matrix, experts: Sequence[str], tasks: Sequence[str]) -> Row:
    """The best expert of each task by its own score there; of equal ones the first."""
    row = {}
    for task in tasks:
        cell, values = stacked(matrix, experts, task)
        best = int(values.mean(axis=1).argmax())
        row[task] = dataclasses.replace(cell, values=values[best],
                                        constant=matrix[experts[best], task].constant)
    return row


def split_half_oracle_row(matrix: Matrix, experts: Sequence[str], tasks: Sequence[str]) -> Row:
    """The oracle without bias: chosen on one half of the instances, scored on the other.

    Both directions are used, so every instance is scored once, by the expert chosen on the other
    half. The halves are drawn by a fixed seed.
    """
    row = {}
    for task in tasks:
        cell, values = stacked(matrix, experts, task)
        first = first_half(values.shape[1])
        scored = np.zeros(values.shape[1])
        for half in (first, ~first):
            if half.all():  # one instance: nothing to choose by, so every expert is as likely
                scored = values.mean(axis=0)
            elif half.any():
                scored[half] = values[int(values[:, ~half].mean(axis=1).argmax())][half]
        row[task] = dataclasses.replace(cell, values=scored, constant=False)
    return row


def halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the instances in the two halves of a task's, i64, in the order of a draw by a fixed seed."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    return order[: count // 2], order[count // 2:]


def first_half(count: int) -> np.ndarray:
    """The first of `halves` as a mask bool[n]."""
    return np.isin(np.arange(count), halves(count)[0])


def random_expert_row(matrix: Matrix, experts: Sequence[str], tasks: Sequence[str]) -> Row:
    """Expected values of a random expert: the mean over all experts, instance by instance."""
    row = {}
    for task in tasks:
        cell, values = stacked(matrix, experts, task)
        row[task] = dataclasses.replace(cell, values=values.mean(axis=0), constant=False)
    return row


def best_single(matrix: Matrix, experts: Sequence[str], tasks: Sequence[str]) -> str:
    """The expert with the best mean over the data sets of `tasks` (chosen on the test itself)."""
    means = [macro_mean({task: cell_of(matrix, expert, task) for task in tasks}).value
             for expert in experts]
    return experts[int(np.argmax(means))]


def split_half_single_row(matrix: Matrix, experts: Sequence[str], chosen_on: Sequence[str],
                          tasks: Sequence[str]) -> Row:
    """The best single expert without bias: chosen on one half of the instances, scored on the other.

    The prompts of a data set share their halves: otherwise an instance would count for the choice in one
    prompt and be scored in another. Tasks that are not chosen on get the mean of the two chosen experts.

    Args:
        matrix: complete for `experts` and `tasks`.
        experts: to choose from.
        chosen_on: tasks of the choice.
        tasks: of the row; holds `chosen_on`.
    """
    first = _dataset_halves({task: cell_of(matrix, experts[0], task) for task in chosen_on})
    chosen = [best_single(_restrict(matrix, experts, half), experts, chosen_on)
              for half in (first, {task: ~mask for task, mask in first.items()})]
    row = {}
    for task in tasks:
        cell, values = stacked(matrix, chosen, task)
        mean = values.mean(axis=0)
        row[task] = dataclasses.replace(
            cell, values=np.where(first[task], values[1], values[0]) if task in first else mean,
            constant=False)
    return row


def _dataset_halves(row: Row) -> dict[str, np.ndarray]:
    """Masks by task, bool[n]: True in the first half of its data set's instances, by a fixed seed."""
    by_dataset: dict[str, set[int]] = {}
    for cell in row.values():
        by_dataset.setdefault(cell.dataset, set()).update(int(index) for index in cell.indices)
    halves = {}
    for dataset, indices in by_dataset.items():
        order = np.random.default_rng(SPLIT_SEED).permutation(sorted(indices))
        halves[dataset] = order[: (len(order) + 1) // 2]
    return {task: np.isin(cell.indices, halves[cell.dataset]) for task, cell in row.items()}


def _restrict(matrix: Matrix, experts: Sequence[str], keep: Mapping[str, np.ndarray]) -> Matrix:
    """The cells of some tasks with the kept instances only; a task that would keep none keeps all."""
    cells = {}
    for task, mask in keep.items():
        _, values = stacked(matrix, experts, task)
        mask = mask if mask.any() else np.ones_like(mask)
        for expert, own in zip(experts, values, strict=True):
            cell = matrix[expert, task]
            cells[expert, task] = dataclasses.replace(
                cell, values=own[mask], indices=cell.indices[mask], majority=None)
    return cells


def target_tasks(facts: Mapping[str, Any]) -> list[str]:
    """All tasks of data sets that no expert has seen."""
    # Old studies lack the keys.
    scored_only = [task for key in BENCHMARKS.values() for task in facts.get(key, ())]
    return [*facts["unseen_tasks"], *facts["generative_tasks"], *scored_only]


def rows_of_study(facts: Mapping[str, Any], matrix: Matrix) -> dict[str, Row]:
    """All rows of the table, in order."""
    experts = [expert["id"] for expert in facts["experts"]]
    tasks = [*facts["seen_tasks"], *target_tasks(facts)]
    unseen = [task for task in facts["unseen_tasks"]
              if cell_of(matrix, experts[0], task).metric == "accuracy"]
    if not unseen:
        raise InputError(describe("A study's table needs unseen tasks that are classified by rank",
                                  got=f"{len(facts['unseen_tasks'])} unseen tasks, none of that kind",
                                  expected="at least one in unseen_tasks"))

    def of(expert: str) -> Row:
        return {task: cell_of(matrix, expert, task) for task in tasks}

    decisions = facts["decisions"]
    single = best_single(matrix, experts, unseen)
    return {
        "base": of(facts["base"]),
        "multitask": of(facts["multitask"]),
        f"best single expert ({single})": of(single),
        "split-half best single expert": split_half_single_row(matrix, experts, unseen, tasks),
        "RoE top-1": {task: cell_of(matrix, decisions[task]["top_k"][0], task) for task in tasks},
        f"RoE top-{len(decisions[tasks[0]]['top_k'])} merged": {
            task: cell_of(matrix, decisions[task]["merged"], task) for task in tasks},
        "dataset experts merged": of(facts["merged_datasets"]),
        "oracle": oracle_row(matrix, experts, tasks),
        "split-half oracle": split_half_oracle_row(matrix, experts, tasks),
        "random expert": random_expert_row(matrix, experts, tasks),
    }


def chosen_on_the_test(name: str) -> bool:
    """Whether a row of the table was chosen by the scores that it shows, and so is biased upwards."""
    return name == "oracle" or name.startswith("best single expert (")


def study_table(facts: Mapping[str, Any], matrix: Matrix) -> dict[str, Any]:
    """Computes the table of a study as JSON-ready data.

    Returns:
        ``columns`` (names) and ``rows``: ``{name, values (column -> Estimate dict or None), constant (column
        -> whether the row has one and the same answer on all rows of each task),
        difference (unseen mean minus the multitask baseline's, an Estimate dict), over_majority (the
        same against the majority answers, or None)}``; ``chance`` and ``majority`` by column;
        ``majority_by_position`` (data sets whose majority answer is a position); ``by_category``,
        ``by_dataset`` and ``benchmarks`` (see `groups`); ``absent`` (tasks that had no data); ``own``
        (each expert on its own tasks against the base); ``inputs`` (how many of each task's were cut);
        ``selection_note``.

    Raises:
        InputError: a cell of the matrix is missing; it is named.
    """
    rows = rows_of_study(facts, matrix)
    groups = column_groups(facts, rows["base"])
    baseline = select(rows["multitask"], facts["unseen_tasks"], "accuracy")
    ranked = {column: select(rows["base"], tasks, metric)
              for column, (tasks, metric) in groups.items() if metric == "accuracy"}
    table = []
    for name, row in rows.items():
        unseen = select(row, facts["unseen_tasks"], "accuracy")
        table.append({
            "name": name,
            "values": {column: asdict(macro_mean(select(row, tasks, metric)))
                       for column, (tasks, metric) in groups.items()},
            "constant": {column: always_constant(select(row, tasks, metric))
                         for column, (tasks, metric) in groups.items()},
            "difference": asdict(paired_difference(unseen, baseline)),
            "over_majority": _as_dict(over_majority(unseen)),
        })
    return {
        "columns": list(groups), "rows": table,
        "chance": {column: chance_of(ranked[column]) if column in ranked else None for column in groups},
        "majority": {column: majority_of(ranked[column]) if column in ranked else None
                     for column in groups},
        "majority_by_position": list(dict.fromkeys(
            cell.dataset for cell in rows["base"].values() if cell.by_position)),
        "by_category": by_category(facts, rows), "by_dataset": by_dataset(facts, rows),
        "benchmarks": benchmarks(facts, rows), "absent": list(facts.get("absent_tasks", ())),
        "own": own_tasks(facts, matrix), "inputs": cut_inputs(matrix),
        "selection_note": facts["config"].get("selection_note", ""),  # old studies have none
    }


def _as_dict(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def cut_inputs(matrix: Matrix) -> list[dict[str, Any]]:
    """Counts cut inputs, ``{task, num_instances, num_cut}`` for each task; the same for all experts."""
    tasks = {task: cell for (_, task), cell in matrix.items()}
    return [{"task": task, "num_instances": len(cell.values), "num_cut": cell.num_cut}
            for task, cell in tasks.items()]


def column_groups(facts: Mapping[str, Any], row: Row) -> dict[str, tuple[list[str], str]]:
    """Columns -> (tasks, metric): seen mean, each unseen data set, unseen mean, benchmarks, ROUGE-L."""
    groups: dict[str, tuple[list[str], str]] = {"seen mean": (list(facts["seen_tasks"]), "accuracy")}
    for task in facts["unseen_tasks"]:
        groups.setdefault(row[task].dataset, ([], "accuracy"))[0].append(task)
    groups["unseen mean"] = (list(facts["unseen_tasks"]), "accuracy")
    known = {name: list(facts.get(key, ())) for name, key in BENCHMARKS.items()}  # old studies lack keys
    groups |= {f"{name} mean": (tasks, "accuracy") for name, tasks in known.items()}
    groups["seen ROUGE-L"] = (list(facts["seen_tasks"]), "rouge_l")
    groups["ROUGE-L"] = (list(facts["generative_tasks"]), "rouge_l")
    groups |= {f"{name} ROUGE-L": (tasks, "rouge_l") for name, tasks in known.items()}
    return {name: group for name, group in groups.items() if select(row, *group)}


def own_tasks(facts: Mapping[str, Any], matrix: Matrix) -> list[dict[str, Any]]:
    """Compares each prompt expert with the base on its own task, each dataset expert on its prompts."""
    found = []
    for expert in facts["experts"]:
        if expert["kind"] == "prompt":
            task = expert["tasks"][0]
            base = {task: cell_of(matrix, facts["base"], task)}
            own = {task: cell_of(matrix, expert["id"], task)}
            difference = paired_difference(own, base)
            found.append({
                **_own_row(expert, task, own), "base": asdict(macro_mean(base)),
                "base_constant": base[task].constant, "difference": asdict(difference),
                "beats_base": difference.low > 0})
            continue
        for task in expert["tasks"]:
            found.append(_own_row(expert, task, {task: cell_of(matrix, expert["id"], task)}))
    return found


def _own_row(expert: Mapping[str, Any], task: str, own: Row) -> dict[str, Any]:
    cell, over = own[task], over_majority(own)
    return {
        "expert": expert["id"], "kind": expert["kind"], "task": task, "metric": cell.metric,
        "value": asdict(macro_mean(own)), "constant": cell.constant, "chance": cell.chance,
        "majority": majority_of(own), "by_position": cell.by_position,
        "beats_majority": None if over is None else over.low > 0}
