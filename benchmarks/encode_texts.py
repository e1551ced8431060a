"""Texts a second of MiniLM: elm_jax against sentence-transformers, in turn, on real texts.

    ELM_DATA_DIR=data python benchmarks/encode_texts.py [--rounds 5] [--texts 300]

The texts are rows of data sets of several lengths, rendered and written as a library writes its keys: short
questions, stories, reviews that are cut at 256 tokens, and a third of each. Tokenising is part of the time of
both; what is compiled is compiled before, and its seconds stand apart. Medians of wall-clock and processor
time. Pin it to one core (`OMP_NUM_THREADS=1 taskset -c 1`) where other programs run.
"""

import argparse
import itertools
import json
import logging
import statistics
import time

import numpy as np
import train_step

from elm_jax.data.registry import registry
from elm_jax.routing import encoders, packing
from elm_jax.routing.text import RoutingInstance, format_text

TASKS = ("trec__trec1", "cosmos_qa__context_answer_to_question", "imdb__movie_expressed_sentiment")
BOTH = ("elm_jax", "sentence-transformers")


def keys_of(task: str, count: int) -> list[str]:
    """The first rows of a task's train split as texts of keys."""
    rows = itertools.islice(registry.get_task(task).render_rows("train"), count)
    instances = (RoutingInstance(row.inputs, row.choices_expression, row.choices or ()) for _, row in rows)
    return [format_text(instance, "label_instance") for instance in instances]


def seconds_in_turn(runs: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall-clock and processor seconds of each run, taken in turn; one round is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: tuple(statistics.median(column) for column in zip(*rows[1:], strict=True))
            for name, rows in taken.items()}


def padding_of(lengths: list[int], longest: int) -> float:
    """Share of the computed tokens that are padding."""
    size, rows = packing.cheapest_rows(lengths, longest)
    return 1 - sum(lengths) / (len(rows) * size)


def compare(ours: encoders.MiniLMEncoder, peer: object, texts: list[str], rounds: int) -> dict[str, float]:
    """Texts a second of both, and how far apart their vectors are."""
    start = time.process_time()
    first = ours.embed(texts)
    compiled = time.process_time() - start
    second = peer.encode(texts, show_progress_bar=False)
    cosine = (first.astype(np.float64) * second).sum(axis=1).min()
    assert cosine > 0.9999, cosine
    taken = seconds_in_turn({BOTH[0]: lambda: ours.embed(texts),
                             BOTH[1]: lambda: peer.encode(texts, show_progress_bar=False)}, rounds)
    start = time.process_time()
    lengths = [len(tokens) for tokens in ours.tokenize(texts)]
    tokenised = time.process_time() - start
    found = {"tokens a text": statistics.mean(lengths),
             "padding": padding_of(lengths, ours.config.max_seq_length),
             "tokenising, share": tokenised / taken[BOTH[0]][1],
             "compiled in, s": max(0.0, compiled - taken[BOTH[0]][1]),
             "least cosine": cosine, "largest difference": float(np.abs(first - second).max())}
    for place, clock in enumerate(("wall", "processor")):
        found |= {f"{name}, texts/s, {clock}": len(texts) / taken[name][place] for name in BOTH}
        found[f"ratio, {clock}"] = taken[BOTH[1]][place] / taken[BOTH[0]][place]
    return found


def main() -> None:
    """Prints a row for each kind of text, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=300, help="of each kind")
    flags = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    logging.disable(logging.WARNING)
    registry.import_tasks(["elm_jax.tasks"])
    kinds = {task.split("__")[0]: keys_of(task, flags.texts) for task in TASKS}
    kinds["mixed"] = [text for texts in kinds.values() for text in texts[: flags.texts // 3]]
    folder = encoders.find_minilm()
    ours, peer = encoders.MiniLMEncoder.from_folder(folder), SentenceTransformer(str(folder), device="cpu")
    results = {kind: compare(ours, peer, texts, flags.rounds) for kind, texts in kinds.items()}
    for kind, found in results.items():
        print(f"{kind:10s}" + "  ".join(f"{name} {value:.3g}" for name, value in found.items()))
    print(json.dumps({"machine": train_step.machine(), "texts": flags.texts, "results": results}))


if __name__ == "__main__":
    main()
