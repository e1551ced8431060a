"""Generality of a library's experts: how well each does on data sets that it was not trained on.

Normal scores are relative to the experts of a library, so they stand with the library, in
``calibration/generality.json``, and not on cards. A library without this file is as it was before there was
one. An expert that was added since has no generality, nor has one that took the place of another of its id.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.routing.priors import Priors
from elm_jax.runtime import records, storage

CALIBRATION, GENERALITY = "calibration", "generality.json"
_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class DatasetScore:
    """Generality of an expert on one data set.

    Attributes:
        score: mean normal score over the data set's tasks.
        family: that the data set belongs to.
        tasks: how many were scored.
    """

    score: float
    family: str
    tasks: int


@dataclasses.dataclass(frozen=True)
class ExpertGenerality:
    """What is known of one expert.

    Attributes:
        created: time on its card, which tells it from another expert of its id.
        fingerprint: of its weights.
        generality: by data set; none of those that it was trained on.
    """

    created: str
    fingerprint: str | None
    generality: dict[str, DatasetScore]


@dataclasses.dataclass(frozen=True)
class GeneralityFacts:
    """Fields of ``generality.json``."""

    experts: dict[str, ExpertGenerality]


def generality_file(library: epath.Path) -> epath.Path:
    """Path of a library's generality."""
    return library / CALIBRATION / GENERALITY


def read_generality(library: epath.Path, cards: Mapping[str, ExpertCard]) -> dict[str, ExpertGenerality]:
    """Reads what is known of the experts of a library; none where it was never calibrated.

    Args:
        library: its folder.
        cards: of its experts, by id.

    Raises:
        InputError: the file is damaged.
    """
    path = generality_file(library)
    if not path.exists():
        return {}
    facts = records.read_record(path, GeneralityFacts, kind="generality of experts",
                                schema_version=_SCHEMA_VERSION)
    found = {}
    for name, value in facts["experts"].items():
        scores = {dataset: DatasetScore(*(score[field.name] for field in dataclasses.fields(DatasetScore)))
                  for dataset, score in value["generality"].items()}
        wrong = next((one for one, score in scores.items() if not math.isfinite(score.score)), None)
        if wrong is not None:
            raise records.wrong_field("A score is not a number", path, ("experts", name, "generality", wrong),
                                      str(scores[wrong].score), "a finite number")
        if name in cards and cards[name].created == value["created"]:
            found[name] = ExpertGenerality(value["created"], value["fingerprint"], scores)
    return found


def write_generality(library: epath.Path, known: Mapping[str, ExpertGenerality]) -> None:
    """Writes what is known of the experts of a library, in place of what was; the caller keeps its lock."""
    storage.write_json(generality_file(library), {
        "schema_version": _SCHEMA_VERSION,
        "experts": {name: dataclasses.asdict(one) for name, one in known.items()}})


def forget_experts(library: epath.Path, known: Mapping[str, ExpertGenerality], removed: Collection[str]
                   ) -> None:
    """Drops what is known of experts that leave a library, and their predictions; the caller keeps its lock.

    Args:
        library: its folder.
        known: of its experts.
        removed: ids of those that leave.
    """
    if known:
        write_generality(library, {name: one for name, one in known.items() if name not in removed})
    for name in removed:
        storage.remove(library / CALIBRATION / "predictions" / name)


def priors_of(experts: Sequence[str], known: Mapping[str, ExpertGenerality]) -> Priors | None:
    """Priors of experts in their order; None if nothing is known of any.

    An expert that was not scored on a data set, or was trained on it, has NaN.
    """
    families: dict[str, str] = {}
    for name in experts:
        if name in known:
            for dataset, score in known[name].generality.items():
                families.setdefault(dataset, score.family)
    if not families:
        return None
    generality = np.full((len(experts), len(families)), np.nan)
    for number, name in enumerate(experts):
        for place, dataset in enumerate(families):
            if name in known and dataset in known[name].generality:
                generality[number, place] = known[name].generality[dataset].score
    return Priors(generality, tuple(families), tuple(families.values()))


def generality_of(priors: Priors, experts: Sequence[str], cards: Mapping[str, ExpertCard],
                  fingerprints: Mapping[str, str | None], tasks: Mapping[str, int]
                  ) -> dict[str, ExpertGenerality]:
    """Generality of each expert, to be written, from priors of them in this order.

    Args:
        priors: of `experts`.
        experts: ids.
        cards: of them.
        fingerprints: of their weights.
        tasks: number of tasks by data set.

    Raises:
        InputError: no data set has two experts that were not trained on it.
    """
    if np.isnan(priors.generality).all():
        raise InputError(describe(
            "Nothing tells which experts are general", got="no data set with two experts that were not "
            "trained on it", cure="calibrate on other tasks, or add experts of other data sets"))
    return {name: ExpertGenerality(cards[name].created, fingerprints.get(name), {
        dataset: DatasetScore(float(score), family, tasks[dataset])
        for dataset, family, score in zip(priors.datasets, priors.families, row, strict=True)
        if not np.isnan(score)}) for name, row in zip(experts, priors.generality, strict=True)}
