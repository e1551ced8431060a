"""Computed verdicts on claims: a difference with its interval, and the smallest that could have been seen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from elm_jax.evaluation import intervals
from elm_jax.evaluation.intervals import Estimate
from elm_jax.reporting.arms.arm_cells import ACCURACY, TITLES, UNITS

HOLDS, REFUTED, UNSEEN = RESULTS = ("holds", "refuted", "cannot be seen at this size")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the scores say of one claim, that a difference is above zero.

    Attributes:
        claim: in words.
        metric: of the scores.
        estimate: of the difference, over tasks and rows; in the metric's own unit.
        rows_only: the interval of the same tasks' other rows.
        tasks: number of tasks.
    """

    claim: str
    metric: str
    estimate: Estimate
    rows_only: Estimate
    tasks: int

    @property
    def result(self) -> str:
        """One of `RESULTS`: the interval lies above zero, below zero, or on both sides."""
        if self.estimate.low > 0:
            return HOLDS
        return REFUTED if self.estimate.high < 0 else UNSEEN

    @property
    def smallest(self) -> float:
        """The smallest true difference that would have been seen with a chance of 80 %."""
        return intervals.smallest_seen(self.estimate)

    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        found = (f"{self.claim}, {TITLES[self.metric]}: {amount(self.estimate, self.metric)} "
                 f"{UNITS[self.metric]} ({self.tasks} tasks)")
        seen = f"a difference of {number(self.smallest, self.metric)} would have been seen"
        ends = {HOLDS: "the claim holds here",
                REFUTED: "the claim is refuted here, the sign is the other one",
                UNSEEN: f"it cannot be seen at this size ({seen} four times out of five)"}
        return f"{found}: {ends[self.result]}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "result": self.result, "smallest": self.smallest,
                "sentence": self.sentence()}


def verdict(claim: str, metric: str, differences: Mapping[str, np.ndarray]) -> Verdict:
    """Computes the verdict on a claim from paired differences f64[n] by task; more is better.

    Rows whose difference is not known (NaN) are left out.
    """
    known = [own[~np.isnan(own)] for own in differences.values()]
    known = [own for own in known if len(own)]
    return Verdict(claim, metric, intervals.over_tasks_and_rows(known), rows_only(known), len(known))


def rows_only(tasks: list[np.ndarray]) -> Estimate:
    """The mean over the same tasks, with the interval of drawing their rows again (`paired_difference`)."""
    unit = max(float(np.max(np.abs(own))) for own in tasks) or 1.0
    found = intervals.paired_difference([own[:, None] / unit for own in tasks])
    return Estimate(unit * found.value, unit * found.low, unit * found.high, found.n)


def number(value: float, metric: str, sign: bool = False) -> str:
    """A value of a metric as text: points with one digit, nats with three."""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if metric == ACCURACY else f"{value:{plus}.3f}"


def amount(estimate: Estimate, metric: str, sign: bool = True) -> str:
    """An estimate as text: ``+1.2 [-0.8, +3.1]``."""
    low, high = (number(end, metric, sign) for end in (estimate.low, estimate.high))
    return f"{number(estimate.value, metric, sign)} [{low}, {high}]"
