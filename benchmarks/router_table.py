"""The reference's ranking of 296 prompt experts on 113 unseen prompts as a table of estimated accuracies.

Accuracies are not published; they are estimated from ranks: z is the normal score of an expert's tie-aware
mid-rank, and accuracy is the published T5-LM value of the data set plus sd * z, sd such that the reference's
picks have their published mean. Two published numbers that are not used check it: the oracle (63.37), and
one CosmosQA expert on all prompts (54.63).

Ties are hidden in the lists: they come from a stable sort, so that equal experts stand in the order of
the list that was sorted. That order is estimated (data sets by name, prompts as they mostly stand side by
side), and a run of experts in it counts as a tie. Experts that stand side by side in all 113 lists are
copies.
Source: Jang et al., https://arxiv.org/abs/2302.03202, tables 1 and 2.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

T5_LM = {"super_glue/rte": 53.03, "super_glue/cb": 34.34, "anli_r1": 32.89, "anli_r2": 33.76,
         "anli_r3": 33.82, "super_glue/copa": 54.88, "hellaswag": 27.00, "story_cloze": 48.16,
         "winogrande": 50.64, "super_glue/wsc.fixed": 54.09, "super_glue/wic": 50.30}
"""Published accuracy of the base, in percent."""
REFERENCE = {"super_glue/rte": 64.01, "super_glue/cb": 43.57, "anli_r1": 35.49, "anli_r2": 34.64,
             "anli_r3": 31.22, "super_glue/copa": 79.25, "hellaswag": 34.60, "story_cloze": 86.33,
             "winogrande": 61.60, "super_glue/wsc.fixed": 62.21, "super_glue/wic": 52.97}
"""Published accuracy of the reference's retrieval."""
FAMILIES = {"super_glue/rte": "inference", "super_glue/cb": "inference", "anli_r1": "inference",
            "anli_r2": "inference", "anli_r3": "inference", "super_glue/copa": "completion",
            "hellaswag": "completion", "story_cloze": "completion", "winogrande": "coreference",
            "super_glue/wsc.fixed": "coreference", "super_glue/wic": "word sense"}
COSMOS = "cosmos_qa@no_prompt_text"
LEFT_OUT: dict[str, Callable[[str, str], bool]] = {
    "data set": lambda own, other: own == other,
    "ANLI as one": lambda own, other: own.split("_r")[0] == other.split("_r")[0],
    "family": lambda own, other: FAMILIES[own] == FAMILIES[other],
}
"""Whose prompts a prior may not see: of the same data set, ANLI's rounds as one; of the whole family."""


def canonical(name: str) -> str:
    """One spelling of ``data set@prompt``; the files have three."""
    dataset, prompt = name.split("@", 1)
    dataset = dataset.replace("dev_", "")
    for group in ("super_glue", "glue"):
        if dataset.startswith(f"{group}_"):
            dataset = f"{group}/{dataset[len(group) + 1:]}"
    if not dataset.startswith(("super_glue", "glue")):
        dataset = dataset.split("/")[0]
    prompt = "C1 or C2" if "C1 or C2" in prompt else prompt.strip(" '`")
    return f"{dataset}@{prompt}"


def dataset_of(name: str) -> str:
    """The data set of a canonical name."""
    return name.split("@", 1)[0]


def sorted_order(rankings: Mapping[str, Sequence[str]]) -> list[str]:
    """Estimates the order of what was sorted: data sets by name, prompts as they stand side by side."""
    beside: collections.Counter[tuple[str, str]] = collections.Counter()
    for ranking in rankings.values():
        beside.update((one, two) for one, two in itertools.pairwise(ranking)
                      if dataset_of(one) == dataset_of(two))
    by_dataset = collections.defaultdict(list)
    for name in sorted(next(iter(rankings.values()))):
        by_dataset[dataset_of(name)].append(name)
    return [name for _, names in sorted(by_dataset.items()) for name in _order_of(names, beside)]


def _order_of(names: list[str], beside: Mapping[tuple[str, str], int]) -> list[str]:
    """Moves one name at a time while more pairs stand as they do in the lists."""
    def fit(order: list[str]) -> int:
        return sum(beside[one, two] for place, one in enumerate(order) for two in order[place + 1:])

    best = list(names)
    while True:
        before = fit(best)
        for name in list(best):
            rest = [other for other in best if other != name]
            best = max(([*rest[:place], name, *rest[place:]] for place in range(len(best))), key=fit)
        if fit(best) == before:
            return best


@dataclasses.dataclass(frozen=True)
class Table:
    """Estimated scores of E experts on P unseen prompts.

    Attributes:
        prompts, experts: canonical names.
        scores: f64[P, E] normal scores of tie-aware mid-ranks, larger is better.
        spread: by data set, points of accuracy of one unit of score.
        voted: for each prompt the experts for which the reference's retriever voted, most votes first.
        copies: i64[E], the first expert of whose ranks each one's are a copy.
    """

    prompts: tuple[str, ...]
    experts: tuple[str, ...]
    scores: np.ndarray
    spread: dict[str, float]
    voted: tuple[tuple[int, ...], ...]
    copies: np.ndarray

    def rows_of(self, dataset: str) -> list[int]:
        """Positions of a data set's prompts."""
        return [row for row, name in enumerate(self.prompts) if dataset_of(name) == dataset]

    def generality(self, dataset: str) -> np.ndarray:
        """Mean score f64[E] of every expert on a data set."""
        return self.scores[self.rows_of(dataset)].mean(axis=0)

    def prior(self, target: str, way: str) -> np.ndarray:
        """Mean f64[E] of `generality` over the data sets that one of `LEFT_OUT` leaves to a target."""
        seen = [other for other in T5_LM if not LEFT_OUT[way](target, other)]
        return np.mean([self.generality(other) for other in seen], axis=0)

    def accuracy(self, scores: Mapping[int, float]) -> dict[str, float]:
        """Estimated accuracy by data set, from the score of what was picked for each prompt (by row)."""
        found = {}
        for dataset in T5_LM:
            rows = [row for row in self.rows_of(dataset) if row in scores]
            if rows:
                mean = float(np.mean([scores[row] for row in rows]))
                found[dataset] = T5_LM[dataset] + self.spread[dataset] * mean
        return found


def read_table(folder: pathlib.Path) -> Table:
    """Reads the reference's files and calibrates scores to accuracies."""
    def read(name: str) -> dict[str, list[str]]:
        return {canonical(task): list(map(canonical, ranking))
                for task, ranking in json.loads((folder / name).read_text(encoding="utf-8")).items()}

    rankings, picked = read("oracle_sorted.json"), read("ST_choice_instance_top1_32.json")
    experts = sorted_order(rankings)
    position = {name: place for place, name in enumerate(experts)}
    prompts = tuple(rankings)
    scores = np.stack([_normal_scores([position[name] for name in rankings[prompt]]) for prompt in prompts])
    voted = tuple(tuple(position[name] for name in picked[prompt]) for prompt in prompts)
    spread = {}
    for dataset in T5_LM:
        own = [row for row, name in enumerate(prompts) if dataset_of(name) == dataset]
        mean = np.mean([scores[row, voted[row][0]] for row in own])
        spread[dataset] = float((REFERENCE[dataset] - T5_LM[dataset]) / mean)
    return Table(prompts, tuple(experts), scores, spread, voted, _copies(rankings, position))


def _normal_scores(ranking: Sequence[int]) -> np.ndarray:
    """Scores f64[E] by expert, from experts best first; a run in rising order is a tie."""
    scores = np.empty(len(ranking))
    start = 0
    for place in range(1, len(ranking) + 1):
        if place == len(ranking) or ranking[place] < ranking[place - 1]:
            middle = (start + place + 1) / 2
            scores[list(ranking[start:place])] = stats.norm.ppf(1 - (middle - 0.5) / len(ranking))
            start = place
    return scores


def _copies(rankings: Mapping[str, Sequence[str]], position: Mapping[str, int]) -> np.ndarray:
    """For each expert the first of those that stand side by side with it in one order in all lists."""
    always = set.intersection(*({(position[one], position[two]) for one, two in itertools.pairwise(ranking)}
                                for ranking in rankings.values()))
    before = {two: one for one, two in always}
    first = np.arange(len(position))
    for expert in range(len(first)):
        while first[expert] in before:
            first[expert] = before[first[expert]]
    return first
