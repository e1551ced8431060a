"""Evaluation time of a merged dataset expert against its base's, on real tasks, in turn.

    python benchmarks/merged_time.py STUDY_DIR [--rounds 5] [--task NAME ...]

STUDY_DIR is the folder of a finished `elm demo` or `elm study`: its base, the merge of all its dataset
experts and its prepared tasks are used. What runs is what `elm evaluate` runs, model by model, on the
validation rows. A merged expert has the base's leaves, so the ratio should be 1.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
from train_step import add_flags, in_turn, report

import elm_jax as elm
from elm_jax.evaluation.evaluator import EvaluationSettings, Scoring, evaluate_task
from elm_jax.experts.base import Base
from elm_jax.experts.overlay import Expert
from elm_jax.runtime import sharding

MERGED = pathlib.Path("merged", "merged_dataset_experts")


def evaluation(base: Base, expert: Expert | None, splits: list[elm.PreparedSplit]) -> Callable[[], None]:
    """A function that scores one model on all splits."""
    mesh = sharding.make_mesh(len(jax.devices()), 1)
    network, params = elm.resolve(base, expert)
    params = sharding.put_tree(params, sharding.tree_shardings(network.logical_axes(), params, mesh))

    scoring = Scoring(EvaluationSettings(), base.vocabulary, mesh, base.fingerprint)

    def run() -> None:
        for split in splits:
            evaluate_task(network, params, split, scoring, "any")

    return run


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=pathlib.Path, metavar="STUDY_DIR")
    parser.add_argument("--task", action="append", help="a prepared task; default: all that rank choices")
    add_flags(parser)
    flags = parser.parse_args()
    base = elm.load_base(flags.study / "base" / "base")
    merged = elm.load_expert(flags.study / MERGED)
    prepared = sorted((flags.study / "prepared").glob("*/validation*"))
    splits = [split for split in map(elm.PreparedSplit.open, prepared)
              if split.kind == "rank" and (not flags.task or split.name in flags.task)]
    rows = sum(map(len, splits))
    print(f"{len(splits)} tasks, {rows} instances a round")
    seconds = in_turn({"base": evaluation(base, None, splits),
                       "merged dataset expert": evaluation(base, merged, splits)},
                      flags.rounds, flags.processor_time)
    report(seconds, "base")


if __name__ == "__main__":
    main()
