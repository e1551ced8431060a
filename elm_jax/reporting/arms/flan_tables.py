"""What the study of instruction tuning says: gaps between arms, verdicts on its claims, ablations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from elm_jax.reporting.arms.arm_cells import METRICS, TITLES, UNITS, ArmScores, difference, mean_of
from elm_jax.reporting.arms.arm_tables import Section, levels_section, tasks_section
from elm_jax.reporting.arms.verdicts import Verdict, amount, number, verdict

SetUp = tuple[str, tuple[str, ...], dict[str, Any]]
"""Words, tasks and tags of a part of the study."""


class FlanResults:
    """Differences of the study of instruction tuning.

    Args:
        facts: of the study.
        scores: of its models.
    """

    def __init__(self, facts: Mapping[str, Any], scores: ArmScores) -> None:
        self.config, self.scores = facts["config"], scores
        self.arms = facts["arms"]
        self.dense, *self.others = (arm["name"] for arm in self.arms)
        self.tasks = tuple(self.config["finetune_tasks"])
        self.unseen = tuple(self.config["unseen_tasks"])
        self.sizes = tuple(self.config["finetune_rows"])
        self.counts = tuple(self.config["tuning_counts"])
        self.few_shot = self.config["few_shot"]

    def setups(self) -> list[SetUp]:
        """All parts of the study, as tables show them."""
        last = {"setup": "ii", "tuned_on": self.counts[-1]}
        found: list[SetUp] = [(f"(i) alone, {size} rows", self.tasks, {"setup": "i", "rows": size})
                              for size in self.sizes]
        for words, few in self.shots():
            found.append((f"base as it is, {words}", self.tasks, {"setup": "base", "rows": 0, **few}))
            found.append((f"(ii) tuned, {words}", self.tasks, {**last, **few}))
            found += [(f"(ii) tuned, {words}, other tasks", self.unseen, {**last, **few})] * bool(self.unseen)
        return found + [(f"(iii) tuned, then alone, {size} rows", self.tasks, {"setup": "iii", "rows": size})
                        for size in self.sizes]

    def shots(self) -> list[tuple[str, dict[str, Any]]]:
        """Words and tags of the scores without and with exemplars."""
        few = [(f"{self.few_shot}-shot", {"few_shot": self.few_shot})]
        return [("zero-shot", {}), *(few if self.few_shot else ())]

    def gap(self, arm: str, metric: str, tasks: tuple[str, ...], **tags: Any) -> dict[str, np.ndarray]:
        """Differences f64[n] of an arm and the dense one, by task."""
        return difference(self.scores.values(metric, tasks, arm=arm, **tags),
                          self.scores.values(metric, tasks, arm=self.dense, **tags))

    def alone_gap(self, arm: str, metric: str, setup: str) -> dict[str, np.ndarray]:
        """The gap in a set-up of tasks alone, the mean over the numbers of rows."""
        return mean_of([self.gap(arm, metric, self.tasks, setup=setup, rows=size) for size in self.sizes])

    def gaps_section(self) -> Section:
        """The gaps of every arm in every part, with both intervals."""
        rows = []
        for arm in self.others:
            for words, tasks, tags in self.setups():
                for metric in METRICS:
                    found = self.gap(arm, metric, tasks, **tags)
                    if found:
                        own = verdict("", metric, found)
                        rows.append([f"{arm} – {self.dense}", words, TITLES[metric],
                                     amount(own.estimate, metric), amount(own.rows_only, metric),
                                     number(own.smallest, metric)])
        return Section("Gaps", (
            "The arm's score minus the dense one's on the same rows, the mean over tasks, more being better "
            "for the arm: points of accuracy, nats a token of target loss saved. First interval: drawing "
            "tasks again, and rows within them; second: the rows alone. Visible: the smallest true gap that "
            "the first would have shown, four times out of five."),
            {"columns": ["arms", "set-up", "metric", "gap [tasks and rows]", "gap [rows]", "visible"],
             "rows": rows, "labels": 3})

    def verdicts(self) -> list[Verdict]:
        """The verdicts on the study's claims, of each sparse arm and each metric."""
        found = []
        for arm in self.others:
            for metric in METRICS:
                alone = self.alone_gap(arm, metric, "i")
                if not alone:
                    continue
                last = {"setup": "ii", "tuned_on": self.counts[-1]}
                claim = f"{arm} gains more than {self.dense} from instruction tuning"
                for words, few in self.shots():
                    own = self.gap(arm, metric, self.tasks, **last, **few)
                    found.append(verdict(f"{claim}, scored {words} (gap ii – gap i)", metric,
                                         difference(own, alone)))
                own = self.alone_gap(arm, metric, "iii")
                found.append(verdict(f"{claim}, then learning each task (gap iii – gap i)", metric,
                                     difference(own, alone)))
                found += self._steeper(arm, metric)
        return found

    def _steeper(self, arm: str, metric: str) -> list[Verdict]:
        """The verdict on more gain from more tuning tasks: the gap of the most minus that of the fewest."""
        first, last = self.counts[0], self.counts[-1]
        if first == last:
            return []
        own = difference(self.gap(arm, metric, self.tasks, setup="ii", tuned_on=last),
                         self.gap(arm, metric, self.tasks, setup="ii", tuned_on=first))
        return [verdict(f"{arm} gains more than {self.dense} from {last} tuning tasks in place of {first}",
                        metric, own)]

    def gains(self, metric: str) -> dict[str, list[Verdict]]:
        """By arm, the gain over its own base of tuning on each number of tasks."""
        found = {}
        if not self.scores.values(metric, self.tasks, arm=self.dense, setup="base", rows=0):
            return found
        for arm in (self.dense, *self.others):
            before = self.scores.values(metric, self.tasks, arm=arm, setup="base", rows=0)
            found[arm] = [verdict("", metric, difference(self.scores.values(
                metric, self.tasks, arm=arm, setup="ii", tuned_on=count), before)) for count in self.counts]
        return found

    def gains_section(self) -> Section:
        """Gain against the number of tuning tasks."""
        rows = []
        for metric in METRICS:
            gains = self.gains(metric)
            for place, count in enumerate(self.counts) if gains else ():
                rows.append([TITLES[metric], str(count), *(
                    amount(own[place].estimate, metric) for own in gains.values())])
        return Section("Gain by number of tuning tasks", (
            "The score of the tuned base minus that of the arm's own base, on the tasks that instruction "
            "tuning does not see, without exemplars; every mixture is trained for the same steps. Intervals "
            "over tasks and rows."),
            {"columns": ["metric", "tuning tasks", self.dense, *self.others], "rows": rows, "labels": 2},
            ["gains.png"])

    def ablation_section(self) -> Section | None:
        """Each ablation against the same arm's unchanged tuning; None without ablations."""
        arm = self.config["ablated_arm"]
        if arm is None:
            return None
        rows = []
        for tasks, words in ((self.tasks, "fine-tuning tasks"), (self.unseen, "other tasks")):
            for name in self.config["ablations"] if tasks else ():
                for metric in METRICS:
                    changed = self.scores.values(metric, tasks, arm=arm, setup="ablation", ablation=name)
                    whole = self.scores.values(metric, tasks, arm=arm, setup="ii", tuned_on=self.counts[-1])
                    if changed:
                        own = verdict("", metric, difference(changed, whole))
                        rows.append([name, words, TITLES[metric], amount(own.estimate, metric), UNITS[metric],
                                     own.result if own.result != "holds" else "better"])
        for row in rows:
            row[-1] = {"refuted": "worse"}.get(row[-1], row[-1])
        return Section("Ablations", (
            f"{arm}, tuned on all tasks with one thing changed, minus the same without the change; more is "
            "better. One run each, so a difference holds the chance of a run as well."),
            {"columns": ["change", "tasks", "metric", "difference", "unit", ""], "rows": rows, "labels": 3})

    def _exemplars(self) -> str:
        """A sentence on how many exemplars fit; empty without few-shot scores."""
        taken = [row["exemplars"] for row in self.scores.rows if row.get("few_shot")]
        return (f" Of {self.few_shot} exemplars {np.mean(taken):.2f} a row fit into an input of "
                f"{self.config['eval_source_length']} tokens, in the mean.") if taken else ""

    def sections(self) -> list[Section]:
        """The study's own sections, in order."""
        setups = self.setups()
        levels = levels_section("Scores", self.scores, self.arms, setups)
        levels = dataclasses.replace(levels, text=levels.text + self._exemplars())
        parts = [levels, self.gaps_section(),
                 self.gains_section(), self.ablation_section(), tasks_section(self.scores, self.arms, setups)]
        return [part for part in parts if part is not None]
