"""Evaluates one model on one task: batches in length buckets, scores or generations, a result row."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import BatchForm, form_of
from elm_jax.data.arrays.batches import (
    ChoiceShape,
    choose_bucket,
    make_choice_batch,
    pad_prompts,
    padded,
)
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.errors import InputError, RunError, describe
from elm_jax.evaluation import greedy_texts, rank, task_metrics
from elm_jax.evaluation.evaluation_settings import CHOICE_TOKEN_COST, EvaluationSettings, wanted_metrics
from elm_jax.evaluation.results import SCHEMA_VERSION, ResultsStore, TaskResult
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, sharding
from elm_jax.training.trunk.trunk_cache import TrunkCache
from elm_jax.types import Batch, Params
from elm_jax.vocabularies.vocabulary import Vocabulary

__all__ = ["EvaluationSettings", "ResultsStore", "Scoring", "TaskResult", "evaluate_task"]

SMALLEST_CHOICE_BUCKET = 2
SCORE_DIGITS = 6
INTERVAL = "wilson"
"""Kind of every interval of a score (`intervals`), in results."""


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """Shape of one batch: S input tokens, C choices of T tokens (both 0 in a generation), B rows."""

    source: int
    choices: int
    target: int
    rows: int

    def holds(self, other: "BatchShape") -> bool:
        """Whether an instance of the other shape fits into a row of this one."""
        return (self.source >= other.source and self.choices >= other.choices
                and self.target >= other.target)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Settings that all models and tasks of an evaluation share.

    Attributes:
        settings: lengths and budgets.
        vocabulary: turns generations into text.
        mesh: instances are split over its data axis, stacked experts over its expert axis.
        base: fingerprint of the base, for the rows.
        max_rows: with which the splits were prepared, for the rows.
        trunk: cache of the states below the layers that the models change; None computes them for each model.
    """

    settings: EvaluationSettings
    vocabulary: Vocabulary
    mesh: Mesh
    base: str
    max_rows: int | None = None
    trunk: TrunkCache | None = None

    def with_states(self, batch: Batch) -> Batch:
        """Adds the states of a batch's inputs and choices, if there is a cache of them."""
        return batch if self.trunk is None else self.trunk.with_scored_states(batch)


def evaluate_task(network: Network, params: Params, split: PreparedSplit, scoring: Scoring,
                  expert: str) -> TaskResult:
    """Evaluates one model on one task; returns a result row and the predictions.

    Args:
        network: static.
        params: on the mesh.
        split: the task's prepared rows.
        scoring: how.
        expert: id, for the row.

    Returns:
        A row and the predictions, in the order of the instances' indices, whatever the batches were.

    Raises:
        InputError: the split has no rows, or a row to rank has no choices.
        RunError: scores are not numbers.
    """
    start = time.monotonic()
    score = _rank if split.kind == "rank" else _generate
    predictions = score(network, params, split, scoring)
    return task_result(split, predictions, scoring, expert, seconds=time.monotonic() - start)


def task_result(split: PreparedSplit, predictions: list[dict[str, Any]], scoring: Scoring, expert: str, *,
                seconds: float) -> TaskResult:
    """Makes the result row of one model on one task from its predictions."""
    ranked, settings = split.kind == "rank", scoring.settings
    chance = _chance(split) if ranked else None
    facts = {
        "schema_version": SCHEMA_VERSION, "expert": expert, "base": scoring.base, "task": split.name,
        "dataset": dataset_path(split.info["dataset"], split.info.get("config")),
        "template": split.info["template"], "split": split.split,
    }
    how = {
        "chance": chance, "seconds": seconds,
        "settings": settings.digest(scoring.max_rows), "max_rows": scoring.max_rows,
        "source_length": settings.source_length, "num_cut": count_cut(split, settings.source_length),
    }
    rows = []
    for metric in metrics_of(split, settings):
        estimate, own = task_metrics.estimate(metric, predictions)
        if metric == "accuracy" and settings.choice_score != "sum":
            own = {**own, "choice_score": settings.choice_score}
        rows.append({**facts, "metric": metric, "value": estimate.value, "num_instances": estimate.n,
                     "ci95_low": estimate.low, "ci95_high": estimate.high, "interval": INTERVAL, **how,
                     **own})
    return TaskResult(rows, predictions)


def _chance(split: PreparedSplit) -> float:
    """Expected accuracy of guessing: the mean credit of a choice, averaged over the rows."""
    guesses = sorted((split.text(row)["index"], float(np.mean(split.credits(row))))
                     for row in range(len(split)))
    return float(np.mean([guess for _, guess in guesses]))


def metrics_of(split: PreparedSplit, settings: EvaluationSettings) -> tuple[str, ...]:
    """Names of the metrics of a split's task, see `wanted_metrics`."""
    return wanted_metrics(split.kind, split.info.get("metrics", ()), settings.metrics, split.name)


def count_cut(split: PreparedSplit, source_length: int) -> int:
    """Number of rows whose input is longer than `source_length`, so that its end is cut off."""
    return sum(len(split.inputs(number)) > source_length for number in range(len(split)))


def _rank(network: Network, params: Params, split: PreparedSplit, scoring: Scoring
          ) -> list[dict[str, Any]]:
    choices, form = choices_of(split), form_of(network)
    found: list[dict[str, Any]] = []
    for shape, numbers in plan_batches(split, choices, scoring.settings, scoring.mesh.shape["data"]):
        batch = scoring.with_states(choice_batch(split, choices, shape, numbers, form))
        placed = sharding.put_batch(batch, scoring.mesh)
        scores = rank.score_choices(network, params, padded(placed, "inputs"), padded(placed, "choices"))
        found += ranked_rows(split, choices, numbers, hosts.whole(scores), scoring.settings)
    return in_order(found)


def choices_of(split: PreparedSplit) -> list[list[np.ndarray]]:
    """Answer choices of every row, as tokens."""
    return [split.choices(number) for number in range(len(split))]


def choice_batch(split: PreparedSplit, choices: Sequence[Sequence[np.ndarray]], shape: "BatchShape",
                 numbers: Sequence[int], form: BatchForm) -> dict[str, np.ndarray]:
    """Makes the batch of some rows to rank: inputs i32[B, S], choices i32[B, C, T], and their lengths."""
    batch = dict(make_choice_batch(
        [form.prompt(split.inputs(number), shape.source) for number in numbers],
        [choices[number] for number in numbers],
        ChoiceShape(shape.rows, shape.source, shape.choices, shape.target), form.ids.pad))
    del batch["choice_mask"]  # the lengths imply it
    return batch


def ranked_rows(split: PreparedSplit, choices: Sequence[Sequence[np.ndarray]], numbers: Sequence[int],
                scores: np.ndarray, settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Turns log-probabilities f32[B, C] of a batch's choices into predictions.

    Args:
        split: of the rows.
        choices: of every row of the split.
        numbers: of the batch's rows.
        scores: f32[B, C], sums over a choice's tokens; B may be larger than the number of rows.
        settings: say which score of a choice decides, and what else to score by.

    Raises:
        RunError: scores are not numbers.
    """
    sums = scores[:len(numbers)]
    if not np.isfinite(sums).all():
        raise RunError(describe(
            "Scores are not finite", where=f"task {split.name}, {split.split}",
            cure="look at the expert's weights: its training or merging made NaN or infinity"))
    texts, width = [split.text(number) for number in numbers], sums.shape[1]
    lengths = rank.padded_lengths([list(map(len, choices[number])) for number in numbers], width)
    divisors = {
        "accuracy": lengths if settings.choice_score == "mean" else np.ones_like(lengths),
        "acc_norm": rank.padded_lengths([list(map(len, text["choices"])) for text in texts], width),
        "acc_norm_tokens": lengths}
    counts = np.asarray([len(choices[number]) for number in numbers])
    errors = rank.score_errors(sums, lengths)
    places = {metric: rank.predict(sums / divisors[metric], counts, errors / divisors[metric])
              for metric in metrics_of(split, settings)}
    scores = sums / divisors["accuracy"]
    return [_ranked_row(split, number, text, own, {metric: int(best[row]) for metric, best in places.items()})
            for row, (number, text, own) in enumerate(zip(numbers, texts, scores, strict=True))]


def _ranked_row(split: PreparedSplit, number: int, text: dict[str, Any], scores: np.ndarray,
                places: dict[str, int]) -> dict[str, Any]:
    """The prediction of one row: the chosen choice and its credit, by each metric."""
    place, credits = places["accuracy"], split.credits(number)
    found = {
        "index": text["index"], "prediction": text["choices"][place], "place": place,
        "target": text["targets"], "label": split.label(number),
        "correct": _whole(credits[place]),
        "scores": [round(float(score), SCORE_DIGITS) for score in scores[:len(credits)]],
    }
    if "scores" in text:
        found["credits"] = [_whole(credit) for credit in credits]
        found["right"] = [choice for choice, credit in zip(text["choices"], credits, strict=True) if credit]
    more = {metric: _whole(credits[other]) for metric, other in places.items() if metric != "accuracy"}
    return found | more


def _whole(credit: float) -> int | float:
    return int(credit) if credit in (0, 1) else credit


def _generate(network: Network, params: Params, split: PreparedSplit, scoring: Scoring
              ) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shape, numbers in plan_batches(split, None, scoring.settings, scoring.mesh.shape["data"]):
        batch = scoring.with_states(input_rows(split, shape, numbers, form_of(network)))
        placed = sharding.put_batch(batch, scoring.mesh)
        texts = greedy_texts.generate(
            network, params, padded(placed, "inputs"), max_new_tokens=scoring.settings.max_new_tokens,
            vocabulary=scoring.vocabulary)
        found += generated_rows(split, numbers, texts, scoring.settings)
    return in_order(found)


def input_rows(split: PreparedSplit, shape: "BatchShape", numbers: Sequence[int], form: BatchForm
               ) -> dict[str, np.ndarray]:
    """Pads the inputs of some rows for generation: i32[B, S], and their lengths i32[B]."""
    inputs = [form.prompt(split.inputs(number), shape.source) for number in numbers]
    # Copies of a real row, not empty ones: decoding continues until the last row has ended.
    inputs += inputs[:1] * (shape.rows - len(numbers))
    return dict(pad_prompts(inputs, shape.rows, shape.source, form.ids.pad))


def generated_rows(split: PreparedSplit, numbers: Sequence[int], texts: Sequence[str],
                   settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Turns generated texts into predictions; there may be more texts than rows."""
    found, wanted = [], metrics_of(split, settings)
    for number, prediction in zip(numbers, texts, strict=False):
        text = split.text(number)
        references = text.get("references", [])
        found.append({"index": text["index"], "prediction": prediction, "target": text["targets"],
                      **({"references": references} if references else {}),
                      **task_metrics.text_values(wanted, prediction, references or [text["targets"]])})
    return found


def in_order(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts predictions by the index of their instance."""
    return sorted(predictions, key=lambda one: one["index"])


def plan_batches(
    split: PreparedSplit, choices: Sequence[Sequence[np.ndarray]] | None,
    settings: EvaluationSettings, data_axis: int,
) -> Iterator[tuple[BatchShape, list[int]]]:
    """Groups a split's rows into batches of few shapes, shortest inputs first.

    The number of rows of a shape follows from the token budget alone, so a run compiles one program for each
    bucket. Rows left over from a bucket join the half-empty batch of a larger one.

    Args:
        split: whose rows to group.
        choices: of every row; None for a generation.
        settings: buckets and budget.
        data_axis: size of the mesh's data axis, of which the rows are a multiple.

    Yields:
        A shape and at most that many numbers of rows; every row comes once.

    Raises:
        InputError: the split has no rows, or a row to rank has no choices.
    """
    if not len(split):
        raise InputError(describe("There is nothing to evaluate", where=f"{split.name} {split.split}",
                                  got="no rows"))
    groups: dict[BatchShape, list[int]] = {}
    order = sorted(range(len(split)), key=lambda number: (len(split.inputs(number)), number))
    for number in order:
        own = None if choices is None else choices[number]
        if own is not None and not own:
            raise InputError(describe("A row has no choices to rank", got=f"row {number}",
                                      where=f"{split.name} {split.split}"))
        groups.setdefault(_shape_of(len(split.inputs(number)), own, settings, data_axis),
                          []).append(number)
    for shape in sorted(groups):
        left = len(groups[shape]) % shape.rows
        for larger in groups:
            free = -len(groups[larger]) % larger.rows
            if left and larger != shape and larger.holds(shape) and left <= free:
                groups[larger] += groups[shape][-left:]
                del groups[shape][-left:]
                break
    for shape, numbers in sorted(groups.items()):
        for start in range(0, len(numbers), shape.rows):
            yield shape, numbers[start:start + shape.rows]


def _shape_of(length: int, choices: Sequence[np.ndarray] | None, settings: EvaluationSettings,
              data_axis: int) -> BatchShape:
    limit = settings.source_length
    buckets = [bucket for bucket in settings.source_buckets if bucket < limit]
    source = choose_bucket(length, [*buckets, limit], cut=True)
    number = target = 0
    if choices is not None:
        number = _power_of_two(len(choices), SMALLEST_CHOICE_BUCKET)
        longest = max(len(choice) for choice in choices)
        largest = settings.target_buckets[-1]
        target = (choose_bucket(longest, settings.target_buckets) if longest <= largest
                  else _power_of_two(longest, 1))
    tokens = max(source, CHOICE_TOKEN_COST * number * target)
    rows = max(1, settings.tokens_per_batch // tokens) * data_axis
    return BatchShape(source, number, target, rows)


def _power_of_two(value: int, smallest: int) -> int:
    return max(smallest, 1 << (value - 1).bit_length())
