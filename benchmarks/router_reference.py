"""Routers judged by the reference's own ranking of 296 prompt experts on 113 unseen prompts.

    git clone https://github.com/joeljang/ELM
    ELM_DATA_DIR=data python benchmarks/router_reference.py ELM/seq2seq/merge --cache vectors [--curves]

Nothing is trained. The folder holds ``oracle_sorted.json`` (for each unseen prompt all experts, best
first) and ``ST_choice_instance_top1_32.json`` (the experts for which the reference's retriever voted);
`router_table` makes estimated accuracies of them. elm_jax's routers see those experts of whose tasks
``ELM_DATA_DIR`` has rows, as a library of 100 keys each, and priors of data sets that are left out in three
ways. A router's constants are those that it ships with, or those that are best on the data sets that are
not left out, judged by priors that see neither them nor the target.

An unseen data set without rows is routed by the text of its template, by routers that can; the others are
judged without it. Without ``ELM_DATA_DIR`` only what needs no rows is judged.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from router_judge import DRAWS, Accuracies, Judge, first_keys, library_index
from router_table import COSMOS, LEFT_OUT, T5_LM, Table, dataset_of, read_table
from router_vectors import TaskVectors

from elm_jax.routing.cases import RouterSettings
from elm_jax.routing.evidence import centroid_index
from elm_jax.routing.router import ROUTERS, default_router

GRIDS: dict[str, tuple[str, Sequence[float]]] = {
    "prior+nearest": ("match_weight", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)),
    "prior+centroid": ("match_weight", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)),
    "shortlist": ("shortlist", (5, 10, 20, 30, 50, 70, 100)),
}
"""For each router the constant that is chosen by leaving out, and its values."""


def without_rows(table: Table, candidates: np.ndarray) -> dict[str, Accuracies]:
    """Accuracies by data set of what needs no rows, over the given experts."""
    rows, scores = range(len(table.prompts)), table.scores[:, candidates]
    own = {row: table.rows_of(dataset_of(table.prompts[row])) for row in rows}
    rng = np.random.default_rng(0)
    found = {
        "random expert": {row: scores[row].mean() for row in rows},
        "oracle": {row: scores[row].max() for row in rows},
        "oracle of the data set's other prompts": {row: scores[row, scores[
            [other for other in own[row] if other != row]].mean(axis=0).argmax()] for row in rows},
        "oracle of half the prompts, on the other half": {
            row: np.mean([_other_half(scores[own[row]], rng) for _ in range(20)]) for row in rows},
    }
    return {name: table.accuracy(picked) for name, picked in found.items()}


def _other_half(scores: np.ndarray, rng: np.random.Generator) -> float:
    """Score f64[P, E], on half of the prompts, of the expert that is best on the other half."""
    order = rng.permutation(len(scores))
    first, second = order[: len(order) // 2], order[len(order) // 2:]
    return float(scores[second, scores[first].mean(axis=0).argmax()].mean())


def reference_votes(table: Table, candidates: np.ndarray) -> Accuracies:
    """Accuracies of the first expert in the reference's list of votes that is among the candidates."""
    picked = {}
    for row, voted in enumerate(table.voted):
        among = [expert for expert in voted if expert in set(candidates.tolist())]
        picked[row] = table.scores[row, among[0]] if among else table.scores[row, candidates].mean()
    return table.accuracy(picked)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of a mean by bootstrap over data sets, from f64[D]."""
    drawn = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def lines_without_rows(table: Table, candidates: np.ndarray) -> dict[str, Accuracies]:
    """What is judged without a row: the ceilings, and priors alone."""
    found = without_rows(table, candidates)
    for way in LEFT_OUT:
        found[f"prior, {way} left out"] = table.accuracy({
            row: table.scores[row, candidates[table.prior(dataset_of(name), way)[candidates].argmax()]]
            for row, name in enumerate(table.prompts)})
    return {**found, "the reference's votes": reference_votes(table, candidates)}


def show(title: str, found: Mapping[str, Accuracies]) -> None:
    """Prints macro means with 95% bootstrap intervals over data sets."""
    print(f"\n{title}\n\n| | accuracy | 95 % over data sets |\n|---|---|---|")
    for name, by_dataset in found.items():
        low, high = interval(np.array(list(by_dataset.values())))
        print(f"| {name} | {np.mean(list(by_dataset.values())):.2f} | [{low:.1f}, {high:.1f}] |")


def show_routers(title: str, found: Mapping[str, Mapping[str, Accuracies]], votes: Accuracies) -> None:
    """Prints for each router and each way of leaving out the mean, and points above votes."""
    print(f"\n{title}\n\n| router | {' | '.join(f'{way} left out' for way in LEFT_OUT)} | data sets |")
    print("|---|" + "---|" * (len(LEFT_OUT) + 1))
    for name, ways in found.items():
        cells = []
        for by_dataset in ways.values():
            common = [dataset for dataset in by_dataset if dataset in votes]
            more = np.array([by_dataset[dataset] - votes[dataset] for dataset in common])
            low, high = interval(more)
            mean = np.mean(list(by_dataset.values()))
            cells.append(f"{mean:.2f} ({more.mean():+.1f} [{low:+.1f}, {high:+.1f}])")
        print(f"| {name} | {' | '.join(cells)} | {len(by_dataset)} |")


def show_all_routers(judge: Judge) -> None:
    """Prints elm_jax's routers at 32, 1 and 0 queries, above votes of as many (at 0 of 32)."""
    settings = RouterSettings()
    for num_queries in (32, 1, 0):
        found = {}
        for router, row in ROUTERS.items():
            if row.needs_rows or (row.needs_queries and not row.takes_text and not num_queries):
                continue
            found[router] = {way: judge.fixed(router, settings, num_queries, way) for way in LEFT_OUT}
            if router in GRIDS:
                field, values = GRIDS[router]
                grid = [dataclasses.replace(settings, **{field: value}) for value in values]
                found[f"{router}, `{field}` chosen by the others"] = {
                    way: judge.chosen(router, grid, num_queries, way) for way in LEFT_OUT}
        if num_queries == 32 and "labelled" in ROUTERS:
            for num_rows, of_prompt in itertools.product((32, 128), (True, False)):
                chances = "the prompt" if of_prompt else "the other prompts"
                found[f"labelled, {num_rows} rows by {chances}"] = {
                    way: judge.labelled(num_rows, way, of_prompt=of_prompt) for way in LEFT_OUT}
        votes = judge.fixed("vote", settings, num_queries or 32, "data set")
        show_routers(f"Q = {num_queries}, S = {judge.library.index.instances_per_expert}", found, votes)


def show_curves(judge: Judge) -> None:
    """Prints the default router and votes against Q and S."""
    index, settings = judge.library.index, RouterSettings()
    default = default_router(dataclasses.replace(judge.library, priors=judge.priors(frozenset())))
    kept = {f"{count} rows": first_keys(index, count) for count in (1, 10, 100)}
    kept |= {f"{count} means": centroid_index(index, count) for count in (1, 2, 5, 10)}
    print(f"\n| keys of an expert | Q | votes | {default}, data set left out | family left out |")
    print("|---|---|---|---|---|")
    for name, keys in kept.items():
        one = judge.with_index(keys)
        for num_queries in DRAWS:
            cells = [] if not num_queries else [one.fixed("vote", settings, num_queries, "data set")]
            cells += [one.fixed(default, settings, num_queries, way) for way in ("data set", "family")]
            means = [f"{np.mean(list(cell.values())):.2f}" for cell in cells]
            print(f"| {name} | {num_queries} | {' | '.join(['–'] * (3 - len(means)) + means)} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=pathlib.Path, help="with the reference's ranking files")
    parser.add_argument("--keys", type=int, default=100, help="S, keys of an expert")
    parser.add_argument("--cache", type=pathlib.Path, help="folder that keeps what is embedded")
    parser.add_argument("--curves", action="store_true", help="also print scores against S and Q")
    arguments = parser.parse_args()
    table = read_table(arguments.folder)
    rows, cosmos = range(len(table.prompts)), table.experts.index(COSMOS)
    show("check of the calibration (published: 53.3 by its making, 63.37, 54.63)", {
        "the reference's picks": reference_votes(table, np.arange(len(table.experts))),
        "oracle": table.accuracy({row: table.scores[row].max() for row in rows}),
        "one CosmosQA expert": table.accuracy({row: table.scores[row, cosmos] for row in rows})})
    different = np.unique(table.copies)
    title = f"all experts, copies once ({len(different)} of {len(table.experts)})"
    show(title, lines_without_rows(table, different))
    if "ELM_DATA_DIR" in os.environ:
        vectors = TaskVectors(arguments.cache)
        judge = Judge(table, vectors, library_index(table, vectors, arguments.keys))
        title = f"({len(judge.posed)}, {judge.library.different.sum()} different)"
        show(f"experts that ELM_DATA_DIR can pose {title}", lines_without_rows(table, judge.posed))
        show_all_routers(judge)
        print("\nno rows: " + (", ".join(name for name in T5_LM if not judge.has_rows(name)) or "none"))
        if arguments.curves:
            show_curves(judge)


if __name__ == "__main__":
    main()
