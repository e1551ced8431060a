"""Jobs of a farm: every expert's whole config, in ``farm.json``."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.models import families
from elm_jax.models.losses import LossConfig
from elm_jax.runtime import locks, records, storage
from elm_jax.runtime.differences import differences
from elm_jax.runtime.leases import Leases
from elm_jax.training.early_end import EarlyEnd
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.workflows.train.train_config import TrainConfig

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Job:
    """The training job of one expert of a farm.

    Attributes:
        id: of the expert.
        config: its whole run.
        gin: the config as gin text, for the run's folder.
    """

    id: str
    config: TrainConfig
    gin: str = ""


@dataclasses.dataclass(frozen=True)
class StoredJob:
    """One expert in ``farm.json``; `TrainConfig` checks its config."""

    id: str
    config: dict[str, Any]
    gin: str


@dataclasses.dataclass(frozen=True)
class FarmRecord:
    """Fields of ``farm.json``."""

    experts: list[StoredJob]


def create(folder: storage.PathLike, jobs: list[Job]) -> int:
    """Creates or extends a farm; returns the number of new experts.

    Raises:
        InputError: an expert of the farm has another config now.
    """
    folder = storage.as_path(folder)
    Leases(folder / "attempts", 3)  # refuses a bucket
    with locks.alone(folder, locks.CHANGE_SECONDS):
        return _extend(folder, jobs)


def _extend(folder: epath.Path, jobs: list[Job]) -> int:
    """Does as `create`, in a folder whose table no other process changes."""
    known = {job.id: job for job in read(folder)} if (folder / "farm.json").exists() else {}
    for job in jobs:
        if job.id in known and known[job.id].config.digest() != job.config.digest():
            raise InputError(describe(
                "The farm has an expert of this id with another config", where=f"{folder}: {job.id}",
                got="; ".join(differences(known[job.id].config.deciding(), job.config.deciding())),
                cure="give it another expert_id, or make another farm"))
    merged = {**known, **{job.id: job for job in jobs}}
    rows = [{"id": job.id, "config": families.plain_settings(job.config), "gin": job.gin}
            for job in merged.values()]
    storage.write_json(folder / "farm.json", {"schema_version": SCHEMA_VERSION, "experts": rows})
    return len(merged) - len(known)


def read(folder: storage.PathLike) -> list[Job]:
    """Reads the jobs of a farm, in the table's order.

    Raises:
        InputError: an expert's id, or its run folder, leads out of the farm's folders.
    """
    path = storage.as_path(folder) / "farm.json"
    value = records.read_record(path, FarmRecord, kind="farm", schema_version=SCHEMA_VERSION)
    jobs = [Job(storage.require_name(entry["id"], f"{path}: experts/{number}/id", "expert_id"),
                _config(entry["config"], f"{path}: experts/{number}/config"), entry["gin"])
            for number, entry in enumerate(value["experts"])]
    for job in jobs:
        _check_run_folder(job, path)
    return jobs


def _check_run_folder(job: Job, where: epath.Path) -> None:
    """Refuses a run folder that goes down and then up again; one beside the farm's folder is right."""
    parts = storage.as_path(job.config.model_dir).parts
    down = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    if ".." in parts[down:]:
        raise InputError(describe("An expert's run folder leads out of the folder of the runs",
                                  where=f"{where}, {job.id}: model_dir", got=repr(job.config.model_dir)[:200],
                                  expected="a path without .. below its first folder"))


def _config(facts: Mapping[str, Any], where: str) -> TrainConfig:
    values = {name: _tuples(value) for name, value in facts.items()}
    made = {name: make(facts[name], f"{where}/{name}") for name, make in _NESTED.items()
            if facts.get(name) is not None}
    return records.build(TrainConfig, {**values, **made}, where)


_NESTED: dict[str, Callable[[Any, str], Any]] = {
    "optimizer": functools.partial(records.build, OptimizerConfig),
    "early_end": functools.partial(records.build, EarlyEnd),
    "loss": functools.partial(records.build, LossConfig), "network": families.config_of}
"""Fields of a `TrainConfig` that are configs themselves."""


def _tuples(value: Any) -> Any:
    """Converts JSON's lists to the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def model_dir_of(folder: storage.PathLike, job: Job) -> storage.PathLike:
    """Run folder of an expert: its config's `model_dir`, relative to the farm's folder."""
    own = job.config.model_dir
    return storage.as_path(own) if not storage.is_local(own) else storage.as_path(folder) / own
