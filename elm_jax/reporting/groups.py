"""Groups of tasks in a study's table: seen tasks by category and by data set, benchmarks by data set.

A group is ``{label, category, metric, num_datasets, values (row -> Estimate dict), constant (row -> whether
its answers are constant on each task), chance, majority}``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from elm_jax.reporting.cells import Row, always_constant, chance_of, macro_mean, majority_of, select

METRICS = ("accuracy", "rouge_l")
BENCHMARKS = {"BIG-bench": "bigbench_tasks", "BBH": "bbh_tasks"}
"""From a benchmark's name in the report to its tasks in the study's facts."""
NO_CATEGORY = "no category"

Group = dict[str, Any]


def by_category(facts: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Group]:
    """Groups seen tasks by category, accuracy before ROUGE-L; none if no task has a category."""
    tasks = _sorted_by(facts["seen_tasks"], facts.get("categories", {}))
    if not any(facts.get("categories", {}).values()):
        return []
    return [group for metric in METRICS for name, members in tasks.items()
            for group in _groups(rows, members, name, name, [metric])]


def by_dataset(facts: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Group]:
    """Groups seen tasks by data set, in the order of categories; none if the study kept no categories."""
    if "categories" not in facts:
        return []
    return [group for category, tasks in _sorted_by(facts["seen_tasks"], facts["categories"]).items()
            for name, members in _datasets(rows, tasks).items()
            for group in _groups(rows, members, name, category)]


def benchmarks(facts: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Group]:
    """Groups tasks of BIG-bench and BBH; each task is a data set, its benchmark the category."""
    return [group for benchmark, key in BENCHMARKS.items()
            for name, members in _datasets(rows, facts.get(key, ())).items()
            for group in _groups(rows, members, name, benchmark)]


def _sorted_by(tasks: Sequence[str], categories: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Category -> its tasks, in the order of first mention."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(categories.get(task) or NO_CATEGORY, []).append(task)
    return found


def _datasets(rows: Mapping[str, Row], tasks: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(rows["base"][task].dataset, []).append(task)
    return found


def _groups(rows: Mapping[str, Row], tasks: Sequence[str], label: str, category: str,
            metrics: Sequence[str] = METRICS) -> list[Group]:
    """One group of the tasks for each metric that they have."""
    found = []
    for metric in metrics:
        base = select(rows["base"], tasks, metric)
        if base:
            ranked = metric == "accuracy"
            found.append({
                "label": label, "category": category, "metric": metric,
                "num_datasets": len({cell.dataset for cell in base.values()}),
                "values": {name: asdict(macro_mean(select(row, tasks, metric)))
                           for name, row in rows.items()},
                "constant": {name: always_constant(select(row, tasks, metric)) for name, row in rows.items()},
                "chance": chance_of(base) if ranked else None,
                "majority": majority_of(base) if ranked else None})
    return found
