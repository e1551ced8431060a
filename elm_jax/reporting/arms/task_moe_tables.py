"""What the study of task-aware gates says: transfer, area under few rows, drop by unrelated tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.reporting.arms.arm_cells import METRICS, TITLES, ArmScores, difference, mean_of
from elm_jax.reporting.arms.arm_tables import Section, levels_section, tasks_section
from elm_jax.reporting.arms.verdicts import Verdict, amount, verdict

Scores = Mapping[str, np.ndarray]
STARTS = ("related", "random", "mean")


class TaskMoeResults:
    """Differences of the study of task-aware gates.

    Args:
        facts: of the study.
        scores: of its models.
    """

    def __init__(self, facts: Mapping[str, Any], scores: ArmScores) -> None:
        self.config, self.scores = facts["config"], scores
        self.arms = facts["arms"]
        self.targets = tuple(self.config["target_tasks"])
        self.low_rows, self.few_rows = tuple(self.config["low_rows"]), tuple(self.config["few_rows"])
        self.old, self.new = tuple(self.config["old_tasks"]), tuple(self.config["new_tasks"])
        tasked = [arm["name"] for arm in self.arms if arm["reads_tasks"]]
        self.contenders = tasked or [arm["name"] for arm in self.arms if arm["is_sparse"]]
        self.rivals = [arm["name"] for arm in self.arms if arm["name"] not in self.contenders]

    def low_setups(self) -> list[tuple[str, Sequence[str], dict[str, Any]]]:
        """Parts of the low-resource section."""
        return [(f"{rows} rows, beside {beside}", self.targets,
                 {"setup": "low", "rows": rows, "with": beside})
                for rows in self.low_rows for beside in ("nothing", "related", "unrelated")]

    def few_setups(self) -> list[tuple[str, Sequence[str], dict[str, Any]]]:
        """Parts of the section on few rows."""
        return [(f"from {rows} rows" + (f", vector {start}" if start else ""), self.targets,
                 {"setup": "few", "shots": rows, "start": start})
                for rows in self.few_rows for start in (None, *STARTS)]

    def robust_setups(self) -> list[tuple[str, Sequence[str], dict[str, Any]]]:
        """Parts of the robustness section."""
        return [(f"{part} tasks, trained on {words}", tasks, {"setup": "robust", "with": words})
                for words, part, tasks in (("old", "old", self.old), ("old and new", "old", self.old),
                                           ("old and new", "new", self.new))]

    def transfer(self, arm: str, metric: str, beside: str, rows: int) -> Scores:
        """Score beside other tasks minus the score alone, by target."""
        own = {"arm": arm, "setup": "low", "rows": rows}
        return difference(self.scores.values(metric, self.targets, **own, **{"with": beside}),
                          self.scores.values(metric, self.targets, **own, **{"with": "nothing"}))

    def mean_transfer(self, arm: str, metric: str, beside: str) -> Scores:
        """The mean of `transfer` over the numbers of rows."""
        return mean_of([self.transfer(arm, metric, beside, rows) for rows in self.low_rows])

    def area(self, arm: str, metric: str, start: str | None) -> Scores:
        """Area under the score against the number of rows, over that number's range: a mean score."""
        curves = [self.scores.values(metric, self.targets, arm=arm, setup="few", shots=rows, start=start)
                  for rows in self.few_rows]
        places = np.asarray(self.few_rows, np.float64)
        return {task: np.trapezoid([curve[task] for curve in curves], places, axis=0) / places[-1]
                for task in curves[0]}

    def drop(self, arm: str, metric: str) -> Scores:
        """Score of the old tasks before new ones were added, minus after."""
        return difference(
            self.scores.values(metric, self.old, arm=arm, setup="robust", **{"with": "old"}),
            self.scores.values(metric, self.old, arm=arm, setup="robust", **{"with": "old and new"}))

    def best_start(self, arm: str) -> str | None:
        """The vector that an arm's new task gets by the study's claim: related; None for gates without."""
        return "related" if any(each["name"] == arm and each["reads_tasks"] for each in self.arms) else None

    def verdicts(self) -> list[Verdict]:
        """The verdicts on the study's claims, of each contender against each rival."""
        found = []
        for arm in self.contenders:
            for metric in METRICS:
                if self.scores.values(metric, self.targets, arm=arm, setup="low", rows=self.low_rows[0],
                                      **{"with": "nothing"}):
                    found += [*self._of_low(arm, metric), *self._of_few(arm, metric)]
                if self.scores.values(metric, self.old, arm=arm, setup="robust", **{"with": "old"}):
                    found += self._of_robust(arm, metric)
        return found

    def _of_low(self, arm: str, metric: str) -> list[Verdict]:
        related = self.mean_transfer(arm, metric, "related")
        found = [verdict(f"low resource: {arm} gains more from related tasks than from unrelated ones",
                         metric, difference(related, self.mean_transfer(arm, metric, "unrelated")))]
        return found + [verdict(f"low resource: {arm} gains more from related tasks than {rival}", metric,
                                difference(related, self.mean_transfer(rival, metric, "related")))
                        for rival in self.rivals]

    def _of_few(self, arm: str, metric: str) -> list[Verdict]:
        start = self.best_start(arm)
        own = self.area(arm, metric, start)
        found = [verdict(f"few rows: {arm} learns faster from related tasks' vectors than from a {other} one",
                         metric, difference(own, self.area(arm, metric, other)))
                 for other in STARTS[1:] if start is not None]
        return found + [verdict(f"few rows: {arm} learns faster than {rival}", metric,
                                difference(own, self.area(rival, metric, None))) for rival in self.rivals]

    def _of_robust(self, arm: str, metric: str) -> list[Verdict]:
        own = self.drop(arm, metric)
        return [verdict(f"robustness: {arm} loses less than {rival} by unrelated tasks", metric,
                        difference(self.drop(rival, metric), own)) for rival in self.rivals]

    def transfer_section(self) -> Section:
        """Transfer of every arm, by rows and by what stands beside."""
        names = [arm["name"] for arm in self.arms]
        rows = []
        for metric in METRICS:
            for count in self.low_rows:
                for beside in ("related", "unrelated"):
                    found = [self.transfer(name, metric, beside, count) for name in names]
                    if found[0]:
                        rows.append([TITLES[metric], str(count), beside, *self._cells(found, metric)])
        return Section("Low resource: transfer", (
            "The score of a target beside other tasks minus its score alone, at equal steps on the target; "
            "the mean over targets, more is better. Intervals over tasks and rows."),
            {"columns": ["metric", "rows", "beside", *names], "rows": rows, "labels": 3})

    def area_section(self) -> Section:
        """Area under the score of few rows, by arm and by what the task's vector was made of."""
        rows = []
        for metric in METRICS:
            for arm in self.arms:
                for start in STARTS if arm["reads_tasks"] else (None,):
                    found = self.area(arm["name"], metric, start)
                    if found:
                        rows.append([TITLES[metric], arm["name"], start or "no vector",
                                     *self._cells([found], metric)])
        return Section("Few rows: area under the score", (
            f"The mean score over 0 to {self.few_rows[-1]} rows of a target (trapezoids between "
            f"{', '.join(map(str, self.few_rows))}), from the network of the pool; the loss has a minus "
            "sign. Intervals over tasks and rows."),
            {"columns": ["metric", "arm", "vector of the task", "area"], "rows": rows, "labels": 3})

    def drop_section(self) -> Section:
        """What the old tasks lose by new ones."""
        names = [arm["name"] for arm in self.arms]
        rows = []
        for metric in METRICS:
            found = [self.drop(name, metric) for name in names]
            if found[0]:
                rows.append([TITLES[metric], *self._cells(found, metric)])
        return Section("Robustness: drop", (
            "The score of the old tasks without new ones minus with them, at equal steps an old task; less "
            "is better. Intervals over tasks and rows."),
            {"columns": ["metric", *names], "rows": rows})

    @staticmethod
    def _cells(found: Sequence[Scores], metric: str) -> list[str]:
        return [amount(verdict("", metric, own).estimate, metric) for own in found]

    def sections(self) -> list[Section]:
        """The study's own sections, in order."""
        parts = (("Low resource", self.low_setups()), ("Few rows", self.few_setups()),
                 ("Robustness", self.robust_setups()))
        levels = [levels_section(title, self.scores, self.arms, setups) for title, setups in parts]
        changes = [self.transfer_section(), self.area_section(), self.drop_section()]
        setups = [setup for _, own in parts for setup in own]
        return [*(part for pair in zip(levels, changes, strict=True) for part in pair),
                tasks_section(self.scores, self.arms, setups)]
