"""Routers: from a task's queries and a library as arrays to scores of its experts, and a decision.

`ROUTERS` is the table of them. A new router is one file in ``routers/`` and one row here. A decision for a
task pools the evidence of its queries; a decision for each row scores each query alone; a stream adds
evidence as inputs come. Copies count once: an expert and its copies have one score, and copies stand last.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings, RoutingCase, RowLedger, RowScorer
from elm_jax.routing.evidence import Evidence, no_evidence, observe
from elm_jax.routing.known_tasks import are_known
from elm_jax.routing.ranking import firsts, ranking
from elm_jax.routing.routers.by_centroid import centroid_scores
from elm_jax.routing.routers.by_fit import fit_of, fitted_scores
from elm_jax.routing.routers.by_labels import labelled_scores
from elm_jax.routing.routers.by_prior import (
    prior_and_centroid_scores,
    prior_and_nearest_scores,
    prior_scores,
)
from elm_jax.routing.routers.by_shortlist import shortlist_scores
from elm_jax.routing.routers.by_votes import vote_scores
from elm_jax.routing.vote import ExpertVotes, RoutingDecision, checked_queries


@dataclasses.dataclass(frozen=True)
class Router:
    """One row of the table of routers.

    Attributes:
        score: gives f64[R, E] for R groups of queries; -inf for experts that it does not score.
        about: what it ranks by, in a few words.
        needs_queries: whether it cannot decide without queries, or a text where it takes one.
        takes_text: whether the task's text counts.
        needs_priors: whether the library must have priors.
        uses_centroids: whether it compares queries with means of keys.
        needs_fit: whether weights are fitted on the library, for which its experts' data sets are known.
        knows_tasks: whether it leaves tasks that the library knows to votes.
        needs_rows: whether it scores experts on labelled rows of the task.
    """

    score: Callable[[RoutingCase], np.ndarray]
    about: str
    needs_queries: bool = True
    takes_text: bool = False
    needs_priors: bool = False
    uses_centroids: bool = False
    needs_fit: bool = False
    knows_tasks: bool = False
    needs_rows: bool = False


ROUTERS: dict[str, Router] = {
    "vote": Router(vote_scores, "votes of the queries for their nearest keys' experts"),
    "centroid": Router(centroid_scores, "similarity of the queries with the mean of each expert's keys",
                       takes_text=True, uses_centroids=True),
    "prior": Router(prior_scores, "how well each expert does on other data sets",
                    needs_queries=False, needs_priors=True),
    "prior+nearest": Router(prior_and_nearest_scores, "prior, less for experts whose keys are far",
                            needs_queries=False, takes_text=True, needs_priors=True, knows_tasks=True),
    "prior+centroid": Router(prior_and_centroid_scores, "prior, less for experts whose keys' mean is far",
                             needs_queries=False, takes_text=True, needs_priors=True, uses_centroids=True,
                             knows_tasks=True),
    "shortlist": Router(shortlist_scores, "the most voted experts, ranked by their priors",
                        needs_priors=True),
    "fitted": Router(fitted_scores, "prior and match, weighed as the library's own tasks tell",
                     needs_queries=False, takes_text=True, needs_priors=True, uses_centroids=True,
                     needs_fit=True, knows_tasks=True),
    "labelled": Router(labelled_scores, "the likely experts, scored on labelled rows by successive halving",
                       needs_queries=False, takes_text=True, needs_rows=True, knows_tasks=True),
}
"""Routers by name."""


def default_router(library: RoutedLibrary) -> str:
    """Name of the router of a library: with priors if it has them, else by votes."""
    return "vote" if library.priors is None else "prior+nearest"


def check_router(name: str, library: RoutedLibrary, *, queries: bool, text: bool) -> None:
    """Raises InputError if there is no such router, or it needs what is not there.

    Args:
        name: of the router.
        library: that it has to rank.
        queries: whether the task has some.
        text: whether it has a text.
    """
    row = _row_of(name)
    if row.needs_queries and not queries and not (row.takes_text and text):
        able = [other for other, one in ROUTERS.items()
                if not (one.needs_queries and not (one.takes_text and text)) and not one.needs_rows
                and not (one.needs_priors and library.priors is None)]
        kinds = "queries or a text of the task" if row.takes_text else "queries"
        others = f", or take --router {', '.join(able)}" if able else ""
        raise InputError(describe(f"The router {name} needs {kinds}", got="no instance of the task",
                                  cure=f"give some{others}"))
    if row.needs_priors and library.priors is None:
        raise InputError(describe(f"The router {name} needs priors, and the library has none",
                                  cure="run `elm library calibrate`, or take --router vote or centroid"))


def counts_text(name: str, library: RoutedLibrary, *, queries: bool) -> bool:
    """Whether a task's text changes what a router decides; beside queries it does so with priors alone."""
    row = ROUTERS[name]
    beside = library.priors is not None and (row.needs_priors or row.needs_rows)
    return row.takes_text and (beside or not queries)


@dataclasses.dataclass(frozen=True, eq=False)
class RowDecisions:
    """Decisions for Q queries, each alone.

    Attributes:
        experts: i64[Q], positions of the first experts.
        next_experts: i64[Q], of those that would be first without them; None if there is no other.
        similarities: f64[Q, E] of each query with the nearest key of every expert.
        are_sure: bool[Q], whether the library has an expert for each (`are_sure`); None where that was not
            asked.
    """

    experts: np.ndarray
    next_experts: np.ndarray | None
    similarities: np.ndarray
    are_sure: np.ndarray | None = None


def decide_task(task: RoutedTask, library: RoutedLibrary, router: str | None = None, *,
                settings: RouterSettings | None = None, scorer: RowScorer | None = None,
                backend: str = "numpy") -> RoutingDecision:
    """Ranks all experts of a library for one task.

    Ties go to the expert that votes rank first, then to the oldest.

    Args:
        task: its queries, its text, both, or (for a router by priors alone) neither.
        library: as arrays.
        router: one of `ROUTERS`; by default that of the library.
        settings: constants of the routers.
        scorer: scores experts on rows, for routers that need it.
        backend: ``numpy`` or ``jax``; both decide the same.

    Raises:
        InputError: no such router; it needs queries, priors or rows that are not there; or the queries are
            not unit rows of K.
    """
    evidence = task_evidence(task, library, router, settings, backend)
    return decide_evidence(evidence.pooled(), task, library, router, settings=settings, scorer=scorer)


def explain_rows(task: RoutedTask, library: RoutedLibrary, router: str | None = None, *,
                 settings: RouterSettings | None = None, backend: str = "numpy") -> RowDecisions:
    """Decides for each query alone, and says how near all experts are. Arguments, errors: `decide_task`."""
    evidence = task_evidence(task, library, router, settings, backend)
    case = _case(evidence, task, library, router, settings, None)
    scores = _scores(case, library, router)
    first = firsts(scores, evidence, case.different)
    others = case.different & (np.arange(scores.shape[1]) != first[:, None])
    following = firsts(scores, evidence, others) if others.any(axis=1).all() else None
    sure = are_sure(evidence, library) if settings is not None and settings.none_of_these else None
    return RowDecisions(first, following, evidence.nearest, sure)


def decide_rows(task: RoutedTask, library: RoutedLibrary, router: str | None = None, *,
                settings: RouterSettings | None = None, backend: str = "numpy") -> np.ndarray:
    """Picks an expert for each query alone; returns positions i64[Q]. Arguments and errors: `decide_task`."""
    return explain_rows(task, library, router, settings=settings, backend=backend).experts


def decide_evidence(evidence: Evidence, task: RoutedTask, library: RoutedLibrary, router: str | None = None,
                    *, settings: RouterSettings | None = None, scorer: RowScorer | None = None
                    ) -> RoutingDecision:
    """Ranks all experts by evidence of one group that was gathered before, as `decide_task` does."""
    name, settings = router or default_router(library), settings or RouterSettings()
    ledger = None if scorer is None else RowLedger(scorer, len(library.index.experts))
    case = _case(evidence, task, library, name, settings, ledger)
    scores = _scores(case, library, name)[0]
    experts, votes = library.index.experts, evidence.votes[0]
    # What is told of similarities at Q = 0 is the text's.
    seen = case.text if case.text is not None and not evidence.num_queries.any() else evidence
    best = np.where(np.isfinite(seen.best[0]), seen.best[0], 0.0)
    nearest, centroid = seen.mean_nearest[0], seen.mean_centroid[0]
    copies, order = library.copies, ranking(scores, evidence, case.different)
    lines = tuple(
        ExpertVotes(
            experts[e], int(votes[e]), float(best[e]), float(nearest[e]),
            _known(scores[e]), _known(centroid[e]),
            None if case.prior is None else float(case.prior[e]),
            None if case.different[e] or copies is None else experts[copies[e]],
            *((None, None) if ledger is None else ledger.reasons(e)))
        for e in order)
    is_sure = bool(are_sure(evidence, library)[0]) if settings.none_of_these else None
    return RoutingDecision(lines, int(evidence.num_queries[0]), library.index.text_format,
                           library.index.encoder, name, is_sure,
                           None if case.known is None else bool(case.known[0]))


def are_sure(evidence: Evidence, library: RoutedLibrary) -> np.ndarray:
    """Says for each of R groups of queries whether the library has an expert for it, bool[R], or none fits.

    It has one if the queries are as near to an expert's keys as those of tasks that the library has.

    Raises:
        InputError: a group has no queries, or the library has no threshold.
    """
    if not evidence.num_queries.all():
        raise InputError(describe("Whether none of the experts fits is told by queries",
                                  got="no instance of the task", cure="give some, or do not ask for it"))
    if library.threshold is None:
        raise InputError(describe("The library has no threshold that tells when none of its experts fits",
                                  cure="fit it (`none_of_these.fit_threshold`), or do not ask for it"))
    values = np.array([library.threshold.at(int(count)) for count in evidence.num_queries])
    return evidence.mean_nearest.max(axis=1) >= values


def task_evidence(task: RoutedTask, library: RoutedLibrary, router: str | None = None,
                  settings: RouterSettings | None = None, backend: str = "numpy") -> Evidence:
    """Evidence of a task's queries for a router, a group each; one without queries where it has none."""
    if not len(task.queries):
        return no_evidence(len(library.index.experts))
    queries = checked_queries(task.queries, library.index, backend)
    row, settings = _row_of(router or default_router(library)), settings or RouterSettings()
    return observe(queries, library.index, library.copies, backend=backend,
                   num_centroids=settings.num_centroids if row.uses_centroids else 0)


class RouterStream:
    """Decisions that sharpen as a task's inputs come.

    After any number of updates the decision is that of `decide_task` for all queries at once.

    Attributes:
        evidence: of all queries so far, as one group; None before the first.
    """

    def __init__(self, library: RoutedLibrary, router: str | None = None, *, text: np.ndarray | None = None,
                 dataset: str | None = None, family: str | None = None,
                 settings: RouterSettings | None = None) -> None:
        self.library, self.router = library, router or default_router(library)
        self.settings = settings or RouterSettings()
        self.task = RoutedTask(np.zeros((0, library.index.keys.shape[1]), np.float32), text, dataset, family)
        self.evidence: Evidence | None = None

    def update(self, queries: np.ndarray) -> RoutingDecision:
        """Adds queries f32[n, K] and returns the decision by all so far; errors as `decide_task`."""
        task = dataclasses.replace(self.task, queries=np.asarray(queries, np.float32))
        new = task_evidence(task, self.library, self.router, self.settings).pooled()
        self.evidence = new if self.evidence is None else self.evidence.joined(new).pooled()
        return decide_evidence(self.evidence, task, self.library, self.router, settings=self.settings)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _case(evidence: Evidence, task: RoutedTask, library: RoutedLibrary, router: str | None,
          settings: RouterSettings | None, scorer: RowScorer | None) -> RoutingCase:
    """What the router is given; raises InputError if it needs something that is not there."""
    name = router or default_router(library)
    row = _row_of(name)
    check_router(name, library, queries=bool(evidence.num_queries.any()), text=task.text is not None)
    if row.needs_rows and (scorer is None or not scorer.num_rows):
        raise InputError(describe(f"The router {name} scores experts on labelled rows", got="no such rows",
                                  cure="give them: --labelled rows.jsonl"))
    settings = settings or RouterSettings()
    text = None if task.text is None else task_evidence(
        RoutedTask(np.asarray(task.text)[None]), library, name, settings)
    prior = None if library.priors is None else library.priors.for_task(task.dataset, task.family)
    weights = None if not row.needs_fit else fit_of(library).by_feature(
        library.family_of(task.dataset, task.family))
    counts = row.knows_tasks and prior is not None and not library.of_means  # means are not alike to queries
    known = are_known(evidence, library.index) if counts else None
    return RoutingCase(evidence, text, prior, library.different, settings, scorer, weights, known)


def _row_of(router: str) -> Router:
    if router not in ROUTERS:
        raise unknown_name("router", router, ROUTERS)
    return ROUTERS[router]


def _scores(case: RoutingCase, library: RoutedLibrary, router: str | None) -> np.ndarray:
    return np.asarray(ROUTERS[router or default_router(library)].score(case), np.float64)
