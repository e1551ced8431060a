"""All routers of a study in one table: what their picks score, what they leave, and who goes home.

A pick is a share for each expert: a router that decides for each of several queries alone has several. Scores
are macro means over data sets, of the experts that RoE picks from; intervals are over data sets.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.evaluation import intervals
from elm_jax.evaluation.intervals import Estimate
from elm_jax.evaluation.results import ResultsStore
from elm_jax.reporting.cells import Matrix, Row, cell_of, select, stacked
from elm_jax.reporting.study_table import first_half, oracle_row, random_expert_row, split_half_oracle_row
from elm_jax.runtime import records, storage

FILE = "routers.json"
VOTES = "vote"
"""The router that the others are compared with."""


@dataclasses.dataclass(frozen=True)
class RouterPicks:
    """What one router picks.

    Attributes:
        router: its name.
        queries: Q of a task; 0 for a decision without an example.
        picks: by task the shares of the experts; two of them where the second half of the rows has a pick of
            its own, since each was chosen on the other half. Older records have routers that are no more, and
            of some no pick for a generation.
        home: by task the share that goes to an expert of the task's own data set.
        new_home: the same of prompts that no expert saw.
        rows: of a task that its experts were scored on before the pick, at most.
    """

    router: str
    queries: int
    picks: dict[str, list[dict[str, float]]]
    home: dict[str, float]
    new_home: dict[str, float]
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A router that is not compared, and why."""

    router: str
    queries: int
    reason: str


@dataclasses.dataclass(frozen=True)
class RouterRecord:
    """Fields of ``routers.json``: the experts that are picked from, all picks, and how they came about.

    Older ones do not say of which results they are (`results_digest`).
    """

    experts: list[str]
    default: str
    routers: list[RouterPicks]
    left_out: list[LeftOut]
    priors: dict[str, int]
    results: str = ""


def results_digest(store: ResultsStore, experts: Collection[str]) -> str:
    """Hash of the results of some experts, in any order."""
    names = ("expert", "task", "split", "metric", "value", "num_instances")
    facts = sorted([row[name] for name in names] for row in store.rows() if row["expert"] in experts)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def read_picks(folder: storage.PathLike, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads the picks beside a study's results; None if none are kept there.

    Raises:
        InputError: the file is damaged, or is of other experts or tasks than the study's facts.
    """
    path = storage.as_path(folder) / FILE
    if not path.exists():
        return None
    found = records.read_record(path, RouterRecord, kind="record of routers")
    experts, tasks = set(found["experts"]), {*facts["unseen_tasks"], *facts["seen_tasks"]}
    for one in found["routers"]:
        named = {expert for parts in one["picks"].values() for shares in parts for expert in shares}
        if not (named <= experts == set(facts["library"]) and tasks == one["picks"].keys()):
            raise InputError(describe("The picks of routers are not those of the study's facts",
                                      where=f"{path}: {one['router']}", cure="run the study again"))
    return found


def router_comparison(facts: Mapping[str, Any], matrix: Matrix, record: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the table of routers as JSON-ready data.

    Returns:
        ``routers``: rows ``{router, queries, rows, unseen, difference (to votes by all queries), regret (the
        split-half oracle's score minus this), gap_closed (of the gap between a random expert and the
        split-half oracle, None where there is none beyond its interval), seen, home, home_by_votes (of the
        same tasks, by as many queries, or by all where this takes none), new_home}``, estimates as
        dictionaries whose ends are None where there is no interval; ``references``: the same of the oracles
        and of a random expert, with a ``name``; ``default``, ``num_datasets``, ``left_out`` and ``priors``.

    Raises:
        InputError: a cell of the matrix is missing; it is named.
    """
    experts, unseen, seen = record["experts"], facts["unseen_tasks"], facts["seen_tasks"]
    unseen, seen = (_ranked(matrix, experts[0], tasks) for tasks in (unseen, seen))
    scale = _Scale(*(dataset_values(make(matrix, experts, unseen))
                     for make in (random_expert_row, split_half_oracle_row)))
    votes = {one["queries"]: one for one in record["routers"] if one["router"] == VOTES}
    most = votes[max(votes)] if votes else None
    by_votes = None if most is None else dataset_values(picked_row(matrix, most["picks"], unseen))
    routers = []
    for one in record["routers"]:
        values = dataset_values(picked_row(matrix, one["picks"], unseen))
        alike = votes.get(one["queries"], most)
        routers.append({
            "router": one["router"], "queries": one["queries"], "rows": one.get("rows", 0),
            **scale.of(values),
            "difference": None if most is None or one is most else _plain(
                intervals.over_datasets(values - by_votes)),
            "seen": _mean(picked_row(matrix, one["picks"], seen)),
            "home": _share(one["home"]), "new_home": _share(one["new_home"]),
            "home_by_votes": None if alike is None else _share(
                {task: alike["home"][task] for task in one["home"]})})
    references = [{"name": name, **scale.of(dataset_values(make(matrix, experts, unseen))),
                   "seen": _mean(make(matrix, experts, seen))}
                  for name, make in (("oracle", oracle_row), ("split-half oracle", split_half_oracle_row),
                                     ("random expert", random_expert_row))]
    return {"routers": routers, "references": references, "default": record["default"],
            "num_datasets": len(scale.random), "left_out": record["left_out"], "priors": record["priors"]}


@dataclasses.dataclass(frozen=True, eq=False)
class _Scale:
    """Scores f64[D] of a random expert and of the split-half oracle, between which routers stand."""

    random: np.ndarray
    oracle: np.ndarray

    def of(self, values: np.ndarray) -> dict[str, Any]:
        """What a table says of scores f64[D]: their mean, regret and share of the gap."""
        gap = intervals.share_over_datasets(values - self.random, self.oracle - self.random)
        return {"unseen": _plain(intervals.over_datasets(values)),
                "regret": _plain(intervals.over_datasets(self.oracle - values)),
                "gap_closed": None if gap is None else _plain(gap)}


def picked_row(matrix: Matrix, picks: Mapping[str, Sequence[Mapping[str, float]]], tasks: Sequence[str]
               ) -> Row:
    """Expected values of the picked experts, instance by instance.

    Raises:
        InputError: a cell of the matrix is missing, or the picks of a task are.
    """
    row = {}
    for task in tasks:
        parts = []
        for shares in picks[task]:
            cell, values = stacked(matrix, list(shares), task)
            parts.append(np.asarray(list(shares.values())) @ values)
        if not parts:
            raise InputError(describe("A router has no pick for a task", where=task,
                                      cure="run the study again"))
        first = first_half(len(parts[0]))
        row[task] = dataclasses.replace(cell, values=np.where(first, parts[0], parts[-1]), constant=False)
    return row


def dataset_values(row: Row) -> np.ndarray:
    """Means f64[D] of data sets, each over its prompts of their means over instances."""
    found: dict[str, list[float]] = {}
    for cell in row.values():
        found.setdefault(cell.dataset, []).append(float(cell.values.mean()))
    return np.array([np.mean(means) for means in found.values()])


def _ranked(matrix: Matrix, expert: str, tasks: Sequence[str]) -> list[str]:
    row = {task: cell_of(matrix, expert, task) for task in tasks}
    return list(select(row, tasks, "accuracy"))


def _mean(row: Row) -> float | None:
    return float(dataset_values(row).mean()) if row else None


def _share(home: Mapping[str, float]) -> float | None:
    return sum(home.values()) / len(home) if home else None


def _plain(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON has it: None for ends that are not known."""
    return {name: None if math.isnan(value) else value for name, value in vars(estimate).items()}
