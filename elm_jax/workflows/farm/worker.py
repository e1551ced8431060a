"""A worker of a farm: trains experts of the farm's table, one after another, beside other workers.

Workers share only the farm's folder. ``<farm>/farm.json`` holds every expert's whole config;
``<farm>/attempts/<expert>/`` records who works on it and how each attempt ended (see `leases`);
``<farm>/runs/<expert>/`` is an ordinary run folder of `elm train`. A worker takes the next expert that nobody
works on, trains it with the ordinary `train`, which resumes from an earlier worker's checkpoint if there is
one, and takes the next.
"""

import dataclasses
import logging
import os
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import LOST_PROCESS, ElmError, InputError, RunError, describe
from elm_jax.experts.base import Base, load_base
from elm_jax.runtime import hosts, locks, preemption, sharding, storage
from elm_jax.runtime.leases import Attempt, Lease, Leases
from elm_jax.workflows.farm.farm_status import is_over, tries
from elm_jax.workflows.farm.jobs import Job, model_dir_of, read
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_expert import task_data, train, train_in_kept_folder

logger = logging.getLogger(__name__)
SICK_AFTER = 3
"""If this many experts fail in a row, the worker is at fault rather than the experts."""


@dataclasses.dataclass(frozen=True)
class WorkSettings:
    """Settings of one worker.

    Attributes:
        lease_seconds: a worker that is silent for so long counts as dead.
        attempts: how often an expert is tried before it is given up; stops by SIGTERM do not count.
        wait: whether to wait for experts that others train, in case they die; else the worker ends when
            nothing is free.
        max_experts: most experts that this worker trains; None for no limit.
        poll_seconds: how often a waiting worker looks.
        mesh_data: size of the mesh's data axis here; None as each config says.
        mesh_model: of its model axis.
    """

    lease_seconds: float = 120.0
    attempts: int = 3
    wait: bool = True
    max_experts: int | None = None
    poll_seconds: float = 5.0
    mesh_data: int | None = None
    mesh_model: int | None = None

    def __post_init__(self) -> None:
        if self.lease_seconds < 3 or self.attempts < 1 or self.poll_seconds <= 0:
            raise InputError(describe("A worker's settings are out of range",
                                      got=f"lease of {self.lease_seconds} s, {self.attempts} attempts",
                                      expected="a lease of at least 3 s, at least one attempt"))


class Worker:
    """One worker of a farm, of one or several processes; the first process claims experts."""

    def __init__(self, folder: storage.PathLike, settings: WorkSettings) -> None:
        self.folder = storage.as_path(folder)
        self.settings = settings
        self.jobs = {job.id: job for job in read(self.folder)}
        self.leases = Leases(self.folder / "attempts", settings.lease_seconds)
        self._held: Lease | None = None
        self._takes_over = False  # from a silent worker
        self._base: tuple[tuple[str, Mesh], Base] | None = None
        self._data: dict[Any, TaskData] = {}

    def run(self) -> bool:
        """Works until no expert is left; returns whether every expert of the farm is finished.

        Raises:
            Stopped: by SIGTERM; its expert is saved, and free for other workers.
            RunError: several experts in a row failed here.
        """
        worked, failed = 0, 0
        with preemption.stop_flag() as told_to_stop:
            while self.settings.max_experts is None or worked < self.settings.max_experts:
                if told_to_stop():
                    raise preemption.Stopped
                choice = hosts.by_first(self._next)
                if choice is None:
                    break
                if choice == "wait":
                    time.sleep(self.settings.poll_seconds)
                    continue
                worked += 1
                how = self._work(self.jobs[choice])
                failed += 1 if how == "failed" else -failed if how == "done" else 0
                if failed >= SICK_AFTER:
                    raise RunError(describe(
                        f"{SICK_AFTER} experts in a row failed on this worker, so it ends",
                        where=self.leases.worker, cure="see `elm farm status`: the host, or the table?"))
        return hosts.by_first(lambda: all(
            attempts and attempts[-1].end and attempts[-1].end["how"] == "done"
            for attempts in map(self.leases.attempts, self.jobs)))

    def _next(self) -> str | None:
        """First process: claims an expert and returns its id, or ``wait``, or None if no work is left."""
        busy = False
        for name, attempts in self._by_attempts():
            if is_over(attempts, self.settings.attempts):
                continue
            last = attempts[-1] if attempts else None
            if last is not None and last.end is None and not self.leases.is_silent(name, last):
                busy = True
                continue
            if last is not None and last.end is None and tries(attempts) >= self.settings.attempts:
                self._give_up(name, last)
                continue
            self._takes_over = last is not None and last.end is None
            if not self._takes_over and locks.holder_of(model_dir_of(self.folder, self.jobs[name])):
                busy = True  # `elm train` by hand
                continue
            lease = self.leases.claim(name, last.number + 1 if last else 1)
            if lease is None:  # another worker was faster
                busy = True
                continue
            others = [other for other in self.jobs if other != name]
            lease.keep(self._on_lost, lambda others=others: others)
            self._held = lease
            return name
        return "wait" if busy and self.settings.wait else None

    def _by_attempts(self) -> Iterator[tuple[str, list[Attempt]]]:
        """Experts with their attempts, fewest attempts first."""
        found = [(name, self.leases.attempts(name)) for name in self.jobs]
        yield from sorted(found, key=lambda pair: tries(pair[1]))

    def _give_up(self, name: str, last: Attempt) -> None:
        """Gives up an expert whose workers died as often as it may be tried: it probably kills them."""
        lease = self.leases.claim(name, last.number + 1)
        if lease is not None:
            lease.end("failed", final=True, error=f"its workers died {self.settings.attempts} times without "
                      f"a word (killed, or out of memory), the last one {last.worker}")

    def _on_lost(self) -> None:
        """Ends this process because another worker has taken over its expert after a long silence."""
        text = "elm farm: " + describe(
            "Another worker has taken over this one's expert, so it ends",
            where=self._held and self._held.work,
            got=f"silent for more than {self.settings.lease_seconds:.0f} s: a paused host, or a lost disk",
            cure="start the worker again")
        if hosts.count() > 1:
            hosts.fail(LOST_PROCESS, text)
        logger.error(text)
        os._exit(LOST_PROCESS)  # at once: the run's folder is another worker's now

    def _work(self, job: Job) -> str:
        """Trains one expert and records its end: ``done``, ``failed``, or ``refused`` for wrong input."""
        start = time.monotonic()
        try:
            outcome = self._train(job)
        except (ElmError, Exception) as error:
            final = isinstance(error, InputError) and not isinstance(error, locks.FolderTaken)
            self._end("failed", final=final, error=_words(error))
            if hosts.count() > 1:  # the processes may disagree on it: all end and leave the claim to others
                raise
            logger.error("%s failed: %s", job.id, _words(error))
            return "refused" if final else "failed"
        if outcome.stopped:
            self._end("stopped", step=outcome.step)
            raise preemption.Stopped
        self._end("done", steps=outcome.step, seconds=round(time.monotonic() - start, 1),
                  metrics=outcome.metrics)
        return "done"

    def _end(self, how: str, **facts: Any) -> None:
        if self._held is not None:
            self._held.end(how, **facts)
            self._held = None

    def _config_of(self, job: Job) -> TrainConfig:
        """An expert's config with its folders where this farm lies."""
        return dataclasses.replace(
            job.config, model_dir=str(model_dir_of(self.folder, job)),
            prepared_dir=job.config.prepared_dir or str(self.folder / "prepared"))

    def _train(self, job: Job) -> Any:
        config = self._config_of(job)
        mesh = self._mesh_of(config)
        base = self._base_of(config, mesh)
        key = (config.modules, config.prepared_dir, base.fingerprint)
        data = self._data.setdefault(key, task_data(config, base))
        logger.info("training %s, attempt %d", job.id, self._held.number if self._held else 0)

        def on_start() -> None:
            storage.write_text(storage.as_path(config.model_dir) / "config.gin", job.gin)

        try:
            return train(config, base=base, data=data, mesh=mesh, on_start=on_start)
        except locks.FolderTaken:
            if not self._takes_over:
                raise
            # By a silent worker that is paused: it ends as soon as it wakes (`_on_lost`).
            return train_in_kept_folder(config, base=base, data=data, mesh=mesh, on_start=on_start)

    def _mesh_of(self, config: TrainConfig) -> Mesh:
        """The mesh for an expert: as many devices as divide its batch, unless the settings give it."""
        data = config.mesh_data if self.settings.mesh_data is None else self.settings.mesh_data
        model = self.settings.mesh_model or config.mesh_model
        if data == -1:
            most = max(1, len(jax.devices()) // (model * config.mesh_experts))
            data = sharding.largest_data_axis([config.batch_size // config.num_microbatches], most)
        return sharding.make_mesh(data, model, config.mesh_experts)

    def _base_of(self, config: TrainConfig, mesh: Mesh) -> Base:
        """The base of an expert, kept in memory for the next expert that needs it with the same sharding."""
        path, rules = config.initial_checkpoint_path, config.base_rules()
        if self._base is None or self._base[0] != (path, mesh, rules):
            self._base = None  # first, so that the devices never hold two
            self._base = ((path, mesh, rules), load_base(path, mesh=mesh, rules=rules))
        return self._base[1]


def _words(error: BaseException) -> str:
    if isinstance(error, ElmError):
        return str(error)
    return "".join(traceback.format_exception(error))[-4000:]
