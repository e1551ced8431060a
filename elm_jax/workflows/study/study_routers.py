"""Picks of all routers on a study's tasks, from its library and its results: nothing is trained or scored.

A study has every expert scored on every task, so priors come from its own results, without the target's data
set and family.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry.task_kin import kin_of
from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.routed_library import own_datasets
from elm_jax.reporting.groups import BENCHMARKS, METRICS
from elm_jax.reporting.router_comparison import FILE, results_digest
from elm_jax.reporting.study_table import halves
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings
from elm_jax.routing.router import ROUTERS, decide_rows, decide_task, default_router
from elm_jax.routing.routers.by_fit import why_no_fit
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import storage
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.calibrate.score_table import read_table
from elm_jax.workflows.route import draw_instances, embedded
from elm_jax.workflows.study.kept_rows import KeptRows
from elm_jax.workflows.target_task import template_text
from elm_jax.workflows.train.run_record import MadeOf

logger = logging.getLogger(__name__)
Shares = dict[str, float]
"""From an expert to the share of a task's decisions that pick it."""


@dataclasses.dataclass(frozen=True, eq=False)
class ComparedTasks:
    """Tasks on which a study's routers are compared.

    Attributes:
        seen: each has an expert of its own.
        unseen: of data sets that no expert has seen.
        heldout: prompts of seen data sets that no expert has seen.
        scored: all tasks that every expert is scored on; priors come from them.
        instances: gives the queries of a task, at most `num_queries`.
        num_queries: Q.
    """

    seen: Sequence[str]
    unseen: Sequence[str]
    heldout: Sequence[str]
    scored: Sequence[str]
    instances: Callable[[str], Sequence[RoutingInstance]]
    num_queries: int


def compared_tasks(settings: Mapping[str, Any], data: TaskData) -> ComparedTasks:
    """The tasks of a study on which its routers are compared, with the queries that it routes by.

    Args:
        settings: of the study, as ``study.json`` has them under ``config``.
        data: its prepared arrays.
    """
    def instances(task: str) -> Sequence[RoutingInstance]:
        rows = data.split(task, data.evaluation_split(task), settings["max_eval_rows"])
        return draw_instances(rows, settings["num_queries"], settings["random_seed"])

    seen, unseen = settings["prompt_tasks"], settings["unseen_tasks"]
    others = (settings.get(name, ()) for name in ("generative_tasks", *BENCHMARKS.values()))
    return ComparedTasks(seen, unseen, settings["heldout_prompts"],
                         [*seen, *unseen, *itertools.chain(*others)], instances, settings["num_queries"])


def compare_once(made_of: MadeOf, library: ExpertLibrary, store: ResultsStore, tasks: ComparedTasks) -> None:
    """Writes ``routers.json`` beside a study's results, unless it is there and was made of the same."""
    path = store.folder / FILE
    scored = [[row[name] for name in ("expert", "task", "metric", "value", "num_instances")]
              for row in store.rows() if row["expert"] in library]
    known = {"routing": made_of.known["routing"], "heldout": tasks.heldout, "results": scored,
             "routers": list(ROUTERS), "settings": dataclasses.asdict(RouterSettings())}
    if not (made_of.fits("routers", known) and path.exists()):
        storage.write_json(path, compare_routers(library, store, tasks))
        made_of.record("routers", known)


def compare_routers(library: ExpertLibrary, store: ResultsStore, tasks: ComparedTasks) -> dict[str, Any]:
    """Lets every router pick an expert for every task, with all queries, with one, and with none.

    Returns:
        The fields of ``routers.json``, see `reporting.router_comparison.RouterRecord`.

    Raises:
        InputError: an expert of the library was not scored on a task; it is named.
    """
    names = library.index.experts
    homes = {name: kin_of(library[name].card.tasks[0]).dataset for name in names}
    table = read_table(library, store, tasks.scored)
    routed = RoutedLibrary(library.index, table.priors(), table.copies,
                           tuple(own_datasets(library[name].card) for name in names))
    cases: dict[str, RoutedTask] = {}
    every = list(dict.fromkeys((*tasks.seen, *tasks.unseen, *tasks.heldout)))
    with StageLine("comparing routers", len(every), "task") as line:
        for task in every:
            cases[task] = _routed_task(library, tasks.instances(task), task)
            line.step()
    kept = _Kept(store, names, tasks.num_queries)
    routers, left_out = [], []
    for name, count in _rows(tasks.num_queries):
        reason = _why_not(name, count, cases, kept, tasks) or _why_no_weights(name, cases, routed)
        if reason is not None:
            left_out.append({"router": name, "queries": count, "reason": reason})
            continue
        rows = ROUTERS[name].needs_rows
        picks = {task: kept.picks(task, cases[task], routed, name) if rows else
                 _picks(cases[task], routed, name, count) for task in every
                 if not rows or task not in tasks.heldout}
        home = {task: _share_home(parts, kin_of(task).dataset, homes) for task, parts in picks.items()}
        routers.append({
            "router": name, "queries": count, "rows": tasks.num_queries if rows else 0,
            "picks": {task: picks[task] for task in (*tasks.seen, *tasks.unseen)},
            "home": {task: home[task] for task in tasks.seen},
            "new_home": {task: home[task] for task in tasks.heldout if task in home}})
    return {"schema_version": 1, "experts": list(names), "default": default_router(routed),
            "routers": routers, "left_out": left_out, "results": results_digest(store, names),
            "priors": {"tasks": len(table.tasks), "datasets": len(routed.priors.datasets),
                       "families": len(set(routed.priors.families))}}


def known_text(task: str) -> RoutingInstance | None:
    """A task's `template_text`; None, with a warning, where there is none: prepared arrays do without."""
    try:
        return template_text(task)
    except InputError as error:
        logger.warning("routers are compared without a text of %s: %s", task, error)
        return None


def _routed_task(library: ExpertLibrary, instances: Sequence[RoutingInstance], task: str) -> RoutedTask:
    """Embeds a task's queries and its template, once for all routers."""
    template = known_text(task)
    vectors = embedded(library, [*instances, *([template] if template else ())])
    return RoutedTask(vectors[:len(instances)], vectors[-1] if template else None, *kin_of(task))


def _rows(num_queries: int) -> Iterator[tuple[str, int]]:
    """Rows of the comparison: every router with all queries, with one, and with none, if that matters."""
    for name, row in ROUTERS.items():
        asks_nothing = not row.needs_queries and not row.takes_text
        counts = (num_queries,) if row.needs_rows else (0,) if asks_nothing else (num_queries, 1, 0)
        for count in dict.fromkeys(counts):
            if count or row.takes_text or asks_nothing:
                yield name, count


def _why_not(name: str, count: int, cases: Mapping[str, RoutedTask], kept: "_Kept", tasks: ComparedTasks
             ) -> str | None:
    """Why a router cannot be compared; None if it can."""
    row = ROUTERS[name]
    single = [task for task in (*tasks.seen, *tasks.unseen) if kept.count(task) < 2]
    if row.needs_rows and single:
        return f"it scores experts on other rows than those of its own score, and {single[0]} has one"
    silent = [task for task, case in cases.items() if case.text is None]
    if not count and silent and row.needs_queries:
        return f"without an example it needs the text of a template, and {silent[0]} has none"
    return None


def _why_no_weights(name: str, cases: Mapping[str, RoutedTask], library: RoutedLibrary) -> str | None:
    """Why a router that is fitted on the library has no weights for one of the tasks; None if it has."""
    if not ROUTERS[name].needs_fit:
        return None
    kinds = dict.fromkeys((case.dataset, case.family) for case in cases.values())
    return next(filter(None, (why_no_fit(library, *kin) for kin in kinds)), None)


class _Kept:
    """Picks of routers that score experts on rows, from the predictions that a study keeps."""

    def __init__(self, store: ResultsStore, experts: Sequence[str], rows: int) -> None:
        """Takes the results, the library's ids, and how many rows a router is given."""
        self.experts, self.rows, self._store = experts, rows, store
        self._results = {row["task"]: row for row in store.rows()
                         if row["metric"] in METRICS and row["expert"] == experts[0]}

    def count(self, task: str) -> int:
        """Rows of a task that were scored."""
        return self._results[task]["num_instances"]

    def picks(self, task: str, case: RoutedTask, library: RoutedLibrary, name: str) -> list[Shares]:
        """The picks for the two halves of a task's rows, each chosen on rows of the other half."""
        split = self._results[task]["split"]
        predictions = functools.cache(lambda expert: self._store.predictions(expert, task, split))
        return [{decide_task(case, library, name, scorer=KeptRows(predictions, self.experts, rows[:self.rows])
                             ).ranking[0].expert: 1.0} for rows in reversed(halves(self.count(task)))]


def _picks(case: RoutedTask, library: RoutedLibrary, name: str, count: int) -> list[Shares]:
    """Shares of the experts that a router picks; with one query those over all queries alone."""
    experts = library.index.experts
    if count == 1:
        picked = decide_rows(case, library, name)
        numbers, times = np.unique(picked, return_counts=True)
        return [{experts[e]: float(one / len(picked)) for e, one in zip(numbers, times, strict=True)}]
    if not count:
        case = dataclasses.replace(case, queries=case.queries[:0])
    return [{decide_task(case, library, name).ranking[0].expert: 1.0}]


def _share_home(parts: Sequence[Shares], dataset: str, own: Mapping[str, str]) -> float:
    """Share of a task's decisions that pick an expert of its data set."""
    return sum(share for part in parts for expert, share in part.items() if own[expert] == dataset
               ) / len(parts)
