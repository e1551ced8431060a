"""Tables of experts x tasks from results, and the priors and the generality that they give."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.data.registry.task_kin import TaskKin, kin_of
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.evaluation.evaluation_settings import PRIMARY
from elm_jax.evaluation.results import ResultsStore
from elm_jax.experts.generality import CalibratedDataset, CalibratedExpert, Generality
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.routed_library import copies_in, fingerprints_of, own_datasets
from elm_jax.routing.priors import Priors, priors_of_scores

SHOWN = 5
"""Missing pairs that an error names."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of the experts of a library on tasks.

    Attributes:
        library: whose experts they are.
        tasks: T names.
        scores: f64[E, T]; NaN where there is none.
        copies: i64[E], of `copies_in`; None if all experts are different.
    """

    library: ExpertLibrary
    tasks: tuple[str, ...]
    scores: np.ndarray
    copies: np.ndarray | None

    @property
    def kin(self) -> list[TaskKin]:
        """Data set and family of each task."""
        return [kin_of(task) for task in self.tasks]

    @property
    def num_copies(self) -> int:
        """How many experts are copies of older ones."""
        return 0 if self.copies is None else int((self.copies != np.arange(len(self.copies))).sum())

    def own(self) -> np.ndarray:
        """bool[E, T], tasks of data sets that an expert was trained on."""
        of = [own_datasets(entry.card) for entry in self.library.entries.values()]
        return np.array([[kin.dataset in own for kin in self.kin] for own in of], bool)

    def needed(self) -> np.ndarray:
        """bool[E, T], scores that priors are made of: not of copies, nor of own tasks."""
        if self.copies is None:
            return ~self.own()
        return ~self.own() & (self.copies == np.arange(len(self.copies)))[:, None]

    def check_tells(self) -> None:
        """Raises InputError if no data set has two experts that were not trained on it."""
        if not (self.needed().sum(axis=0) > 1).any():
            raise InputError(describe(
                "Nothing can tell which experts of the library are general", where=self.library.path,
                got=f"{len(self.library)} experts, {len(self.tasks)} tasks", expected="a task, of whose data "
                "set at least two experts have seen nothing",
                cure="give --task NAME of other data sets, or add experts of other data sets"))

    def priors(self) -> Priors:
        """Priors of the library's experts.

        Raises:
            InputError: a score that is needed is missing; the first few are named, and counted. Or no data
                set tells anything.
        """
        self.check_tells()
        missing = np.argwhere(self.needed() & np.isnan(self.scores))
        if len(missing):
            names = list(self.library)
            shown = ", ".join(f"{names[e]} on {self.tasks[t]}" for e, t in missing[:SHOWN])
            raise InputError(describe(
                "The table of experts and tasks is not complete", where=self.library.path,
                got=f"{len(missing)} of {int(self.needed().sum())} scores missing: {shown}"
                + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""),
                expected="every expert of the library scored on every task, by weights that it has now",
                cure="score them with `elm evaluate`, give --task NAME for those that all are scored on, "
                "or --base in place of --results"))
        return priors_of_scores(self.scores, [kin.dataset for kin in self.kin],
                                [kin.family for kin in self.kin], self.copies, self.own())

    def generality(self) -> Generality:
        """Generality of the library's experts, to be written; errors as `priors`."""
        priors, fingerprints = self.priors(), fingerprints_of(self.library)
        counts = collections.Counter(kin.dataset for kin in self.kin)
        experts = {
            name: CalibratedExpert(entry.card.created, fingerprints[name],
                                   [None if np.isnan(score) else float(score) for score in row])
            for (name, entry), row in zip(self.library.entries.items(), priors.generality, strict=True)}
        return Generality([CalibratedDataset(dataset, family, counts[dataset]) for dataset, family in zip(
            priors.datasets, priors.families, strict=True)], experts)


def read_table(library: ExpertLibrary, store: ResultsStore, tasks: Sequence[str] | None = None) -> ScoreTable:
    """Reads the scores of a library's experts from results; those of other weights do not count.

    Args:
        library: the experts.
        store: results of `elm evaluate`, of a study, or of a calibration.
        tasks: that count; None for all that an expert of the library was scored on.

    Raises:
        InputError: no expert was scored, a task is not in the results, or one was scored on unlike rows.
    """
    fingerprints = fingerprints_of(library)
    experts = {name: place for place, name in enumerate(library)}
    rows = [row for row in store.rows() if row["expert"] in experts and row["metric"] in PRIMARY.values()
            and row.get("model") in (None, fingerprints[row["expert"]])]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    if not by_task:
        raise InputError(describe("The results have no score of an expert of the library", where=store.path,
                                  expected=f"scores of {', '.join(list(library)[:SHOWN])}",
                                  cure="`elm library list` names the experts; results are of these weights"))
    for task in tasks or ():
        if task not in by_task:
            raise unknown_name("task", task, by_task, where=store.path)
    wanted = tuple(by_task if tasks is None else dict.fromkeys(tasks))
    scores = np.full((len(experts), len(wanted)), np.nan)
    for place, task in enumerate(wanted):
        for row in _of_one_split(by_task[task], store):
            scores[experts[row["expert"]], place] = row["value"]
    return ScoreTable(library, wanted, scores, copies_in(library))


def _of_one_split(rows: Sequence[Mapping[str, Any]], store: ResultsStore) -> list[Mapping[str, Any]]:
    """The rows of the split on which most experts were scored.

    Raises:
        InputError: they are of unlike numbers of instances, or of choices scored in another way.
    """
    split, _ = collections.Counter(row["split"] for row in rows).most_common(1)[0]
    found = [row for row in rows if row["split"] == split]
    for field, what in (("num_instances", "instances"), ("choice_score", "choice_score")):
        values = {str(row.get(field, "sum")) for row in found}
        if len(values) > 1:
            raise InputError(describe(
                "Experts were scored in unlike ways on one task", where=f"{found[0]['task']} {split} in "
                f"{store.path}", got=f"{what} {' and '.join(sorted(values))}",
                expected="the same for all experts", cure="score them again, in one way"))
    return found
