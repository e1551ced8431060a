"""What a router is given: a task's queries, a library as arrays, and the evidence that they make."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.routing.evidence import Evidence
from elm_jax.routing.fitted import FittedRouter, Threshold
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.priors import Priors


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedTask:
    """One task to route, as arrays.

    Attributes:
        queries: f32[Q, K], unit rows in the task's own order; Q may be 0.
        text: f32[K], the embedded instruction or template text, beside the queries or in their place.
        dataset: of the task; priors leave it out.
        family: kind of the task; priors leave out all data sets of it.
    """

    queries: np.ndarray
    text: np.ndarray | None = None
    dataset: str | None = None
    family: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedLibrary:
    """A library as routers see it: arrays, no experts.

    Attributes:
        index: keys of E experts.
        priors: of the same experts in the same order; None if they are not known.
        copies: i64[E], position of the oldest expert that is equal to each; None if there are no copies.
        datasets: E sets of names, what each expert was trained on; None if that is not known.
        fitted: weights of the router `fitted`; None for those of `by_fit.fit_router` on the library itself.
        threshold: from which similarity on it has an expert for a task, by `none_of_these.fit_threshold`.
        of_means: whether its keys are means of instances, which are not alike to queries.
    """

    index: KeyIndex
    priors: Priors | None = None
    copies: np.ndarray | None = None
    datasets: tuple[frozenset[str], ...] | None = None
    fitted: FittedRouter | None = None
    threshold: Threshold | None = None
    of_means: bool = False

    def __post_init__(self) -> None:
        """Raises InputError if priors, copies or data sets are not of the index's experts."""
        for name, rows in (("priors", self.priors and self.priors.generality), ("copies", self.copies),
                           ("data sets", self.datasets)):
            if rows is not None and len(rows) != len(self.index.experts):
                raise InputError(describe(f"The {name} are not those of the library's experts",
                                          got=len(rows), expected=len(self.index.experts)))

    @property
    def different(self) -> np.ndarray:
        """bool[E], the experts that are no copies of older ones."""
        number = len(self.index.experts)
        return np.ones(number, bool) if self.copies is None else self.copies == np.arange(number)

    def family_of(self, dataset: str | None, family: str | None = None) -> str | None:
        """A task's family: as given, or that of its data set, or None."""
        known = {} if self.priors is None else dict(
            zip(self.priors.datasets, self.priors.families, strict=True))
        return family or known.get(dataset)


class RowScorer(Protocol):
    """Scores experts on rows of the target task: what a workflow passes to routers that need it.

    Rows keep their order, so that rows from `start` to `end` are the same for every expert and call.
    """

    num_rows: int

    def __call__(self, experts: np.ndarray, start: int, end: int) -> np.ndarray:
        """Scores experts i64[n], positions in the library, on the rows from `start` to `end`.

        Returns:
            f64[n, rows], 1 for a right answer (or any score, larger is better); NaN without a label.
        """
        ...


class RowLedger:
    """A scorer that keeps account: on how many rows it scored each expert, and how they did.

    Attributes:
        num_rows: that there are.
        rows: i64[E], that each expert was scored on.
        correct: f64[E], sum over them of their scores.
    """

    def __init__(self, scorer: RowScorer, experts: int) -> None:
        self.scorer, self.num_rows = scorer, scorer.num_rows
        self.rows, self.correct = np.zeros(experts, np.int64), np.zeros(experts)

    def __call__(self, experts: np.ndarray, start: int, end: int) -> np.ndarray:
        """Scores experts as the scorer does; each pair of an expert and a row counts every time."""
        scores = self.scorer(experts, start, end)
        self.rows[experts] += end - start
        self.correct[experts] += scores.sum(axis=1)
        return scores

    def reasons(self, expert: int) -> tuple[int | None, float | None]:
        """Rows that an expert was scored on, and its mean score on them; None where it has none."""
        rows = int(self.rows[expert])
        return (rows, float(self.correct[expert]) / rows) if rows else (None, None)


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """Constants of the routers; each is used by those that name it.

    Attributes:
        num_centroids: means that stand for an expert's keys.
        shortlist: how many most voted experts `shortlist` looks at.
        candidates: how many experts the routers that score experts on rows look at: the best by the router
            that a library has without rows.
        match_weight: of the match beside the prior, see `routers.by_prior.match_share`. It was chosen on a
            published ranking (`benchmarks/router_reference.py`); from 0.2 to 0.5 little changes.
        budget: rows that they score in all, over experts; None for all rows of all candidates.
        none_of_these: whether a decision says if it is sure.
    """

    num_centroids: int = 1
    shortlist: int = 10
    candidates: int = 20
    match_weight: float = 0.3
    budget: int | None = None
    none_of_these: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for a number below one."""
        for name in ("num_centroids", "shortlist", "candidates", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(describe("A router counts from one", where=name, got=value))


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingCase:
    """What a router scores: R groups of queries on E experts.

    Attributes:
        evidence: of the queries.
        text: of the task's text, R = 1; None without one.
        prior: f64[E]; None if not known.
        different: bool[E], the experts that are no copies.
        settings: constants.
        scorer: None for routers that score no expert.
        weights: of the router `fitted`, by feature; None for others.
        known: bool[R], groups whose task the library knows, see `known_tasks`; None where it does not count.
    """

    evidence: Evidence
    text: Evidence | None
    prior: np.ndarray | None
    different: np.ndarray
    settings: RouterSettings
    scorer: RowScorer | None = None
    weights: Mapping[str, float] | None = None
    known: np.ndarray | None = None

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """f64[R, E] of mean 0 and deviation 1 over the experts that are no copies; 0 where all are equal."""
        own = values[:, self.different]
        deviation = own.std(axis=1, keepdims=True)
        return (values - own.mean(axis=1, keepdims=True)) / np.where(deviation > 1e-9, deviation, np.inf)
