"""Evaluates one model on one task: scores or generations of its instances, a result row."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.batches import padded
from elm_jax.data.arrays.prepared import LEFT, PLAIN, PreparedSplit
from elm_jax.data.arrays.prompt_rows import count_cut, rendering_in
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.errors import RunError, describe
from elm_jax.evaluation import greedy_texts, rank, task_metrics
from elm_jax.evaluation.answers import read_answers
from elm_jax.evaluation.batch_plan import TaskInstances, plan_batches
from elm_jax.evaluation.evaluation_settings import EvaluationSettings, wanted_metrics
from elm_jax.evaluation.results import KEPT_PROMPTS, SCHEMA_VERSION, ResultsStore, TaskResult
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, sharding
from elm_jax.training.trunk.trunk_cache import TrunkCache
from elm_jax.types import Batch, Params
from elm_jax.vocabularies.vocabulary import Vocabulary

__all__ = ["EvaluationSettings", "ResultsStore", "Scoring", "TaskResult", "evaluate_task"]

SCORE_DIGITS = 6
INTERVAL = "wilson"
"""Kind of every interval of a score (`intervals`), in results."""


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
        InputError: the split has no rows, or a row that cannot be scored (see `TaskInstances.of`).
        RunError: scores are not numbers.
    """
    start = time.monotonic()
    instances = TaskInstances.of(split, network, scoring.settings)
    score = _rank if split.kind == "rank" else _generate
    predictions = score(network, params, instances, scoring)
    return task_result(instances, predictions, scoring, expert, seconds=time.monotonic() - start)


def task_result(instances: TaskInstances, predictions: list[dict[str, Any]], scoring: Scoring, expert: str, *,
                seconds: float) -> TaskResult:
    """Makes the result row of one model on one task from its predictions."""
    split, settings = instances.split, scoring.settings
    rendering = rendering_in(split)
    ranked = split.kind == "rank"
    in_order = sorted(((split.text(row), row) for row in range(len(split))), key=lambda one: one[0]["index"])
    chance = _chance(split, [row for _, row in in_order]) if ranked else None
    facts = {
        "schema_version": SCHEMA_VERSION, "expert": expert, "base": scoring.base, "task": split.name,
        "dataset": dataset_path(split.info["dataset"], split.info.get("config")),
        "template": split.info["template"], "split": split.split,
    }
    how = {
        "chance": chance, "seconds": seconds,
        "settings": settings.digest(scoring.max_rows, cut_prompt=split.cut_prompt, rendering=rendering),
        "max_rows": scoring.max_rows, "source_length": settings.source_length,
        "num_cut": count_cut(split, instances.form, settings.source_length),
        "top_answer_share": read_answers(predictions).top_share[0],
        **({"cut_prompt": LEFT} if split.cut_prompt == LEFT else {}),
        **({"rendering": rendering} if rendering != PLAIN else {}),
    }
    rows = []
    for metric in metrics_of(split, settings):
        estimate, own = task_metrics.estimate(metric, predictions)
        if metric == "accuracy" and settings.choice_score != "sum":
            own = {**own, "choice_score": settings.choice_score}
        rows.append({**facts, "metric": metric, "value": estimate.value, "num_instances": estimate.n,
                     "ci95_low": estimate.low, "ci95_high": estimate.high, "interval": INTERVAL, **how,
                     **own})
    # For whoever looks at the answers.
    prompts = [{"index": text["index"], "prompt": text["inputs"]} for text, _ in in_order[:KEPT_PROMPTS]]
    return TaskResult(rows, predictions, prompts)


def _chance(split: PreparedSplit, rows: list[int]) -> float:
    """Expected accuracy of guessing: the mean credit of a choice, averaged over the rows in this order."""
    return float(np.mean([float(np.mean(split.credits(row))) for row in rows]))


def metrics_of(split: PreparedSplit, settings: EvaluationSettings) -> tuple[str, ...]:
    """Names of the metrics of a split's task, see `wanted_metrics`."""
    return wanted_metrics(split.kind, split.info.get("metrics", ()), settings.metrics, split.name)


def _rank(network: Network, params: Params, instances: TaskInstances, scoring: Scoring
          ) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shape, numbers in plan_batches(instances, scoring.settings, scoring.mesh.shape["data"]):
        batch = scoring.with_states(instances.batch(shape, numbers))
        placed = sharding.put_batch(batch, scoring.mesh)
        scores = rank.score_choices(network, params, padded(placed, "inputs"), padded(placed, "choices"))
        found += ranked_rows(instances, numbers, hosts.whole(scores), scoring.settings)
    return in_order(found)


def ranked_rows(instances: TaskInstances, numbers: Sequence[int], scores: np.ndarray,
                settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Turns log-probabilities f32[B, C] of a batch's choices into predictions.

    Args:
        instances: of a split.
        numbers: of the batch's rows.
        scores: f32[B, C], sums over a choice's tokens; B may be larger than the number of rows.
        settings: say which score of a choice decides, and what else to score by.

    Raises:
        RunError: scores are not numbers.
    """
    split, choices, sums = instances.split, instances.choices, scores[:len(numbers)]
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


def _generate(network: Network, params: Params, instances: TaskInstances, scoring: Scoring
              ) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shape, numbers in plan_batches(instances, scoring.settings, scoring.mesh.shape["data"]):
        batch = scoring.with_states(instances.batch(shape, numbers))
        placed = sharding.put_batch(batch, scoring.mesh)
        texts = greedy_texts.generate(
            network, params, padded(placed, "inputs"), max_new_tokens=scoring.settings.max_new_tokens,
            vocabulary=scoring.vocabulary)
        found += generated_rows(instances.split, numbers, texts, scoring.settings)
    return in_order(found)


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
