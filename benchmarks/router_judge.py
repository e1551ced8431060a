"""elm_jax's routers on the reference's ranking: which expert each picks, and what accuracy that has.

The library holds the experts of whose tasks there are rows; a router sees its keys, priors without the data
sets that are left out, and queries of the unseen task.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from router_table import FAMILIES, LEFT_OUT, T5_LM, Table, dataset_of
from router_vectors import FORMAT, TaskVectors

from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings, RoutingCase, RowScorer
from elm_jax.routing.evidence import Evidence
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.known_tasks import are_known
from elm_jax.routing.priors import Priors
from elm_jax.routing.ranking import firsts
from elm_jax.routing.router import ROUTERS, task_evidence
from elm_jax.routing.routers.by_fit import fit_router, spread

DATASETS = tuple(T5_LM)
DRAWS = {0: 1, 1: 16, 4: 8, 16: 4, 32: 2}
"""How many draws of Q rows of a task are averaged."""
EVERYTHING = "prior+centroid"
"""A router for which evidence has all that any router takes."""
FITTED_ON = 4
"""Prompts of a data set on which the router `fitted` is fitted."""
ROWS = 64
"""Rows of a task of which queries are drawn."""
Accuracies = dict[str, float]


def left_out(way: str, *targets: str) -> frozenset[str]:
    """The data sets that priors may not see if these are judged."""
    return frozenset(other for other in DATASETS for own in targets if LEFT_OUT[way](own, other))


def library_index(table: Table, vectors: TaskVectors, num_keys: int) -> KeyIndex:
    """An index of all experts of whose tasks there are rows."""
    index = KeyIndex.empty(vectors.encoder, FORMAT, num_keys)
    for name in table.experts:
        keys = vectors.rows(name, "train", num_keys)
        if keys is not None:
            index = index.add(name, keys)
    return index


def template_index(table: Table, vectors: TaskVectors) -> KeyIndex:
    """An index of all experts, of each of which the text of its template is the one key."""
    index = KeyIndex.empty(vectors.encoder, FORMAT, 1)
    for name, key in zip(table.experts, vectors.templates(table.experts), strict=True):
        index = index.add(name, key[None])
    return index


def first_keys(index: KeyIndex, count: int) -> KeyIndex:
    """An index with the first `count` keys of each expert."""
    places = np.concatenate([index.places_of(expert)[:count]
                             for expert in range(len(index.experts))])
    return dataclasses.replace(index, keys=index.keys[places], owners=index.owners[places])


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """R groups of queries of one data set's prompts.

    Attributes:
        evidence: of the queries.
        text: of each group's prompt's template.
        rows: i64[R], of the table, of each group's prompt.
    """

    evidence: Evidence
    text: Evidence | None
    rows: np.ndarray

    def one(self, group: int) -> "Groups":
        """One of the groups alone."""
        evidence, text = (part and Evidence(*(getattr(part, field.name)[group:group + 1]
                                              for field in dataclasses.fields(part)))
                          for part in (self.evidence, self.text))
        return Groups(evidence, text, self.rows[group:group + 1])


class SimulatedRows:
    """Scores experts on rows that were never seen: each row is right by chance, with an expert's accuracy.

    Attributes:
        num_rows: how many there are.
    """

    def __init__(self, chances: np.ndarray, num_rows: int, seed: int) -> None:
        """Draws which rows are right, from chances f64[E]."""
        self.num_rows = num_rows
        self.right = np.random.default_rng(seed).random((len(chances), num_rows)) < chances[:, None]

    def __call__(self, experts: np.ndarray, start: int, end: int) -> np.ndarray:
        """What experts i64[n] did on the rows from `start` to `end`."""
        return self.right[experts, start:end].astype(np.float64)


class Judge:
    """Accuracies of elm_jax's routers on one library.

    Attributes:
        table: estimated scores.
        library: keys of the experts, and which of them are copies; priors depend on what is judged.
        posed: i64[E], the library's experts in the table.
        queries: by prompt f32[n, K], None if there are no rows of it.
    """

    def __init__(self, table: Table, vectors: TaskVectors, index: KeyIndex) -> None:
        """Takes a table, vectors of its tasks, and an index of some of its experts."""
        self.table = table
        self.posed = np.array([table.experts.index(name) for name in index.experts])
        oldest: dict[int, int] = {}
        copies = np.array([oldest.setdefault(int(first), place)
                           for place, first in enumerate(table.copies[self.posed])])
        self.library = RoutedLibrary(index, None, copies)
        self.queries = {name: vectors.rows(name, "validation", ROWS) for name in table.prompts}
        self.texts = dict(zip(table.prompts, vectors.templates(table.prompts), strict=True))
        self.generality = np.stack([table.generality(name)[self.posed] for name in DATASETS], axis=1)
        self._forget()

    def with_index(self, index: KeyIndex) -> "Judge":
        """The same with other keys of the same experts."""
        other = copy.copy(self)
        other.library = dataclasses.replace(self.library, index=index)
        other._forget()
        return other

    def without_texts(self) -> "Judge":
        """The same for tasks of which only queries are known."""
        other = copy.copy(self)
        other._forget()
        with_texts = self.groups
        other.groups = lambda *facts: dataclasses.replace(with_texts(*facts), text=None)
        return other

    def _forget(self) -> None:
        self.groups, self.accuracy = functools.cache(self._groups), functools.cache(self._accuracy)
        self.weights = functools.cache(self._weights)

    def has_rows(self, dataset: str) -> bool:
        """Whether there are rows of an unseen data set."""
        return all(self.queries[self.table.prompts[row]] is not None for row in self.table.rows_of(dataset))

    def judged(self, router: str, num_queries: int) -> list[str]:
        """The data sets on which a router can be judged: those with rows, if it cannot do without."""
        row = ROUTERS[router]
        every = row.takes_text or not row.needs_queries
        return [name for name in DATASETS if every or (num_queries and self.has_rows(name))]

    def fixed(self, router: str, settings: RouterSettings, num_queries: int, way: str) -> Accuracies:
        """Accuracies by data set of a router with given constants."""
        return {name: self.accuracy(router, settings, name, num_queries, _unseen(router, way, name))
                for name in self.judged(router, num_queries)}

    def chosen(self, router: str, grid: Sequence[RouterSettings], num_queries: int, way: str) -> Accuracies:
        """Accuracies by data set of a router whose constants are chosen by the others.

        For each target: those of `grid` with the largest mean accuracy on the data sets that are not left out
        with it, each judged by priors that see neither it nor the target, nor what is left out with them.
        """
        judged, found = self.judged(router, num_queries), {}
        for target in judged:
            def of_others(settings: RouterSettings, target: str = target) -> float:
                return float(np.mean([
                    self.accuracy(router, settings, name, num_queries, _unseen(router, way, target, name))
                    for name in judged if name not in left_out(way, target)]))

            best = max(grid, key=of_others)
            found[target] = self.accuracy(router, best, target, num_queries, _unseen(router, way, target))
        return found

    def priors(self, unseen: frozenset[str]) -> Priors:
        """Priors that see no data set of `unseen`."""
        seen = [place for place, name in enumerate(DATASETS) if name not in unseen]
        names = tuple(DATASETS[place] for place in seen)
        return Priors(self.generality[:, seen], names, tuple(FAMILIES[name] for name in names))

    def case(self, groups: Groups, unseen: frozenset[str], settings: RouterSettings,
             scorer: RowScorer | None = None) -> RoutingCase:
        """What a router is given; its prior sees no data set of `unseen`."""
        prior = self.priors(unseen).for_task()
        known = are_known(groups.evidence, self.library.index)
        return RoutingCase(groups.evidence, groups.text, prior, self.library.different, settings, scorer,
                           known=known)

    def _groups(self, dataset: str, num_queries: int, num_centroids: int) -> Groups:
        """Draws of Q queries of a data set's prompts, as evidence of R groups."""
        evidence, texts, rows, settings = [], [], [], RouterSettings(num_centroids=num_centroids)
        for row in self.table.rows_of(dataset):
            name = self.table.prompts[row]
            text = task_evidence(RoutedTask(self.texts[name][None]), self.library, EVERYTHING, settings)
            for draw in range(1 if self.queries[name] is None else DRAWS[num_queries]):
                task = RoutedTask(self._drawn(name, num_queries, draw))
                evidence.append(task_evidence(task, self.library, EVERYTHING, settings).pooled())
                texts.append(text)
                rows.append(row)
        return Groups(functools.reduce(Evidence.joined, evidence), functools.reduce(Evidence.joined, texts),
                      np.array(rows))

    def _drawn(self, prompt: str, num_queries: int, draw: int) -> np.ndarray:
        """A draw of Q queries of a prompt, f32[Q, K]; none where there are no rows."""
        given = self.queries[prompt]
        if given is None:
            return np.zeros((0, self.library.index.keys.shape[1]), np.float32)
        return given[np.arange(draw * num_queries, (draw + 1) * num_queries) % len(given)]

    def _weights(self, num_queries: int, unseen: frozenset[str]) -> dict[str, float]:
        """Weights of `fitted`, from prompts of the data sets that are not left out."""
        targets = [RoutedTask(self._drawn(self.table.prompts[row], num_queries, 0),
                              self.texts[self.table.prompts[row]], name)
                   for name in DATASETS if name not in unseen
                   for row in spread(np.array(self.table.rows_of(name)), FITTED_ON)]
        library = dataclasses.replace(self.library, priors=self.priors(unseen))
        return fit_router(library, targets).by_feature()

    def _accuracy(self, router: str, settings: RouterSettings, dataset: str, num_queries: int,
                  unseen: frozenset[str]) -> float:
        """Estimated accuracy on one data set, a mean over prompts and draws."""
        groups = self.groups(dataset, num_queries, settings.num_centroids)
        case = self.case(groups, unseen, settings)
        if ROUTERS[router].needs_fit:
            case = dataclasses.replace(case, weights=self.weights(num_queries, unseen))
        scores = np.asarray(ROUTERS[router].score(case), np.float64)
        picked = firsts(scores, case.evidence, case.different)
        return self.accuracy_of(picked, groups.rows)

    def labelled(self, num_rows: int, way: str, *, of_prompt: bool) -> Accuracies:
        """Accuracies by data set of `labelled` on simulated rows, a mean over draws.

        Args:
            num_rows: labelled rows of the target, on which experts are scored.
            way: of leaving out, for the priors.
            of_prompt: whether an expert's chances on a row are its estimated accuracy on the prompt itself,
                noise of the published ranking included, or on the data set's other prompts.
        """
        settings, found = RouterSettings(), {}
        for name in self.judged("labelled", 32):
            unseen, groups = left_out(way, name), self.groups(name, 32, settings.num_centroids)
            picked = []
            for group, row in enumerate(groups.rows):
                rows = [row] if of_prompt else [other for other in self.table.rows_of(name) if other != row]
                scores = self.table.scores[rows][:, self.posed].mean(axis=0)
                chances = (T5_LM[name] + self.table.spread[name] * scores) / 100
                rows_of_it = SimulatedRows(np.clip(chances, 0.01, 0.99), num_rows, 1000 * row + group)
                case = self.case(groups.one(group), unseen, settings, rows_of_it)
                picked.append(firsts(ROUTERS["labelled"].score(case), case.evidence, case.different)[0])
            found[name] = self.accuracy_of(np.array(picked), groups.rows)
        return found

    def accuracy_of(self, picked: np.ndarray, rows: np.ndarray) -> float:
        """Estimated accuracy of experts i64[R] for prompts of one data set, rows i64[R] of the table."""
        values = self.table.scores[rows, self.posed[picked]]
        means = {int(row): float(values[rows == row].mean()) for row in np.unique(rows)}
        return self.table.accuracy(means)[dataset_of(self.table.prompts[rows[0]])]


def _unseen(router: str, way: str, *targets: str) -> frozenset[str]:
    """What the priors of a router may not see; nothing needs to be said to one without priors."""
    return left_out(way, *targets) if ROUTERS[router].needs_priors else frozenset()
