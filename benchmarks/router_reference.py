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
from router_judge import DRAWS, Accuracies, Judge, first_keys, library_index, template_index
from router_table import COSMOS, LEFT_OUT, T5_LM, Table, dataset_of, read_table
from router_vectors import TaskVectors

from elm_jax.routing.cases import RouterSettings
from elm_jax.routing.evidence import centroid_index
from elm_jax.routing.router import ROUTERS

DEFAULT = "prior+nearest"
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
    """Prints for each router and each way of leaving out the mean, and how much it is above votes."""
    print(f"\n{title}\n\n| router | {' | '.join(f'{way} left out' for way in LEFT_OUT)} | data sets |")
    print("|---|" + "---|" * (len(LEFT_OUT) + 1))
    for name, ways in found.items():
        cells = [_cell(by_dataset, votes) for by_dataset in ways.values()]
        cells = cells[:1] + ["the same"] * (len(cells) - 1) if len(set(cells)) == 1 else cells
        print(f"| {name} | {' | '.join(cells)} | {len(next(iter(ways.values())))} |")


def _cell(by_dataset: Accuracies, votes: Accuracies) -> str:
    """A mean, and the mean difference to votes, where both are judged, with its interval."""
    mean = f"{np.mean(list(by_dataset.values())):.2f}"
    more = np.array([value - votes[dataset] for dataset, value in by_dataset.items() if dataset in votes])
    low, high = interval(more)
    return f"{mean} ({more.mean():+.1f} [{low:+.1f}, {high:+.1f}])" if more.any() else mean


def show_all_routers(judge: Judge, num_queries: int, votes: Accuracies) -> None:
    """Prints elm_jax's routers at Q queries, with their own constants and with those chosen by the others."""
    settings, found = RouterSettings(), {}
    for router, row in ROUTERS.items():
        if row.needs_rows or (row.needs_queries and not row.takes_text and not num_queries):
            continue
        found[router] = {way: judge.fixed(router, settings, num_queries, way) for way in LEFT_OUT}
        if router in GRIDS:
            field, values = GRIDS[router]
            grid = [dataclasses.replace(settings, **{field: value}) for value in values]
            found[f"{router}, `{field}` chosen by the others"] = {
                way: judge.chosen(router, grid, num_queries, way) for way in LEFT_OUT}
    if num_queries:
        found[f"{DEFAULT}, without the template's text"] = {
            way: judge.without_texts().fixed(DEFAULT, settings, num_queries, way) for way in LEFT_OUT}
    for num_rows, of_prompt in itertools.product((32, 128), (True, False)) if num_queries == 32 else ():
        chances = "the prompt itself" if of_prompt else "the other prompts"
        found[f"labelled, {num_rows} simulated rows, by {chances}"] = {
            way: judge.labelled(num_rows, way, of_prompt=of_prompt) for way in LEFT_OUT}
    title = f"Q = {num_queries}, S = {judge.library.index.instances_per_expert}, and how much above votes"
    show_routers(title, found, votes)


def show_curves(judge: Judge) -> None:
    """Prints votes and the default router, the data set and the family left out, against S and Q."""
    index, settings = judge.library.index, RouterSettings()
    kept = {f"{count} of its rows": first_keys(index, count) for count in (1, 10, 100)}
    kept |= {f"{count} means": centroid_index(index, count) for count in (1, 2, 5, 10)}
    print(f"\nvotes / {DEFAULT}, data set left out / family left out\n")
    print(f"| keys of an expert | {' | '.join(f'Q = {num_queries}' for num_queries in DRAWS)} |")
    print("|---|" + "---|" * len(DRAWS))
    for name, keys in kept.items():
        one, cells = judge.with_index(keys), []
        for num_queries in DRAWS:
            found = [one.fixed("vote", settings, num_queries, "data set")] if num_queries else []
            found += [one.fixed(DEFAULT, settings, num_queries, way) for way in ("data set", "family")]
            means = [f"{np.mean(list(by_dataset.values())):.1f}" for by_dataset in found]
            cells.append(" / ".join(["–"] * (3 - len(means)) + means))
        print(f"| {name} | {' | '.join(cells)} |")


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
        for num_queries in (32, 1, 0):
            votes = judge.fixed("vote", RouterSettings(), num_queries or 32, "data set")
            show_all_routers(judge, num_queries, votes)
        print("\nall experts, by the texts of their templates alone; against the same votes at Q = 32")
        show_all_routers(Judge(table, vectors, template_index(table, vectors)), 0, votes)
        print("\nno rows: " + (", ".join(name for name in T5_LM if not judge.has_rows(name)) or "none"))
        if arguments.curves:
            show_curves(judge)


if __name__ == "__main__":
    main()
