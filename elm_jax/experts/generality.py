"""Generality of a library's experts: how well each does on data sets that it was not trained on.

Normal scores are relative to the experts of a library, so they stand with the library, in
``calibration/generality.json``, and not on cards. A library without this file is as it was before there was
one. An expert that was added since has no generality, nor has one that took the place of another of its id.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from elm_jax.experts.card import ExpertCard
from elm_jax.routing.priors import Priors
from elm_jax.runtime import records, storage

CALIBRATION, GENERALITY = "calibration", "generality.json"
_SCHEMA_VERSION = 1
_MOST = 10.0
"""Beyond all normal scores: the best of 10^22 experts has less."""


@dataclasses.dataclass(frozen=True)
class CalibratedDataset:
    """A data set on which experts were scored: its family, and how many of its tasks were scored."""

    dataset: str
    family: str
    tasks: int


@dataclasses.dataclass(frozen=True)
class CalibratedExpert:
    """What is known of one expert.

    Attributes:
        created: time on its card, which tells it from another expert of its id.
        fingerprint: of its weights.
        scores: mean normal score on each data set; None for those that it was trained on.
    """

    created: str
    fingerprint: str | None
    scores: list[float | None]


@dataclasses.dataclass(frozen=True)
class Generality:
    """Fields of ``generality.json``: how general the experts of a library are.

    Attributes:
        datasets: on which they were scored.
        experts: by id.
    """

    datasets: list[CalibratedDataset]
    experts: dict[str, CalibratedExpert]

    def priors(self, experts: Sequence[str]) -> Priors | None:
        """Priors of experts in their order, NaN where nothing is known; None if nothing is known of any."""
        nothing = [None] * len(self.datasets)
        scores = np.array([self.experts[name].scores if name in self.experts else nothing
                           for name in experts], np.float64).reshape(len(experts), len(self.datasets))
        if np.isnan(scores).all():
            return None
        return Priors(scores, tuple(one.dataset for one in self.datasets),
                      tuple(one.family for one in self.datasets))

    def prior_means(self) -> dict[str, float | None]:
        """Prior of each expert over all data sets, by id; None for one that was scored on none."""
        return {name: float(np.mean([score for score in one.scores if score is not None]))
                if any(score is not None for score in one.scores) else None
                for name, one in self.experts.items()}

    def only(self, experts: Collection[str]) -> "Generality":
        """What is known of some of the experts."""
        return Generality(self.datasets, {name: one for name, one in self.experts.items() if name in experts})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns family, score and number of tasks by expert and data set, JSON-ready."""
        return {name: {dataset.dataset: {"score": score, "family": dataset.family, "tasks": dataset.tasks}
                       for dataset, score in zip(self.datasets, one.scores, strict=True) if score is not None}
                for name, one in self.experts.items()}


def generality_file(library: epath.Path) -> epath.Path:
    """Path of a library's generality."""
    return library / CALIBRATION / GENERALITY


def read_generality(library: epath.Path, cards: Mapping[str, ExpertCard]) -> Generality:
    """Reads what is known of the experts of a library; nothing where it was never calibrated.

    Args:
        library: its folder.
        cards: of its experts, by id.

    Raises:
        InputError: the file is damaged.
    """
    path = generality_file(library)
    if not path.exists():
        return Generality([], {})
    facts = records.read_record(path, Generality, kind="generality of experts",
                                schema_version=_SCHEMA_VERSION)
    _check_datasets(facts["datasets"], path)
    found = {}
    for name, value in facts["experts"].items():
        scores = value["scores"]
        if len(scores) != len(facts["datasets"]) or not all(
                score is None or abs(score) <= _MOST for score in scores):
            raise records.wrong_field(
                "The expert's scores are not those of the data sets", path, ("experts", name, "scores"),
                str(scores)[:100],
                f"{len(facts['datasets'])} normal scores, from -{_MOST} to {_MOST}, or null")
        if name in cards and cards[name].created == value["created"]:
            found[name] = CalibratedExpert(value["created"], value["fingerprint"], scores)
    datasets = [CalibratedDataset(one["dataset"], one["family"], one["tasks"]) for one in facts["datasets"]]
    return Generality(datasets, found)


def _check_datasets(datasets: Sequence[Mapping[str, Any]], path: epath.Path) -> None:
    """Raises InputError for a data set that stands twice, or none of whose tasks was scored."""
    names: set[str] = set()
    for number, one in enumerate(datasets):
        if one["dataset"] in names:
            raise records.wrong_field("A data set stands twice", path, ("datasets", number, "dataset"),
                                      one["dataset"][:100], "each data set once")
        if one["tasks"] < 1:
            raise records.wrong_field("A data set has no tasks", path, ("datasets", number, "tasks"),
                                      one["tasks"], "1 or more")
        names.add(one["dataset"])


def write_generality(library: epath.Path, known: Generality) -> None:
    """Writes what is known of the experts of a library, in place of what was; the caller keeps its lock."""
    storage.write_json(generality_file(library), {"schema_version": _SCHEMA_VERSION,
                                                  **dataclasses.asdict(known)})


def forget_experts(library: epath.Path, known: Generality, removed: Collection[str]) -> None:
    """Drops what is known of experts that leave a library, and their predictions; the caller keeps its lock.

    Args:
        library: its folder.
        known: of its experts.
        removed: ids of those that leave.
    """
    if known.experts:
        write_generality(library, known.only(known.experts.keys() - set(removed)))
    for name in removed:
        predictions = library / CALIBRATION / "predictions" / name
        if predictions.exists():
            storage.remove(predictions)
