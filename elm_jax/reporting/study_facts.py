"""Fields of the facts that a study keeps beside its results, and of the decisions of its routing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.runtime import records, storage


@dataclasses.dataclass(frozen=True)
class RankedExpert:
    """One line of a decision: an expert and its votes."""

    expert: str
    votes: int


@dataclasses.dataclass(frozen=True)
class Decision:
    """The routing of one task: what is picked, the merged expert's id, and the whole ranking."""

    top_k: list[str]
    ranking: list[RankedExpert]
    num_queries: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """How often one way of routing finds the tasks' own data set."""

    encoder: str
    text_format: str
    queries: str
    same_dataset: float
    num_tasks: int


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """Fields of ``routing.json``."""

    decisions: dict[str, Decision]
    figures: list[Figure]


@dataclasses.dataclass(frozen=True)
class StudyDecision(Decision):
    """A decision with the id of the expert that its best ones were merged to."""

    merged: str


@dataclasses.dataclass(frozen=True)
class StudyExpert:
    """An expert of a study."""

    id: str
    kind: str
    dataset: str | None
    tasks: list[str]


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """The settings of a study that its report names."""

    num_queries: int
    max_eval_rows: int | None
    eval_source_length: int
    max_new_tokens: int
    selection_note: str = ""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a study's last session compiled."""

    count: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class AbsentTask:
    """A task that had no data."""

    benchmark: str
    dataset: str
    reason: str


@dataclasses.dataclass(frozen=True)
class StudyFacts:
    """Fields of ``study.json``; those with a default are not in the files of old studies."""

    title: str
    experts: list[StudyExpert]
    library: list[str]
    base: str
    multitask: str
    merged_datasets: str
    seen_tasks: list[str]
    unseen_tasks: list[str]
    generative_tasks: list[str]
    decisions: dict[str, StudyDecision]
    config: StudySettings
    routing_figures: list[Figure]
    stage_seconds: dict[str, float]
    programs: Programs
    versions: dict[str, str]
    bigbench_tasks: list[str] = dataclasses.field(default_factory=list)
    bbh_tasks: list[str] = dataclasses.field(default_factory=list)
    categories: dict[str, str | None] = dataclasses.field(default_factory=dict)
    absent_tasks: list[AbsentTask] = dataclasses.field(default_factory=list)
    multitask_tasks: list[str] = dataclasses.field(default_factory=list)


def read_facts(folder: storage.PathLike) -> dict[str, Any]:
    """Reads ``study.json``.

    Raises:
        InputError: a field is missing or of another type, or a task has no decision among the experts.
    """
    path = storage.as_path(folder) / "study.json"
    facts = records.read_record(path, StudyFacts, kind="study's facts")
    for name in ("experts", "library"):
        if not facts[name]:
            raise _unfit(f"{path}: {name}", "none", "at least one")
    for expert in facts["experts"]:
        if not expert["tasks"]:
            raise _unfit(f"{path}: experts, {expert['id']}", "no tasks", "at least one")
    for name in ("seen_tasks", "unseen_tasks", "generative_tasks", "bigbench_tasks", "bbh_tasks"):
        for task in facts.get(name, ()):
            _check_decision(facts, task, f"{path}: {name}, {task}")
    return facts


def _check_decision(facts: Mapping[str, Any], task: str, where: str) -> None:
    decision = facts["decisions"].get(task)
    if decision is None:
        raise _unfit(where, "no entry in decisions", "one for each task")
    missing = set(facts["library"]) - {line["expert"] for line in decision["ranking"]}
    if missing or not decision["top_k"]:
        raise _unfit(f"{where}, decisions", f"{sorted(missing)[0]!r} in no ranking" if missing
                     else "an empty top_k", "a ranking of the library's experts, and the best of them")


def _unfit(where: str, got: str, expected: str) -> InputError:
    return InputError(describe("The study's facts do not fit each other", where=where, got=got,
                               expected=expected, cure="run the study again: what is done is found"))
