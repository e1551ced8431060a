"""What the routers of sparse layers did in a run: lines, each of the steps since the one before.

They are made on the host, in float64, from the sums that the layers report with a step's metrics. A run's
checkpoint keeps the sums of steps that no line has yet.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.layers.sparse_config import EXPERTS, SparseConfig
from elm_jax.runtime import records, storage

FILE = "router.jsonl"
KIND = "row of router loads"
DIGITS = 6
"""Decimals of shares in a line, of which there are E and for each task E."""
LAST = 10
"""A report is of the last line of each of so many."""
MEANS = ("dropped", "entropy", "entropy_share", "z", "balance")
"""Figures of a line that are means over tokens, or nearly so."""
SCALARS = ("dropped", "entropy", "balance", "max_load", "mutual_information")
"""Figures of a line that TensorBoard shows, as ``router/LAYER/NAME``."""


@dataclasses.dataclass(frozen=True)
class TaskLoad:
    """How the choices of one task's tokens spread over the experts.

    Attributes:
        choices: their number.
        load: share of each expert.
    """

    choices: float
    load: list[float]


@dataclasses.dataclass(frozen=True)
class RouterRow:
    """Fields of a line of ``router.jsonl``: one layer over the steps since its line before.

    Attributes:
        step: the last of them.
        layer: ``encoder/layers_1``.
        steps: how many.
        tokens: real tokens.
        load: share of the choices that each expert got, before any was dropped.
        dropped: share of the choices without a place; where experts choose, of the tokens that none took.
        entropy: mean over tokens of the entropy of the router's probabilities, in nats.
        entropy_share: of its greatest value, ``log E``.
        z: mean squared logsumexp of the logits.
        balance: ``E sum_e (choices_e / tokens) (probs_e / tokens)``: K for even loads.
        max_load: the largest share.
        min_load: the least.
        by_task: the tasks that had choices; none where tasks are not told apart.
        mutual_information: of task and expert over the choices, in nats.
    """

    step: int
    layer: str
    steps: int
    tokens: float
    load: list[float]
    dropped: float
    entropy: float
    entropy_share: float
    z: float
    balance: float
    max_load: float
    min_load: float
    by_task: dict[str, TaskLoad] | None = None
    mutual_information: float | None = None


@dataclasses.dataclass(frozen=True)
class KeptSums:
    """The sums of one layer in a checkpoint: `RouterSums` as numbers."""

    choices: list[float]
    probs: list[float]
    tokens: float
    dropped: float
    z: float
    entropy: float
    by_task: list[list[float]] | None = None


@dataclasses.dataclass(frozen=True)
class RouterNote:
    """What a checkpoint says of the steps behind the last line.

    Attributes:
        steps: their number.
        layers: their sums.
    """

    steps: int
    layers: dict[str, KeptSums]


@dataclasses.dataclass(frozen=True)
class RunNote:
    """What the checkpoint of a solo run holds beside its state."""

    router: RouterNote | None = None


@dataclasses.dataclass(frozen=True)
class SoloMarker:
    """What is in the marker of a solo run's checkpoint beside what every checkpoint has."""

    note: RunNote


class RouterTotals:
    """Adds what the layers report, step by step, and makes a line a layer of it.

    Args:
        sparse: of the network.
        note: of the checkpoint that the run goes on from; None to start with nothing.
        where: the note is from, for errors.

    Raises:
        InputError: the note is damaged.
    """

    def __init__(self, sparse: SparseConfig, note: Any = None, where: Any = None) -> None:
        self._sparse = sparse
        self._steps, self._layers = 0, dict[str, RouterSums]()
        if note is not None:
            records.check_record({"router": note}, RunNote, kind="checkpoint's sums of routers", where=where)
            self._steps = note["steps"]
            self._layers = {layer: _as_float64(RouterSums(**sums)) for layer, sums in note["layers"].items()}
            self._check(where)

    def _check(self, where: Any) -> None:
        """Raises InputError unless the kept sums are of as many experts and tasks as there are."""
        experts, tasks = self._sparse.num_experts, len(self._sparse.tasks)
        for layer, sums in self._layers.items():
            shapes = [sums.choices.shape, sums.probs.shape] + [
                array.shape for array in [sums.by_task] if array is not None]
            expected = [(experts,), (experts,), (tasks, experts)][:len(shapes)]
            if shapes != expected:
                raise InputError(describe("A checkpoint's sums of routers are of another network",
                                          where=f"{where}: {layer}", got=shapes, expected=expected,
                                          cure="the file is damaged: fetch or write it again"))

    def add(self, reports: Mapping[str, RouterSums]) -> None:
        """Adds the sums of one step, by layer: arrays on the host."""
        self._steps += 1
        for layer, sums in reports.items():
            found, before = _as_float64(sums), self._layers.get(layer)
            self._layers[layer] = found if before is None else RouterSums(*(
                None if one is None or other is None else one + other
                for one, other in zip(before, found, strict=True)))

    def take_rows(self, step: int) -> list[dict[str, Any]]:
        """Lines at a step, from the first layer on, of the sums since those before; starts anew."""
        rows = [row_of(step, layer, self._steps, self._layers[layer], self._sparse)
                for layer in sorted(self._layers, key=_place)]
        self._steps, self._layers = 0, {}
        return rows

    def note(self) -> dict[str, Any] | None:
        """The sums that no line has yet, JSON-ready; None if there are none."""
        if not self._layers:
            return None
        return {"steps": self._steps, "layers": {
            layer: {name: array.tolist() for name, array in sums._asdict().items() if array is not None}
            for layer, sums in self._layers.items()}}


def _place(layer: str) -> tuple[bool, str, int]:
    """Where a layer's line stands: an encoder before its decoder, layer 2 before layer 10."""
    stack, _, number = layer.rpartition("_")
    return not stack.startswith("encoder"), stack, int(number) if number.isdecimal() else 0


def _as_float64(sums: RouterSums) -> RouterSums:
    return RouterSums(*(None if array is None else np.asarray(array, np.float64) for array in sums))


def row_of(step: int, layer: str, steps: int, sums: RouterSums, sparse: SparseConfig) -> dict[str, Any]:
    """The line of one layer.

    Args:
        step: the last of the steps.
        layer: its name.
        steps: how many.
        sums: over them, f64.
        sparse: of the network.

    Returns:
        A `RouterRow` as a dictionary.
    """
    tokens, choices = max(float(sums.tokens), 1.0), max(float(sums.choices.sum()), 1.0)
    # In a decoder tokens always choose.
    by_experts = sparse.choice == EXPERTS and layer.startswith("encoder/")
    load, count = sums.choices / choices, len(sums.choices)
    entropy = float(sums.entropy) / tokens
    row = {"step": step, "layer": layer, "steps": steps, "tokens": float(sums.tokens), "load": rounded(load),
           "dropped": float(sums.dropped) / (tokens if by_experts else choices), "entropy": entropy,
           "entropy_share": entropy / math.log(count) if count > 1 else 0.0, "z": float(sums.z) / tokens,
           "balance": count * float(sums.choices @ sums.probs) / tokens**2,
           "max_load": float(load.max()), "min_load": float(load.min())}
    counts = sums.by_task
    if counts is None:
        return row
    known = [number for number in range(len(counts)) if counts[number].any()]
    return {**row, "mutual_information": mutual_information(counts), "by_task": {
        sparse.tasks[number]: {"choices": float(counts[number].sum()),
                               "load": rounded(counts[number] / counts[number].sum())} for number in known}}


@dataclasses.dataclass(frozen=True)
class LayerLoad:
    """What the router of one layer did over the last lines of a run.

    Attributes:
        layer: its name.
        steps: the first and the last of them.
        load: share f64[E] of the choices that each expert got.
        means: figures of `RouterRow` by name, means over tokens.
        by_task: choices f64[E] by task; empty where tasks are not told apart.
    """

    layer: str
    steps: tuple[int, int]
    load: np.ndarray
    means: dict[str, float]
    by_task: dict[str, np.ndarray]

    @property
    def information(self) -> float | None:
        """Mutual information of task and expert in nats; None where tasks are not told apart."""
        return mutual_information(list(self.by_task.values())) if self.by_task else None


def read_loads(path: storage.PathLike) -> tuple[LayerLoad, ...]:
    """Reads the loads of each layer over the last tenth of a run's lines; a missing file has none.

    Raises:
        InputError: the file is damaged.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in records.read_records(path, RouterRow, kind=KIND):
        lines.setdefault(row["layer"], []).append(row)
    return tuple(_load_of(layer, rows[-math.ceil(len(rows) / LAST):], path)
                 for layer, rows in lines.items())


def _load_of(layer: str, rows: Sequence[Mapping[str, Any]], path: storage.PathLike) -> LayerLoad:
    """The lines of one layer as one."""
    tasks = [(name, task) for row in rows for name, task in (row.get("by_task") or {}).items()]
    lengths = {len(load) for load in (*(row["load"] for row in rows), *(task["load"] for _, task in tasks))}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(describe("Lines of one layer are of other numbers of experts",
                                  where=f"{path}: {layer}", got=sorted(lengths),
                                  cure="the file is damaged: fetch or write it again"))
    weights = np.asarray([max(row["tokens"], 0.0) for row in rows], np.float64)
    weights = weights / weights.sum() if weights.sum() else np.full(len(rows), 1 / len(rows))
    by_task: dict[str, np.ndarray] = {}
    for name, task in tasks:
        by_task[name] = by_task.get(name, 0.0) + max(task["choices"], 0.0) * np.asarray(task["load"])
    return LayerLoad(
        layer, (rows[0]["step"] - rows[0]["steps"] + 1, rows[-1]["step"]),
        weights @ np.asarray([row["load"] for row in rows], np.float64),
        {name: float(weights @ np.asarray([row[name] for row in rows], np.float64)) for name in MEANS},
        by_task)


def rounded(shares: np.ndarray) -> list[float]:
    """Shares f64[E] with `DIGITS` decimals."""
    return np.round(shares, DIGITS).tolist()


def mutual_information(counts: np.ndarray | Sequence[Sequence[float]]) -> float:
    """Mutual information of row and column in nats, from joint counts f64[M, E]; 0 without any.

    0 if each task's choices spread like all others', at most ``min(log M, log E)``.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.sum():
        return 0.0
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return max(0.0, float(np.sum(joint[seen] * np.log(joint[seen] / apart[seen]))))
