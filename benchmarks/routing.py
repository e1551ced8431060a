"""Routing over many experts: decisions, adding, opening and memory, beside faiss' flat search.

    pip install --target DIR --no-deps faiss-cpu     # the peer; left out where it is not installed
    PYTHONPATH=DIR python benchmarks/routing.py [--rounds 5] [--experts 100 1000 10000] [--expert FOLDER]

Keys are random unit rows of 384 dimensions (nothing here depends on their values). A decision finds the best
similarity of each expert (the search) and the winners' order; "all lines" makes the lines about all other
experts, too. faiss gives the nearest key of each query, as it decides itself and by BLAS. All are measured in
turn, two rounds uncounted, each after a call of its own (what fits into the cache is there), as medians of
processor time and, in brackets, of the clock. Memory is the growth of a new process's peak resident size
while it opens an index and decides.
With ``--expert`` copies of that expert are added to a library on disk one by one. Run it on one core
(``OMP_NUM_THREADS=1 taskset -c 1``) where the machine does something else as well.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DIMENSION, MOST_MEMORY, MOST_SECONDS, MOST_SECONDS_AT_ONCE = 384, 1.15, 60.0, 2.0
ONE_BY_ONE, AT_ONCE, OF_EACH = 10_000, 1_000, 100
FORMAT = "choice_instance"
WIDTHS = (18, 18, 18, 18, 20, 18, 21, 11)
Times = tuple[float, float]


@dataclasses.dataclass
class RandomEncoder:
    """An encoder that draws a row for every text."""

    name: str = "random"
    fingerprint: str = "random"
    dimension: int = DIMENSION

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows f32[N, K]."""
        return unit_rows(self._rng, len(texts))


def unit_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random unit rows f32[count, K]."""
    rows = rng.standard_normal((count, DIMENSION), dtype=np.float32)
    rows /= np.sqrt(np.einsum("nk,nk->n", rows, rows))[:, None]
    return rows


def clock(call: Callable[[], Any]) -> Times:
    """Processor time and time by the clock of a call, in seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - processor, time.perf_counter() - wall


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Median times of calls that are made in turn, two rounds uncounted, each after one of its own."""
    found: dict[str, list[Times]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            call()
            times = clock(call)
            if number >= 2:
                found[name].append(times)
    return {name: tuple(statistics.median(part) for part in zip(*times, strict=True))
            for name, times in found.items()}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def whole_index(experts: int, of_each: int) -> Any:
    """An index of random keys."""
    from elm_jax.routing.index import KeyIndex

    keys = unit_rows(np.random.default_rng(1), experts * of_each)
    return KeyIndex.empty(RandomEncoder(), FORMAT, of_each).add_all({
        f"expert_{number:05d}": keys[number * of_each : (number + 1) * of_each] for number in range(experts)})


def decisions(sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Measures decisions for every number of experts, keys an expert, and queries; prints a line each."""
    from elm_jax.routing.search import best_jax, best_numpy
    from elm_jax.routing.vote import decide

    try:
        import faiss
    except ImportError:
        faiss = None
        print("faiss is not installed (pip install --target DIR --no-deps faiss-cpu): ours alone")
    rows = []
    heads = ("decision", "all lines", "search, NumPy", "search, JAX", "faiss", "faiss by BLAS",
             "best faiss/decision", "JAX/NumPy")
    print("\nmilliseconds of processor time (of the clock)\n" + "E x S, Q".ljust(18) + "".join(
        head.rjust(width) for head, width in zip(heads, WIDTHS, strict=True)))
    for experts in sizes:
        for of_each in (1, 10, 100):
            index = whole_index(experts, of_each)
            flat = faiss and faiss.IndexFlatIP(DIMENSION)
            if flat:
                flat.add(index.keys)
            for count in (1, 32):
                queries = unit_rows(np.random.default_rng(2), count)
                calls = {"decision": lambda q=queries, i=index: decide(q, i),
                         "lines": lambda q=queries, i=index: tuple(decide(q, i).ranking),
                         "numpy": lambda q=queries, i=index: best_numpy(q, i),
                         "jax": lambda q=queries, i=index: best_jax(q, i)}
                if flat:
                    calls |= {name: functools.partial(flat_search, faiss, flat, queries, least)
                              for name, least in (("faiss", None), ("blas", 1))}
                small = experts * of_each <= 10_000
                found = medians(calls, 10 * rounds if small else rounds)
                rows.append({"experts": experts, "keys": of_each, "queries": count, **found})
                show(rows[-1])
            del index, flat, calls
    return rows


def flat_search(faiss: Any, flat: Any, queries: np.ndarray, least: int | None) -> None:
    """Finds the nearest key of each query, by BLAS from so many queries on; None: as faiss decides."""
    before = faiss.cvar.distance_compute_blas_threshold
    if least is not None:
        faiss.cvar.distance_compute_blas_threshold = least
    flat.search(queries, 1)
    faiss.cvar.distance_compute_blas_threshold = before


def show(row: dict[str, Any]) -> None:
    """Prints one line of the table of decisions."""
    names = ("decision", "lines", "numpy", "jax", "faiss", "blas")
    cells = [f"{1e3 * row[name][0]:.2f} ({1e3 * row[name][1]:.2f})" if name in row else "-" for name in names]
    peers = [row[name][0] for name in ("faiss", "blas") if name in row]
    ratios = [f"{min(peers) / row['decision'][0]:.2f}" if peers else "-",
              f"{row['jax'][0] / row['numpy'][0]:.2f}"]
    print(f"{row['experts']} x {row['keys']}, {row['queries']}".ljust(18) + "".join(
        cell.rjust(width) for cell, width in zip((*cells, *ratios), WIDTHS, strict=True)), flush=True)


def adding() -> dict[str, Times]:
    """Measures experts of 100 keys that are added to an index one by one, and at once."""
    from elm_jax.routing.index import KeyIndex

    keys = unit_rows(np.random.default_rng(3), OF_EACH * AT_ONCE)
    experts = {f"expert_{number:05d}": keys[(number % AT_ONCE) * OF_EACH:][:OF_EACH]
               for number in range(ONE_BY_ONE)}
    empty = KeyIndex.empty(RandomEncoder(), FORMAT, OF_EACH)

    def one_by_one() -> None:
        index = empty
        for name, rows in experts.items():
            index = index.add(name, rows)

    first = dict(list(experts.items())[:AT_ONCE])
    return {"one by one": clock(one_by_one), "at once": clock(lambda: empty.add_all(first))}


def write(folder: str, experts: int) -> int:
    """Writes an index of experts of 100 keys; returns the bytes of its keys."""
    from elm_jax.runtime import storage

    index = whole_index(experts, OF_EACH)
    storage.begin(folder)
    index.save(folder)
    storage.commit(folder)
    return index.keys.nbytes


def open_and_decide(folder: str, mapped: bool, backend: str) -> dict[str, Any]:
    """Opens an index in this new process and decides once: times, and growth of the peak resident size."""
    from elm_jax.routing.index import KeyIndex
    from elm_jax.routing.vote import decide

    queries = unit_rows(np.random.default_rng(4), 32)
    decide(queries, whole_index(10, OF_EACH), backend=backend)  # what it imports and compiles is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened: list[KeyIndex] = []
    opening = clock(lambda: opened.append(KeyIndex.open(folder, RandomEncoder(), mapped=mapped)))
    deciding = clock(lambda: decide(queries, opened[0], backend=backend))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"open": opening, "first decision": deciding, "peak_bytes": 1024 * (after - before)}


def library_adds(expert: str, folder: str, count: int) -> list[tuple[int, Times]]:
    """Adds copies of an expert to a library one by one; times of an add by the size of the library."""
    from elm_jax.experts.library import ExpertLibrary
    from elm_jax.routing.text import RoutingInstance

    source = pathlib.Path(folder) / "source"
    shutil.copytree(expert, source)
    card = json.loads((source / "expert.json").read_text())
    library = ExpertLibrary.create(pathlib.Path(folder) / "library", RandomEncoder(), FORMAT, OF_EACH)
    numbers = iter(range(count))

    def add() -> None:
        number = next(numbers)
        (source / "expert.json").write_text(json.dumps({**card, "id": f"expert_{number:05d}"}))
        texts = [f"A training instance of some sixty letters, {number} {each}" for each in range(OF_EACH)]
        library.add({str(source): [RoutingInstance(text) for text in texts]})

    add()
    part, found = max(1, (count - 1) // 5), []
    for _ in range(5):
        times = [clock(add) for _ in range(part)]
        found.append((len(library), tuple(statistics.median(each) for each in zip(*times, strict=True))))
    return found


def seconds(times: Times) -> str:
    """Processor time and time by the clock, in words."""
    return f"{times[0]:.2f} s ({times[1]:.2f} s)"


def main() -> None:
    """Measures and prints the tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--expert", help="folder of an expert that is added to a library on disk")
    parser.add_argument("--adds", type=int, default=300, help="how often")
    parser.add_argument("--workdir", help="of files that are written (default: a temporary folder)")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor(), "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        experts = max(arguments.experts)
        size = apart(write, f"{folder}/keys", experts)
        print(f"{experts} x {OF_EACH} keys, {size / 1e6:.0f} MB; peak memory (at most {MOST_MEMORY}):")
        for mapped, backend in ((True, "numpy"), (False, "numpy"), (True, "jax")):
            how = f"{'mapped' if mapped else 'in memory'}, {backend}"
            each = found[how] = apart(open_and_decide, f"{folder}/keys", mapped, backend)
            print(f"  {how}: {each['peak_bytes'] / size:.3f} times the keys; opened in "
                  f"{seconds(each['open'])}, first decision {seconds(each['first decision'])}", flush=True)
        shutil.rmtree(f"{folder}/keys")
        found["adding"] = apart(adding)
        one, many = (seconds(found["adding"][name]) for name in ("one by one", "at once"))
        print(f"{ONE_BY_ONE} experts x {OF_EACH} keys added one by one: {one}, at most {MOST_SECONDS:.0f} s; "
              f"{AT_ONCE} at once: {many}, at most {MOST_SECONDS_AT_ONCE:.0f} s", flush=True)
        if arguments.expert:
            found["library"] = apart(library_adds, arguments.expert, folder, arguments.adds)
            for number, times in found["library"]:
                print(f"  an add to a library on disk, up to {number} experts: {1e3 * times[0]:.1f} ms "
                      f"({1e3 * times[1]:.1f} ms)", flush=True)
    found["decisions"] = decisions(arguments.experts, arguments.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
