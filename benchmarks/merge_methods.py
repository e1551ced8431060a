"""Every merging method, and both searches for weights, on real experts of a finished study.

    python benchmarks/merge_methods.py STUDY_DIR [--rows 300] [--examples 32]

STUDY_DIR is the folder of a finished `elm study` with gin/studies/p3_small.gin: its base, three of its prompt
experts, the three dataset experts of the same data sets, and its prepared tasks are used. Nothing is trained,
and nothing is written into it. Two Markdown tables are printed: accuracy in percent with 95% intervals.
"""

import argparse
import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import elm_jax as elm
from elm_jax.evaluation.evaluator import EvaluationSettings, Scoring, evaluate_task
from elm_jax.experts.overlay import Expert
from elm_jax.merging.methods.method_table import METHODS
from elm_jax.reporting.cells import Cell, macro_mean
from elm_jax.runtime import sharding
from elm_jax.workflows.merge.search_merge import SearchConfig, search_weights

logger = logging.getLogger("elm_jax.benchmarks")
TASKS = ("ag_news__classify", "dbpedia_14__given_list_what_category_does_the_paragraph_belong_to",
         "trec__trec1")
"""The prompt experts' own tasks, and the tasks that count as seen."""
DATASETS = ("ag_news", "dbpedia_14", "trec")
UNSEEN = ("super_glue_rte__can_we_infer",)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weights": (2, 1, 1)}],
    "task_arithmetic": [{}, {"weights": (0.5, 0.5, 0.5)}, {"weights": (1, 1, 1)}],
    "ties": [{"density": 0.2}], "dare_linear": [{"density": 0.5}], "dare_ties": [{"density": 0.5}],
}
"""By method; one that is not here is taken as it is."""
SOURCE_LENGTH, MAX_NEW_TOKENS = 256, 32
SEARCHES = ((True, "gradient"), (True, "evolution"), (False, "gradient"))
"""Labelled or not, and how."""
STEPS, POPULATION = {"gradient": 20, "evolution": 8}, 12


@dataclasses.dataclass(frozen=True)
class Study:
    """What is read of the study's folder."""

    base: elm.Base
    experts: dict[str, list[Expert]]
    data: elm.TaskData
    rows: int

    @classmethod
    def read(cls, folder: pathlib.Path, rows: int) -> "Study":
        base = elm.load_base(folder / "base" / "base")

        def load(names: Sequence[str]) -> list[Expert]:
            return [elm.load_expert(folder / "experts" / name) for name in names]

        experts = {"prompt": load(TASKS), "dataset": load([f"{name}-de" for name in DATASETS])}
        return cls(base, experts, elm.TaskData(base.vocabulary, prepared_dir=str(folder / "prepared")), rows)

    def score(self, expert: Expert | None, tasks: Sequence[str]) -> str:
        """Mean accuracy over some tasks, in percent, with its interval."""
        settings = EvaluationSettings(source_length=SOURCE_LENGTH, max_new_tokens=MAX_NEW_TOKENS)
        scoring = Scoring(settings, self.base.vocabulary, sharding.make_mesh(1, 1), self.base.fingerprint)
        network, params = elm.resolve(self.base, expert)
        cells = {}
        for task in tasks:
            split = self.data.split(task, self.data.evaluation_split(task), self.rows)
            result = evaluate_task(network, params, split, scoring, "any")
            values = [one["correct"] for one in result.predictions]
            indices = [one["index"] for one in result.predictions]
            cells[task] = Cell(np.asarray(values), np.asarray(indices), "accuracy", result.rows[0]["dataset"])
        found = macro_mean(cells)
        return percent(found.value, found.low, found.high)


def percent(value: float, low: float, high: float, sign: str = "") -> str:
    """A share and its interval, in percent."""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def merges(study: Study, experts: Sequence[Expert]) -> Iterator[tuple[str, Expert | None]]:
    """The base, each expert alone, and every method: what it is called, and the expert."""
    yield "base", None
    for expert in experts:
        yield f"{expert.card.id} alone", expert
    for name, method in METHODS.items():
        taken = experts[:method.num_experts]
        for setting in SETTINGS.get(name, [{}]):
            words = [f"{key} {value if key != 'weights' else ', '.join(map(str, value))}"
                     for key, value in setting.items()]
            words += [f"the first {len(taken)}"] if len(taken) < len(experts) else []
            merged = elm.merge(taken, method=name, base=study.base, **setting)
            yield name + (f" ({'; '.join(words)})" if words else ""), merged


def methods_table(study: Study) -> None:
    """Prints a row a model, columns a kind of expert and tasks."""
    columns = [(kind, tasks) for kind in study.experts for tasks in (TASKS, UNSEEN)]
    rows: dict[str, list[str]] = {}
    for kind, tasks in columns:
        for number, (name, expert) in enumerate(merges(study, study.experts[kind])):
            name = f"expert {number} alone" if name.endswith(" alone") else name
            rows.setdefault(name, []).append(study.score(expert, tasks))
            logger.info("%s, %s: %s", kind, name, rows[name][-1])
    print(f"| | {' | '.join(f'{kind} experts, {words(tasks)}' for kind, tasks in columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(values)} |")


def words(tasks: Sequence[str]) -> str:
    """What a column's tasks are called."""
    return "their own three tasks" if len(tasks) > 1 else tasks[0]


def search_table(study: Study, examples: int) -> None:
    """Prints a row a search: found weights and the uniform mean on rows that were not searched."""
    heads = ("experts", "task", "instances", "search", "weights", "objective: uniform, found",
             "uniform mean, held back", "found, held back", "difference", "s")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind, experts in study.experts.items():
        for task, split in ((TASKS[0], "train"), (UNSEEN[0], "validation")):
            for labelled, search in SEARCHES:
                config = SearchConfig(
                    experts=tuple(expert.card.id for expert in experts), base=study.base.name, task=task,
                    split=split, num_examples=examples, labelled=labelled, search=search,
                    steps=STEPS[search], population=POPULATION, max_rows=study.rows,
                    source_length=SOURCE_LENGTH, max_new_tokens=MAX_NEW_TOKENS)
                start = time.monotonic()
                report = search_weights(config, base=study.base, experts=experts, data=study.data).report
                print(search_row(kind, report, time.monotonic() - start), flush=True)


def search_row(kind: str, report: dict[str, Any], seconds: float) -> str:
    """One row of the table of searches."""
    objective, held = report["objective"], report["held_back"]
    shares = {name: percent(held[name]["value"], held[name]["ci95_low"], held[name]["ci95_high"], sign)
              for name, sign in (("uniform_mean", ""), ("found", ""), ("difference", "+"))}
    cells = (kind, report["task"],
             f"{len(report['rows'])} {report['split']}, {'' if report['labelled'] else 'un'}labelled",
             report["search"], ", ".join(f"{expert['weight']:.2f}" for expert in report["experts"]),
             f"{objective['uniform_mean']:.3f}, {objective['found']:.3f}", *shares.values(), f"{seconds:.0f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parses the flags and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=pathlib.Path, metavar="STUDY_DIR")
    parser.add_argument("--rows", type=int, default=300, help="validation rows a task, as the study has them")
    parser.add_argument("--examples", type=int, default=32, help="instances that a search sees")
    parser.add_argument("--only", choices=("methods", "search"), help="one of the two tables")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("elm_jax").setLevel(logging.INFO)
    study = Study.read(flags.study, flags.rows)
    if flags.only != "search":
        methods_table(study)
        print()
    if flags.only != "methods":
        search_table(study, flags.examples)


if __name__ == "__main__":
    main()
