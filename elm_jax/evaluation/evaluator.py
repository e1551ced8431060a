"""One expert on one task: batches in length buckets, scores or generations, rows with intervals."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elm_jax import sharding
from elm_jax.data.batches import make_choice_batch, pad, trim
from elm_jax.data.prepared import PreparedSplit
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import InputError, describe
from elm_jax.evaluation import metrics, rank
from elm_jax.evaluation.results import SCHEMA_VERSION, ResultsStore, TaskResult
from elm_jax.models.decode import greedy
from elm_jax.models.t5 import T5Network
from elm_jax.types import Params

__all__ = ["EvaluationSettings", "ResultsStore", "TaskResult", "evaluate_task"]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How instances become batches.

    Attributes:
        source_length: tokens of an input; longer ones are cut there, EOS kept.
        max_new_tokens: of a generation, EOS included.
        tokens_per_batch: most input tokens, and most choice tokens, of one batch a device.
        smallest_source: shortest length bucket of inputs; the others are its doubles.
        smallest_target: shortest length bucket of choices; the others are its doubles.
    """

    source_length: int = 512
    max_new_tokens: int = 128
    tokens_per_batch: int = 8192
    smallest_source: int = 64
    smallest_target: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise InputError(describe("Evaluation setting is wrong", where=field.name,
                                          got=repr(value), expected="an integer above 0"))

    def digest(self, max_rows: int | None) -> str:
        """Hash of what can change a number: not of buckets and batch sizes, which cannot."""
        facts = [self.source_length, self.max_new_tokens, max_rows]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of one batch: B instances of S tokens, C choices of T tokens (0 in a generation)."""

    rows: int
    source: int
    choices: int
    target: int


def evaluate_task(
    network: T5Network, params: Params, split: PreparedSplit, *, settings: EvaluationSettings,
    vocabulary: Vocabulary, mesh: Mesh, expert: str, base: str, max_rows: int | None = None,
    model: str | None = None,
) -> TaskResult:
    """Scores one model on one task.

    Args:
        network: static.
        params: on the mesh.
        split: the task's prepared rows.
        settings: lengths and budgets.
        vocabulary: turns generations into text.
        mesh: instances are split over its data axis.
        expert: id, for the row.
        base: fingerprint of the base, for the row.
        max_rows: with which the split was prepared, for the row.
        model: fingerprint of what was scored, for the row.

    Returns:
        A row and the predictions, in the order of the split, whatever the batches were.
    """
    start = time.monotonic()
    run = _rank if split.kind == "rank" else _generate
    predictions = run(network, params, split, settings, vocabulary, mesh)
    ranked = split.kind == "rank"
    values = [prediction["correct" if ranked else "rouge_l"] for prediction in predictions]
    low, high = (metrics.wilson_interval(sum(values), len(values)) if ranked
                 else metrics.mean_interval(values))
    chance = float(np.mean([1 / len(p["scores"]) for p in predictions])) if ranked else None
    dataset = "/".join(part for part in (split.info["dataset"], split.info.get("config")) if part)
    row = {
        "schema_version": SCHEMA_VERSION, "expert": expert, "base": base, "model": model,
        "task": split.name, "dataset": dataset, "template": split.info["template"],
        "split": split.split, "metric": "accuracy" if ranked else "rouge_l",
        "value": float(np.mean(values)), "num_instances": len(values), "ci95_low": low,
        "ci95_high": high, "chance": chance, "seconds": time.monotonic() - start,
        "settings": settings.digest(max_rows), "max_rows": max_rows}
    return TaskResult([row], predictions)


def _rank(network: T5Network, params: Params, split: PreparedSplit, settings: EvaluationSettings,
          vocabulary: Vocabulary, mesh: Mesh) -> list[dict[str, Any]]:
    del vocabulary  # choices are known as text
    choices = [split.choices(index) for index in range(len(split))]
    found: dict[int, dict[str, Any]] = {}
    for shape, rows in plan_batches(split, choices, settings, mesh.shape["data"]):
        batch = make_choice_batch(
            [split.inputs(row) for row in rows], [choices[row] for row in rows],
            source_length=shape.source, target_length=shape.target, num_choices=shape.choices,
            batch_size=shape.rows)
        placed = sharding.put_batch({name: batch[name] for name in ("inputs", "choices")}, mesh)
        scores = np.asarray(rank.score_choices(network, params, placed["inputs"], placed["choices"]))
        best = rank.predict(scores, np.asarray(batch["choice_mask"]))
        for line, row in enumerate(rows):
            text = split.text(row)
            found[row] = {
                "index": text["index"], "prediction": text["choices"][best[line]],
                "target": text["targets"], "correct": int(best[line] == split.label(row)),
                "scores": [round(float(score), 5) for score in scores[line, :len(choices[row])]]}
    return [found[row] for row in range(len(split))]


def _generate(network: T5Network, params: Params, split: PreparedSplit, settings: EvaluationSettings,
              vocabulary: Vocabulary, mesh: Mesh) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for shape, rows in plan_batches(split, None, settings, mesh.shape["data"]):
        inputs = [trim(split.inputs(row), shape.source) for row in rows]
        inputs += [np.ones(1, np.int32)] * (shape.rows - len(rows))
        placed = sharding.put_batch({"inputs": pad(inputs, shape.source)}, mesh)
        tokens = np.asarray(greedy(network, params, placed["inputs"], max_length=settings.max_new_tokens))
        for line, row in enumerate(rows):
            text = split.text(row)
            prediction = vocabulary.decode([int(token) for token in tokens[line]])
            found[row] = {"index": text["index"], "prediction": prediction, "target": text["targets"],
                          "rouge_l": metrics.rouge_l(prediction, text["targets"])}
    return [found[row] for row in range(len(split))]


def plan_batches(
    split: PreparedSplit, choices: Sequence[Sequence[np.ndarray]] | None,
    settings: EvaluationSettings, data_axis: int,
) -> Iterator[tuple[Shape, list[int]]]:
    """Groups rows by the shape of their bucket, so that a run meets a handful of shapes.

    Lengths and numbers of choices go up in powers of two. The number of rows of a shape follows from
    the token budget: it is a multiple of the mesh's data axis.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row in range(len(split)):
        source = min(_bucket(len(split.inputs(row)), settings.smallest_source), settings.source_length)
        number, target = 0, 0
        if choices is not None:
            number = _bucket(len(choices[row]), 2)
            target = _bucket(max(len(choice) for choice in choices[row]), settings.smallest_target)
        groups.setdefault((source, number, target), []).append(row)
    for (source, number, target), rows in sorted(groups.items()):
        largest = max(source, number * target, 1)
        size = max(1, settings.tokens_per_batch // largest) * data_axis
        shape = Shape(size, source, number, target)
        for start in range(0, len(rows), size):
            yield shape, rows[start:start + size]


def _bucket(length: int, smallest: int) -> int:
    bucket = smallest
    while bucket < length:
        bucket *= 2
    return bucket


def compiled_programs() -> int:
    """How many scoring and decoding programs this process holds."""
    return rank.score_choices._cache_size() + greedy._cache_size()


