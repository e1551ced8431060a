"""Scores of a study of arms: rank accuracy and the targets' loss in nats a token, row by row.

A choice's score is the sum of its tokens' log-probabilities, so the loss of the right one costs nothing more.
Of a task whose answers are generated the target is the only choice: it has a loss and no accuracy.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.evaluation.evaluator import ResultsStore, Scoring, TaskResult, evaluate_task
from elm_jax.evaluation.intervals import Z95
from elm_jax.models.network import Network
from elm_jax.runtime import sharding
from elm_jax.types import Params
from elm_jax.workflows.arms.arm_runs import Target
from elm_jax.workflows.arms.arm_settings import ArmStudySettings
from elm_jax.workflows.arms.cut_rows import HELDOUT, RowCuts
from elm_jax.workflows.train import run_record

Load = Callable[[], tuple[Network, Params]]
"""Gives a model's network and parameters."""
TARGET_LOSS = "target_loss"
"""Metric: mean over rows of the target's loss in nats a token, its end token included."""


def as_only_choice(split: PreparedSplit) -> PreparedSplit:
    """A split whose rows have their target as the only choice, to be scored by rank."""
    def rows() -> Any:
        for row in range(len(split)):
            text = {name: value for name, value in split.text(row).items() if name in ("inputs", "index")}
            target = split.text(row)["targets"]
            yield {"inputs": split.inputs(row), "targets": split.targets(row), "label": 0,
                   "choices": [split.targets(row)], "text": {**text, "targets": target, "choices": [target]}}

    return PreparedSplit.from_rows(split.name, split.split, {**split.info, "kind": "rank", "metrics": []},
                                   rows())


def score_rows(network: Network, params: Params, split: PreparedSplit, scoring: Scoring, model: str
               ) -> TaskResult:
    """Scores one model on one task: result rows of accuracy (if it ranks) and of the targets' loss."""
    ranks = split.kind == "rank"
    shown = dataclasses.replace(split, info={**split.info, "metrics": []}) if ranks else as_only_choice(split)
    found = evaluate_task(network, params, shown, scoring, model)
    tokens = {shown.text(row)["index"]: len(shown.choices(row)[shown.label(row)])
              for row in range(len(shown)) if shown.label(row) >= 0}
    predictions = []
    for one in found.predictions:
        count = tokens.get(one["index"])
        loss = None if count is None else round(-one["scores"][one["label"]] / count, 6)
        predictions.append({**one, "target_loss": loss})
    row = _loss_row(found.rows[0], [one["target_loss"] for one in predictions])
    return TaskResult([*(found.rows if ranks else ()), row], predictions, found.prompts)


def _loss_row(row: Mapping[str, Any], losses: list[float | None]) -> dict[str, Any]:
    known = np.asarray([loss for loss in losses if loss is not None], np.float64)
    mean = float(known.mean()) if len(known) else 0.0
    half = Z95 * float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return {**row, "metric": TARGET_LOSS, "value": mean, "chance": None, "num_instances": len(losses),
            "ci95_low": mean - half, "ci95_high": mean + half, "interval": "normal"}


class Scorer:
    """Scores the models of one study into its store.

    Args:
        config: of the study.
        cuts: the rows, the held-out ones too.
        store: of the results.
        mesh: on which models are scored.
    """

    def __init__(self, config: ArmStudySettings, cuts: RowCuts, store: ResultsStore, mesh: Mesh) -> None:
        self.config, self.cuts, self.store, self.mesh = config, cuts, store, mesh
        self._splits: dict[Target, PreparedSplit] = {}
        self._with_exemplars: dict[int, TaskData] = {0: cuts.data}

    def settings(self, few_shot: int) -> EvaluationSettings:
        """Lengths and buckets."""
        return EvaluationSettings(
            source_length=self.config.eval_source_length, tokens_per_batch=4096, few_shot=few_shot,
            source_buckets=self.config.source_buckets, target_buckets=self.config.target_buckets)

    def split_of(self, target: Target) -> PreparedSplit:
        """The rows of a target."""
        if target not in self._splits:
            self._splits[target] = self._read(target)
        return self._splits[target]

    def _read(self, target: Target) -> PreparedSplit:
        if target.heldout:
            return self.cuts.heldout_split(target.task)
        data = self._with_exemplars.setdefault(target.few_shot, dataclasses.replace(
            self.cuts.data, few_shot=target.few_shot, few_shot_length=self.config.eval_source_length))
        return data.split(target.task, data.evaluation_split(target.task), self.config.max_eval_rows)

    def stamp(self, target: Target, digest: str) -> str:
        """Hash of a model's digest and of how a target is scored; a result of another one is scored again."""
        return run_record.digest([digest, self.settings(target.few_shot).digest(self.config.max_eval_rows),
                                  self.config.heldout_rows if target.heldout else None])

    def is_done(self, model: str, target: Target, digest: str) -> bool:
        """Whether the store has the score of a model of this digest on a target."""
        split = HELDOUT if target.heldout else self.cuts.data.evaluation_split(target.task)
        return any(row["metric"] == TARGET_LOSS and row.get("model") == self.stamp(target, digest)
                   for row in self.store.rows_of(target.model_of(model), target.task, split))

    def score(self, name: str, digest: str, wanted: Sequence[Target], load: Load,
              columns: Mapping[str, Any]) -> None:
        """Scores a model on targets, and keeps its rows with more columns.

        Args:
            name: of the model.
            digest: of all that it was made of.
            wanted: the targets; those that are done are left out.
            load: gives network and parameters.
            columns: of all rows.
        """
        wanted = [target for target in wanted if not self.is_done(name, target, digest)]
        if not wanted:
            return
        network, params = load()
        params = sharding.put_tree(params, sharding.tree_shardings(
            network.logical_axes(), params, self.mesh))
        for target in wanted:
            stamp = self.stamp(target, digest)
            scoring = Scoring(self.settings(target.few_shot), self.cuts.data.vocabulary, self.mesh, digest,
                              self.config.max_eval_rows)
            result = score_rows(network, params, self.split_of(target), scoring, target.model_of(name))
            more = {**columns, "model": stamp, "few_shot": target.few_shot}
            if target.few_shot:
                split = self.split_of(target)
                more["exemplars"] = split.info["few_shot_taken"] / len(split)
            self.store.append(dataclasses.replace(result, rows=[{**row, **more} for row in result.rows]))
