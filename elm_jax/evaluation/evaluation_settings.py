"""Settings of an evaluation: lengths, buckets and batch sizes. Imports nothing that computes."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from elm_jax.errors import InputError, describe, unknown_name

CHOICE_TOKEN_COST = 4
"""Cost of a choice's token in the token budget: its logits are as long as the vocabulary."""
CHOICE_SCORES = ("sum", "mean")
"""A choice's score: the sum of its tokens' log-probabilities, or their mean."""
PRIMARY = {"rank": "accuracy", "generation": "rouge_l"}
"""The metric that every task of a kind has, and that reports are made of."""
KNOWN_METRICS = {"rank": ("accuracy", "acc_norm", "acc_norm_tokens"),
           "generation": ("rouge_l", "exact_match", "squad_em", "squad_f1", "bleu")}
"""Names of all metrics, by kind of task (`task_metrics` says what they are)."""
MORE_METRICS = tuple(name for kind, names in KNOWN_METRICS.items() for name in names if name != PRIMARY[kind])
"""Metrics that are scored by only where a task names them, or they are asked for."""


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Settings that turn instances into batches: lengths, buckets and the budget of tokens.

    Attributes:
        source_length: tokens of an input; longer ones are cut there, EOS kept.
        max_new_tokens: of a generation, EOS included.
        tokens_per_batch: most input tokens of one batch on one part of the mesh's data axis; a
            choice's token counts as `CHOICE_TOKEN_COST` of them. A batch has at least one instance.
        source_buckets: row lengths of inputs, rising; those above `source_length` are not used.
        target_buckets: row lengths of choices, rising; a longer choice, which is never cut, gets
            the next power of two.
        few_shot: exemplars that were put before each input.
        choice_score: 'sum' of a choice's log-probabilities, end token included, or their 'mean'.
        metrics: to score by beside those that a task has; of the other kind of tasks they are left out.
    """

    source_length: int = 512
    max_new_tokens: int = 128
    tokens_per_batch: int = 8192
    source_buckets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    target_buckets: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    few_shot: int = 0
    choice_score: str = "sum"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("source_length", "max_new_tokens", "tokens_per_batch"):
            if not _is_count(getattr(self, name)):
                raise InputError(describe("Evaluation setting is wrong", where=name,
                                          got=repr(getattr(self, name)),
                                          expected="an integer above 0"))
        for name in ("source_buckets", "target_buckets"):
            buckets = tuple(getattr(self, name))
            rising = all(map(_is_count, buckets)) and list(buckets) == sorted(set(buckets))
            if not buckets or not rising:
                raise InputError(describe("Evaluation setting is wrong", where=name, got=buckets,
                                          expected="rising integers above 0"))
            object.__setattr__(self, name, buckets)  # gin gives lists, which cannot be hashed
        check_metrics(self.metrics, "metrics")
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if self.choice_score not in CHOICE_SCORES:
            raise unknown_name("score of a choice", str(self.choice_score), CHOICE_SCORES,
                               where="choice_score")

    def digest(self, max_rows: int | None, mixed: bool = False, cut_prompt: str = "right",
               rendering: str = "plain") -> str:
        """Hash of all settings that can change a number; buckets and batch sizes cannot.

        Args:
            max_rows: of each task that are scored; None for all.
            mixed: whether each row is scored by an expert of its own.
            cut_prompt: the side on which the task cuts prompts that are too long.
            rendering: of the inputs, one of `prepared.RENDERINGS`.
        """
        facts = [self.source_length, self.max_new_tokens, max_rows]
        facts += [self.few_shot] if self.few_shot else []  # results without exemplars keep their digest
        facts += ["mixed"] if mixed else []
        facts += [self.choice_score] if self.choice_score != "sum" else []
        facts += [f"cut on the {cut_prompt}"] if cut_prompt != "right" else []
        facts += [f"rendered as {rendering}"] if rendering != "plain" else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def check_metrics(names: Iterable[str], where: str, kind: str | None = None) -> None:
    """Raises InputError for a metric that does not exist, or not for this kind of task."""
    known = [name for one, own in KNOWN_METRICS.items() for name in own if kind in (None, one)]
    if isinstance(names, str):
        raise InputError(describe("Metrics are a list of names", where=where, got=repr(names)))
    for name in names:
        if name not in known:
            what = "metric" if kind is None else f"metric of a {kind} task"
            raise unknown_name(what, str(name), known, where=where)


def wanted_metrics(kind: str, own: Iterable[str], asked: Iterable[str], where: str) -> tuple[str, ...]:
    """Names of the metrics that a task is scored by, the one of its kind first.

    Args:
        kind: of the task.
        own: that the task names.
        asked: of all tasks; those of the other kind are left out.
        where: the task, for errors.

    Raises:
        InputError: the task names a metric that is none of its kind.
    """
    check_metrics(own, where, kind)
    fitting = [name for name in asked if name in KNOWN_METRICS[kind]]
    return tuple(dict.fromkeys([PRIMARY[kind], *own, *fitting]))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
