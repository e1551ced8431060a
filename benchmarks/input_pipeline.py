"""Rows a second: rendering and tokenising, the same through SeqIO, and reading prepared arrays.

    ELM_DATA_DIR=data taskset -c 1 python benchmarks/input_pipeline.py [--rounds 5] [--step]

Every prompt of one data set's train split, one process, in turn; medians, and the median template. Processor
time too, which says more where other jobs run. `--step` compares the time to make a training batch from
arrays with that of a training step at T5 1.1 small shapes, on as many cores as it may use.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.prepare import prepare, tokenised_rows
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.vocabularies.vocabulary import Vocabulary, train_vocabulary

PIECES = 8000
SPLIT = "train"


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def read_all(split: PreparedSplit) -> None:
    """Every sequence of every row."""
    for row in range(len(split)):
        split.sequences(row)


def through_seqio(name: str, path: str) -> None:
    """The SeqIO task's examples as numpy, as SeqIO gives them."""
    import seqio

    from elm_jax.data.preparing import seqio_tasks
    from elm_jax.evaluation.metrics import TEXT_METRICS

    seqio_tasks.import_tasks(["elm_jax.tasks"], TEXT_METRICS)
    with seqio_tasks.use_vocabulary(path):
        data = seqio.get_mixture_or_task(name).get_dataset(None, split=SPLIT, shuffle=False)
        for _ in data.as_numpy_iterator():
            pass


def measure(name: str, vocabulary: Vocabulary, folder: str, rounds: int) -> dict[str, float]:
    """Rows a second of one task by each way, medians of the rounds."""
    task = registry.get_task(name)
    prepare(name, SPLIT, vocabulary).save(f"{folder}/{name}")
    ways: dict[str, Callable[[], object]] = {
        "render and tokenise": lambda: sum(1 for _ in tokenised_rows(task, SPLIT, vocabulary)),
        "prepared arrays": lambda: read_all(PreparedSplit.open(f"{folder}/{name}")),
    }
    number = len(PreparedSplit.open(f"{folder}/{name}"))
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first is not counted
        for way, work in ways.items():
            times[way].append(seconds_of(work))
    found = {}
    for way, rows in times.items():
        wall, processor = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        found[way], found[f"{way}, processor time"] = number / wall, number / processor
    return {"rows": number, **found}


def step_against_batch(name: str, vocabulary: Vocabulary, folder: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a training step at T5 1.1 small shapes, and of making its batch from arrays."""
    import train_step

    stream = TrainStream(
        MixtureSource([PreparedSplit.open(f"{folder}/{name}")]), batch_size=train_step.BATCH,
        lengths={"inputs": train_step.SOURCE, "targets": train_step.TARGET}, pack=False, seed=0)
    run, _ = train_step.ours(train_step.SMALL, stream.batch(0))
    run()
    steps = [seconds_of(run)[0] for _ in range(rounds)]
    batches = [seconds_of(lambda: [stream.batch(step) for step in range(20)])[0] / 20
               for _ in range(rounds)]
    return {"step, ms": 1e3 * statistics.median(steps), "batch, ms": 1e3 * statistics.median(batches)}


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", default="cosmos_qa")
    parser.add_argument("--step", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    registry.import_tasks(["elm_jax.tasks"])
    names = registry.mixture_tasks(arguments.dataset)
    task = registry.get_task(names[0])
    with tempfile.TemporaryDirectory() as folder:
        texts = [rendered.inputs for _, rendered in task.render_rows(SPLIT)]
        vocabulary = train_vocabulary(texts, f"{folder}/v.model", PIECES, seed=0)
        results = {name: measure(name, vocabulary, folder, arguments.rounds) for name in names}
        for name, found in results.items():
            print(f"{name:60s}" + "".join(f"  {way} {value:,.0f}" for way, value in found.items()))
        middle = statistics.median_low([found["render and tokenise"] for found in results.values()])
        median = next(found for found in results.values() if found["render and tokenise"] == middle)
        name = next(name for name, found in results.items() if found is median)
        slow = min(seconds_of(lambda: through_seqio(name, f"{folder}/v.model"))[0] for _ in range(2))
        ratio = median["prepared arrays, processor time"] / median["render and tokenise, processor time"]
        summary = {"median template": name, **median, "SeqIO, same rows": median["rows"] / slow,
                   "arrays / rendering": ratio}
        if arguments.step:
            summary |= step_against_batch(name, vocabulary, folder, arguments.rounds)
    for key, value in summary.items():
        print(f"{key}: {value:,.1f}" if isinstance(value, float) else f"{key}: {value}")
    print(json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                      "python": sys.version.split()[0], "dataset": arguments.dataset,
                      "data": str(row_files.data_dir()), **summary}))


if __name__ == "__main__":
    main()
