"""Evaluation results on disk: one row for each (expert, task, metric), and the predictions behind it."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe, in_short
from elm_jax.evaluation.evaluation_settings import KNOWN_METRICS, PRIMARY
from elm_jax.evaluation.intervals import mean_with_interval
from elm_jax.evaluation.script_words import is_plain
from elm_jax.runtime import hosts, leftovers, locks, records, storage

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 3
"""Since 3 a row names its interval, ROUGE-L knows all scripts, and each of several right answers has its
credit; since 2 it holds ``num_cut`` and ``source_length``, and a ranked prediction ``label``."""
READABLE_VERSIONS = (1, 2, SCHEMA_VERSION)
"""Versions that reports read; a run computes rows of version 1 again, and those of 2 whose value changes."""


PREDICTIONS = "predictions"
KEPT_PROMPTS = 50
"""Rows of a task, the first by index, whose prompts are kept beside the predictions."""


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """Fields of a line of ``results.jsonl``; those with a default came with later versions."""

    schema_version: int
    expert: str
    task: str
    split: str
    metric: str
    value: float
    num_instances: int
    ci95_low: float
    ci95_high: float
    dataset: str
    chance: float | None
    settings: str
    max_rows: int | None = None
    num_cut: int | None = None
    interval: str = ""
    choice_score: str = ""
    top_answer_share: float | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Fields of a line of predictions: of a ranked task `scores` and what follows, else its metrics."""

    index: int
    prediction: str
    target: str
    correct: float = 0.0
    scores: list[float] = dataclasses.field(default_factory=list)
    label: int = -1
    place: int = 0
    credits: list[float] = dataclasses.field(default_factory=list)
    right: list[str] = dataclasses.field(default_factory=list)
    references: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """Fields of a line of prompts."""

    index: int
    prompt: str


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Result of one expert on one task.

    Attributes:
        rows: one a metric, as ``results.jsonl`` holds them.
        predictions: one an instance, in the order of their indices.
        prompts: ``index`` and ``prompt`` of the first `KEPT_PROMPTS` instances, the same for all experts.
    """

    rows: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    prompts: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class ResultsStore:
    """A folder of results; results in it are not computed again.

    Files: ``results.jsonl`` (appended to; of equal keys the newest row counts) and
    ``predictions/<expert>/<task>.<split>.jsonl``, written whole before its row;
    ``prompts/<task>.<split>.jsonl`` has the prompts of a task's first rows. Several processes may append
    at once: each keeps ``predictions/`` while it does, and reads first what the others have appended.

    Attributes:
        folder: of the results.
        path: of the rows.
    """

    def __init__(self, folder: storage.PathLike, file_name: str = "results.jsonl") -> None:
        """Reads the existing rows; a half-written last line is dropped.

        Raises:
            InputError: a line is not a result row of this schema version.
        """
        self.folder = storage.as_path(folder)
        self.path = self.folder / file_name
        self._rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self._metrics: set[str] = set()
        self._end = self._lines = 0  # of what was read of the file: bytes and lines, all whole
        self._added: list[dict[str, Any]] = []  # by other processes since
        self.refresh()
        self._added = []

    def refresh(self) -> None:
        """Reads the rows that other processes have appended since.

        Raises:
            InputError: a line is not a result row of this schema version.
        """
        size = self.path.stat().length if self.path.exists() else 0
        if size == self._end:
            return
        known = (self._end, self._lines) if size > self._end else (0, 0)
        rows, self._end, self._lines = storage.read_jsonl_behind(self.path, *known)
        for number, row in enumerate(rows, start=known[1] + 1):
            _check_row(row, f"{self.path}, line {number}")
            self._remember(row)
        self._added += rows

    def clear_leftovers(self) -> None:
        """Removes what killed processes left half written beside the predictions."""
        if storage.is_local(self.folder) and (self.folder / "predictions").is_dir():
            for folder in (self.folder, *(self.folder / "predictions").iterdir()):
                leftovers.clear(str(folder))

    def rows(self) -> list[dict[str, Any]]:
        """The newest row of every (expert, task, split, metric), in the order of first writing."""
        return list(self._rows.values())

    def rows_of(self, expert: str, task: str, split: str) -> list[dict[str, Any]]:
        """The newest rows of an expert on a task, one for each metric, that of the task's kind first."""
        order = sorted(self._metrics, key=lambda metric: (metric not in PRIMARY.values(), metric))
        found = (self._rows.get((expert, task, split, metric)) for metric in order)
        return [row for row in found if row is not None]

    def done(self, expert: str, task: str, split: str, digest: str, *, metrics: Sequence[str] = (),
             several_right: bool = False) -> bool:
        """Whether the newest rows of an expert on a task hold for this digest of settings.

        Args:
            expert: id.
            task: name.
            split: of the task.
            digest: of the settings.
            metrics: that are wanted beside that of the task's kind; those of the other kind do not count.
            several_right: whether several choices of a row may be right, which older versions did not credit.
        """
        rows = [row for row in self.rows_of(expert, task, split) if row["settings"] == digest]
        kinds = [kind for kind, metric in PRIMARY.items() if any(row["metric"] == metric for row in rows)]
        if not kinds or not self._predictions_path(expert, task, split).exists():
            return False
        wanted = {PRIMARY[kinds[0]], *(name for name in metrics if name in KNOWN_METRICS[kinds[0]])}
        return wanted <= {row["metric"] for row in rows if self._holds(row, several_right)}

    def _holds(self, row: Mapping[str, Any], several_right: bool) -> bool:
        """Whether a row has the value that it would have now."""
        if row["schema_version"] == SCHEMA_VERSION:
            return True
        if row["schema_version"] < 2 or several_right:
            return False
        return row["metric"] != "rouge_l" or all(
            is_plain(found["prediction"]) and is_plain(found["target"])
            for found in self.predictions(row["expert"], row["task"], row["split"]))

    def with_interval(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the interval that it would have now: older versions had some beyond 0 and 1."""
        if "interval" in row or row["metric"] not in PRIMARY.values():
            return row
        if not self._predictions_path(row["expert"], row["task"], row["split"]).exists():
            return row
        found = mean_with_interval(self.values(row["expert"], row["task"], row["split"]))
        return {**row, "ci95_low": found.low, "ci95_high": found.high}

    def append(self, result: TaskResult) -> None:
        """Writes the predictions whole, then the rows; not those that another process has added meanwhile.

        Raises:
            InputError: another process has added results meanwhile that these would displace.
        """
        row, rows = result.rows[0], result.rows
        path = self._predictions_path(row["expert"], row["task"], row["split"])
        with kept_results(self.folder):
            if hosts.is_first():
                self.refresh()
                for other in self._added:
                    _check_alike(row, other, self.path)
                rows = _not_there(rows, self._rows, self._added) if path.exists() else rows
            if rows:
                self._keep_prompts(row["task"], row["split"], result.prompts)
                storage.write_text(path, _lines(result.predictions))
                storage.append_jsonl(self.path, rows)
                for one in rows:
                    self._remember(one)
                if hosts.is_first():
                    self._end, self._lines = self.path.stat().length, self._lines + len(rows)

    def _keep_prompts(self, task: str, split: str, prompts: Sequence[Mapping[str, Any]]) -> None:
        known = self.prompts(task, split)
        if any(one["index"] not in known for one in prompts):
            storage.write_text(self._prompts_path(task, split), _lines(prompts))

    def predictions(self, expert: str, task: str, split: str = "validation") -> list[dict[str, Any]]:
        """All predictions of one expert on one task, in the order of the instances' indices.

        Raises:
            InputError: there are none, or the file is damaged.
        """
        path = self._predictions_path(expert, task, split)
        if not path.exists():
            raise InputError(describe("There are no predictions of this expert on this task",
                                      where=path, cure="evaluate it"))
        found = records.read_records(path, Prediction, kind="prediction")
        for number, row in enumerate(found, start=1):
            _check_prediction(row, found[0], f"{path}, line {number}")
        counts = {row["num_instances"] for row in self.rows_of(expert, task, split)
                  if row["metric"] in PRIMARY.values()}
        if not found or (counts and len(found) not in counts):
            raise InputError(describe(
                "The file holds other predictions than its result is of",
                where=f"{path}, and num_instances in {self.path}",
                got=f"{len(found)} lines", cure="evaluate it again",
                expected=" or ".join(map(str, sorted(counts))) or "at least one"))
        return found

    def has_predictions(self, expert: str, task: str, split: str) -> bool:
        """Whether predictions of one expert on one task are kept here."""
        return self._predictions_path(expert, task, split).exists()

    def prompts(self, task: str, split: str) -> dict[int, str]:
        """Prompts of a task's first rows by their index; none in results of older versions.

        Raises:
            InputError: the file is damaged.
        """
        rows = records.read_records(self._prompts_path(task, split), PromptRow, kind="prompt")
        return {one["index"]: one["prompt"] for one in rows}

    def values(self, expert: str, task: str, split: str = "validation") -> np.ndarray:
        """Per-instance values f64[n] in order of the indices: credit for accuracy, ROUGE-L for generation."""
        return np.asarray([one["correct"] if "correct" in one else one["rouge_l"]
                           for one in self.predictions(expert, task, split)], np.float64)

    def _remember(self, row: dict[str, Any]) -> None:
        self._rows[_key(row)] = row
        self._metrics.add(row["metric"])

    def _predictions_path(self, expert: str, task: str, split: str) -> epath.Path:
        storage.require_name(expert, self.path, "name of the expert of a result")
        return self.folder / PREDICTIONS / expert / _task_file(task, split, self.path)

    def _prompts_path(self, task: str, split: str) -> epath.Path:
        return self.folder / "prompts" / _task_file(task, split, self.path)


def _task_file(task: str, split: str, where: epath.Path) -> str:
    """Name of a file of one split of a task, each part of which must be a name alone."""
    for what, name in (("task", task), ("split", split)):
        storage.require_name(name, where, f"name of the {what} of a result")
    return f"{task}.{split}.jsonl"


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def kept_results(folder: storage.PathLike) -> Iterator[None]:
    """Keeps a folder of results for this block: its rows, predictions and reports; waits for those before."""
    with locks.alone(storage.as_path(folder) / PREDICTIONS, locks.CHANGE_SECONDS):
        yield


_SAME = ("settings", "model", "schema_version")
"""Fields of a row that say what was scored, and how, beside its key."""


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["expert"], row["task"], row["split"], row["metric"]


def _not_there(rows: Sequence[dict[str, Any]], newest: Mapping[tuple[str, str, str, str], dict[str, Any]],
               added: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are not among the newest; says which of these another process has added meanwhile."""
    kept, told = [], []
    for row in rows:
        there = newest.get(_key(row))
        if there is None or any(there.get(name) != row.get(name) for name in _SAME):
            kept.append(row)
        elif there in added:
            told.append(f"{row['metric']} {there['value']}" + (
                f", {row['value']} here" if there["value"] != row["value"] else ", as here"))
    if told:
        logger.warning("another process has scored %s on %s meanwhile, and its rows stay: %s",
                       rows[0]["expert"], rows[0]["task"], "; ".join(told))
    return kept


def _check_alike(row: dict[str, Any], other: dict[str, Any], where: epath.Path) -> None:
    """Raises InputError if a row that another process has added would be lost behind this one."""
    if row["expert"] != other["expert"]:
        return
    for name, what, default in (("model", "of another model of the same id", None),
                                ("choice_score", "with choices scored in another way", "sum")):
        if name == "choice_score" and not row["metric"] == other["metric"] == "accuracy":
            continue
        found, wanted = other.get(name, default), row.get(name, default)
        if found != wanted:
            raise InputError(describe(
                f"Another process has added results {what} meanwhile, which would be lost",
                where=f"{row['expert']} in {where}", got=found, expected=wanted,
                cure="write these results into another folder"))


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises InputError unless a line of results is one of a version that is read."""
    found = row.get("schema_version")
    if found not in READABLE_VERSIONS:
        raise InputError(describe(
            "A result row has a schema version that this program does not read",
            where=f"{where}: schema_version", got=in_short(found),
            expected=" or ".join(map(str, READABLE_VERSIONS)), cure="write the results into another folder"))
    records.check_record(row, ResultRow, kind="result", where=where)
    for what in ("expert", "task", "split"):  # predictions are kept by them
        storage.require_name(row[what], where, f"{what} of a result")


def _check_prediction(row: Mapping[str, Any], first: Mapping[str, Any], where: str) -> None:
    """Raises InputError unless the fields of a prediction fit each other, and its file's first row."""
    value = "correct" if {"scores", "correct"} & first.keys() else "rouge_l"
    count = len(row.get("scores", ()))
    credits = row.get("credits", [1.0] * count)
    wrong = [name for name, fits in (
        ("index", row["index"] >= 0),
        (value, _is_share(row.get(value))),
        ("scores", ("scores" in row) == ("scores" in first) and (count > 0 or "scores" not in row)),
        ("label", -1 <= row.get("label", -1) < max(count, 1)),
        ("place", 0 <= row.get("place", 0) < max(count, 1)),
        ("credits", len(credits) == count and all(map(_is_share, credits))),
        ("right", "credits" not in row or len(row.get("right", ())) == sum(map(bool, credits))),
    ) if not fits]
    if wrong:
        raise records.wrong_field("The prediction's fields do not fit each other", where, (wrong[0],),
                                  in_short(row.get(wrong[0])), "as `elm evaluate` writes it")


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1
