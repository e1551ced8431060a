"""Routers judged by the reference's own ranking of 296 prompt experts on 113 unseen prompts.

    git clone https://github.com/joeljang/ELM
    ELM_DATA_DIR=data python benchmarks/router_reference.py ELM/seq2seq/merge [--queries 32] [--keys 100]

Nothing is trained. The folder holds ``oracle_sorted.json`` (for each unseen prompt all experts, best
first) and ``ST_choice_instance_top1_32.json`` (the experts for which the reference's retriever voted).
Accuracies are not published; they are estimated from ranks: z is the normal score of an expert's tie-
aware mid-rank, and accuracy is the published T5-LM value of the data set plus sd * z, sd such that the
reference's picks have their published mean. Two published numbers that are not used check it: the oracle
(63.37), and one CosmosQA expert on all prompts (54.63).

Ties are hidden in the lists: they come from a stable sort, so that equal experts stand in the order of
the list that was sorted. That order is estimated (data sets by name, prompts as they mostly stand side by
side), and a run of experts in it counts as a tie. Experts that stand side by side in all 113 lists are
copies.

Without ``ELM_DATA_DIR`` only routers that need no rows are judged. Data sets without rows there are left
out of the means of routers that need them, and named.
Source: Jang et al., https://arxiv.org/abs/2302.03202, tables 1 and 2.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
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
    return f"{dataset}@{'C1 or C2' if 'C1 or C2' in prompt else prompt}"


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
        picks: the reference's first expert for each prompt.
        copies: i64[E], the first expert of whose ranks each one's are a copy.
    """

    prompts: tuple[str, ...]
    experts: tuple[str, ...]
    scores: np.ndarray
    spread: dict[str, float]
    picks: tuple[int, ...]
    copies: np.ndarray

    def rows_of(self, dataset: str) -> list[int]:
        """Positions of a data set's prompts."""
        return [row for row, name in enumerate(self.prompts) if dataset_of(name) == dataset]

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
    picks = tuple(position[picked[prompt][0]] for prompt in prompts)
    spread = {}
    for dataset in T5_LM:
        own = [row for row, name in enumerate(prompts) if dataset_of(name) == dataset]
        mean = np.mean([scores[row, picks[row]] for row in own])
        spread[dataset] = float((REFERENCE[dataset] - T5_LM[dataset]) / mean)
    return Table(prompts, tuple(experts), scores, spread, picks, _copies(rankings, position))


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
    first = np.arange(len(position))
    for one, two in sorted(always):
        first[two] = first[one]
    return first


def priors(table: Table, left_out: Callable[[str, str], bool]) -> dict[str, np.ndarray]:
    """For each data set the mean score f64[E] of every expert on the data sets that are not left out."""
    means = {dataset: table.scores[table.rows_of(dataset)].mean(axis=0) for dataset in T5_LM}
    return {own: np.mean([mean for other, mean in means.items() if not left_out(own, other)], axis=0)
            for own in T5_LM}


def without_rows(table: Table, candidates: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy by data set of every router that needs no rows, over the given experts."""
    rows, scores = range(len(table.prompts)), table.scores[:, candidates]
    found = {
        "random expert": {row: scores[row].mean() for row in rows},
        "oracle": {row: scores[row].max() for row in rows},
        "oracle of the data set's other prompts": {row: scores[row, np.mean(
            [scores[other] for other in table.rows_of(dataset_of(table.prompts[row])) if other != row],
            axis=0).argmax()] for row in rows},
    }
    for name, left_out in LEFT_OUT.items():
        prior = priors(table, left_out)
        found[f"prior, {name} left out"] = {
            row: scores[row, prior[dataset_of(table.prompts[row])][candidates].argmax()] for row in rows}
    return {name: table.accuracy(picked) for name, picked in found.items()}


def with_rows(table: Table, num_keys: int, num_queries: int) -> tuple[list[str], dict[str, dict[str, float]]]:
    """The experts that `ELM_DATA_DIR` can pose, and accuracy by data set of elm_jax's votes over them."""
    from elm_jax.data.draw import draw_rows
    from elm_jax.data.registry import registry
    from elm_jax.routing.encoders import make_encoder
    from elm_jax.routing.index import KeyIndex
    from elm_jax.routing.text import RoutingInstance, format_text
    from elm_jax.routing.vote import decide
    from elm_jax.runtime.config_checks import DEFAULT_MODULES

    registry.import_tasks(DEFAULT_MODULES)
    encoder = make_encoder("minilm", texts=())

    def embedded(task: str, split: str, count: int) -> np.ndarray:
        rows = [row for _, row in registry.get_task(task).render_rows(split)]
        drawn = [rows[place] for place in draw_rows(len(rows), count, 0)]
        instances = [RoutingInstance(row.inputs, row.choices_expression, row.choices or ()) for row in drawn]
        return encoder.embed([format_text(instance, "choice_instance") for instance in instances])

    ours = {name: _slug(name.split("__", 1)[1]) for role in ("train", "unseen")
            for name in registry.task_names(role=role, available_only=True)}
    index = KeyIndex.empty(encoder, "choice_instance", num_keys)
    for name in table.experts:
        task = _task_of(name, ours)
        if task is not None:
            index = index.add(name, embedded(task, "train", num_keys))
            print(f"\rkeys of {len(index.experts)} experts", end="", flush=True)
    print()
    picked = {}
    position = {name: place for place, name in enumerate(table.experts)}
    for row, prompt in enumerate(table.prompts):
        task = _task_of(prompt, ours)
        if task is not None:
            decision = decide(embedded(task, "validation", num_queries), index)
            picked[row] = table.scores[row, position[decision.ranking[0].expert]]
    return list(index.experts), {f"elm_jax's votes, Q = {num_queries}": table.accuracy(picked)}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _task_of(name: str, ours: Mapping[str, str]) -> str | None:
    """The registered task of a canonical name, if there are data for it."""
    dataset, prompt = name.split("@", 1)
    found = [task for task, slug in ours.items()
             if slug == _slug(prompt) and task.startswith(_slug(dataset))]
    return found[0] if len(found) == 1 else None


def show(title: str, found: Mapping[str, Mapping[str, float]], rng: np.random.Generator) -> None:
    """Prints macro means with 95% bootstrap intervals over data sets."""
    print(f"\n{title}\n{'router':<42}{'accuracy':>9}  95% over data sets   data sets")
    for name, by_dataset in found.items():
        values = np.array(list(by_dataset.values()))
        drawn = values[rng.integers(0, len(values), (10_000, len(values)))].mean(axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        print(f"{name:<42}{values.mean():>9.2f}  [{low:.1f}, {high:.1f}]{'':<8}{len(values)}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=pathlib.Path, help="with the reference's ranking files")
    parser.add_argument("--keys", type=int, default=100, help="S, keys of an expert")
    parser.add_argument("--queries", type=int, default=32, help="Q, rows of the task that are routed")
    arguments = parser.parse_args()
    table, rng = read_table(arguments.folder), np.random.default_rng(0)
    rows = range(len(table.prompts))
    cosmos = table.experts.index(COSMOS)
    show("check of the calibration (published: 53.3 by its making, 63.37, 54.63)", {
        "the reference's picks": table.accuracy({row: table.scores[row, table.picks[row]] for row in rows}),
        "oracle": table.accuracy({row: table.scores[row].max() for row in rows}),
        "one CosmosQA expert": table.accuracy({row: table.scores[row, cosmos] for row in rows})}, rng)
    different = np.unique(table.copies)
    title = f"all experts, copies once ({len(different)} of {len(table.experts)})"
    show(title, without_rows(table, different), rng)
    if "ELM_DATA_DIR" in os.environ:
        names, votes = with_rows(table, arguments.keys, arguments.queries)
        posed = np.array([table.experts.index(name) for name in names])
        title = f"experts that ELM_DATA_DIR can pose ({len(names)})"
        show(title, {**without_rows(table, posed), **votes}, rng)
        print("no rows: " + ", ".join(sorted(T5_LM.keys() - next(iter(votes.values())).keys())))


if __name__ == "__main__":
    main()
