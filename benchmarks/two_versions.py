"""Speed of this checkout against another checkout of elm_jax, measured alternately in one run.

    python benchmarks/two_versions.py OTHER_CHECKOUT --python OTHER_PYTHON [--rounds 5]

OTHER_PYTHON is an environment with the other checkout installed. One process of each version holds its
compiled programs; steps, scores and texts are computed in turn, and so are whole processes: `elm --help`,
`import elm_jax`, a merge of three checkpoints from disk to disk. Each checkout brings its own `train_step.py`
and `rank_classification.py`, of which the networks and the batches are taken.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

HERE = pathlib.Path(__file__).resolve().parent
UNCOUNTED = 2
"""Rounds that compile and fill caches."""
TIMES = {"training step, small": 1, "training step, tiny": 30, "rank scoring": 2, "greedy decoding": 2}
"""Runs within one measurement, by workload."""
NEW_TOKENS = 16
Seconds = dict[str, list[float]]


def workloads() -> dict[str, Callable[[], object]]:
    """What one process computes, by name; runs with the elm_jax and the scripts of its own checkout."""
    import jax
    import rank_classification
    import train_step

    from elm_jax.models import T5Network

    small, batch = train_step.SMALL, train_step.make_batch()
    tiny = dataclasses.replace(small, emb_dim=64, num_heads=4, head_dim=16, mlp_dim=128, vocab_size=512,
                               num_encoder_layers=2, num_decoder_layers=2)
    tiny_batch = {name: value % 512 if value.dtype.kind == "i" else value for name, value in batch.items()}
    params = jax.device_get(jax.jit(T5Network(small).init)(jax.random.key(0)))
    return {
        "training step, small": train_step.ours(small, batch)[0],
        "training step, tiny": train_step.ours(tiny, tiny_batch)[0],
        "rank scoring": rank_classification.ours(small, params),
        "greedy decoding": decoding(T5Network(small), params, batch["encoder_input_tokens"]),
    }


def decoding(network: object, params: object, inputs: object) -> Callable[[], object]:
    """Greedy decoding of i32[8, 256]; older versions take tokens whose padding is 0, without lengths."""
    import jax
    import numpy as np

    import elm_jax.types
    from elm_jax.models.decode import greedy

    params = jax.device_put(params)
    if hasattr(elm_jax.types, "Padded"):
        inputs = elm_jax.types.Padded(inputs, np.full(len(inputs), inputs.shape[1], np.int32))
    return lambda: np.asarray(greedy(network, params, inputs, max_length=NEW_TOKENS))


def serve(checkout: pathlib.Path) -> None:
    """Answers each name on standard input with the seconds that this workload took."""
    sys.path.insert(0, str(checkout / "benchmarks"))
    runs = workloads()
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        for _ in range(TIMES[name]):
            runs[name]()
        print((time.perf_counter() - start) / TIMES[name], flush=True)


class Version:
    """One checkout: its process that computes, and its commands."""

    def __init__(self, python: str, checkout: pathlib.Path) -> None:
        self.python, self.checkout = python, checkout
        self.process = subprocess.Popen([python, __file__, "--serve", str(checkout)], text=True, cwd=checkout,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._answer() != "ready":
            raise SystemExit(f"{checkout}: the process of this checkout did not start")

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()

    def compute(self, name: str) -> float:
        """Seconds of a workload in the version's own process."""
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def command(self, *words: str) -> float:
        """Seconds of a process of the version's Python."""
        start = time.perf_counter()
        subprocess.run([self.python, *words], check=True, cwd=self.checkout, capture_output=True)
        return time.perf_counter() - start


def merge_of_three(folder: pathlib.Path) -> list[str]:
    """Writes three checkpoints of 0.3 GB; returns the words of a TIES merge, without its output folder."""
    import yaml
    from merge import ties
    from merge_checkpoints import make

    make(folder, "llama", "bfloat16", 0.3e9, 3, 2)
    config = ties([str(folder / f"expert{number}") for number in range(3)], str(folder / "base"))
    (folder / "merge.yaml").write_text(yaml.safe_dump({**config, "dtype": "bfloat16"}))
    return ["-m", "elm_jax.cli", "merge", "--config", str(folder / "merge.yaml"), "--output"]


def commands(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[str, int], list[str]]]]:
    """Names of whole processes, and their words for a version and a round."""
    merge = merge_of_three(folder)
    yield "elm --help", lambda version, number: ["-m", "elm_jax.cli", "--help"]
    yield "import elm_jax", lambda version, number: ["-c", "import elm_jax"]
    yield "merging three checkpoints", lambda version, number: [
        *merge, str(folder / f"merged_{version}_{number}")]


def measure(versions: dict[str, Version], rounds: int, folder: pathlib.Path, only: str | None
            ) -> dict[str, Seconds]:
    """Seconds of each workload and version, the versions in turn, each round beginning with the other one."""
    found: dict[str, Seconds] = {}
    processes = dict(commands(folder))
    for name in only.split(",") if only else [*TIMES, *processes]:
        rows = found[name] = {version: [] for version in versions}
        for number in range(rounds + UNCOUNTED):
            order = list(versions) if number % 2 else list(versions)[::-1]
            for version in order:
                seconds = (versions[version].compute(name) if name in TIMES
                           else versions[version].command(*processes[name](version, number)))
                if number >= UNCOUNTED:
                    rows[version].append(seconds)
        report(name, rows)
    return found


def report(name: str, rows: Seconds) -> None:
    """Prints medians and the ratio of one workload."""
    this, other = (statistics.median(rows[version]) for version in ("this", "other"))
    print(f"{name:28s} this {this:8.4f} s   other {other:8.4f} s   this / other {this / other:5.3f}   "
          f"least / least {min(rows['this']) / min(rows['other']):5.3f}", flush=True)


def main() -> None:
    """Parses the flags, measures, prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--python", help="Python of the environment that holds the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each")
    parser.add_argument("--only", help="names of workloads, separated by commas")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.checkout)
        return
    if not flags.python:
        parser.error("--python: give the Python of the other checkout's environment")
    versions = {"this": Version(sys.executable, HERE.parent),
                "other": Version(flags.python, flags.checkout.resolve())}
    with tempfile.TemporaryDirectory() as folder:
        found = measure(versions, flags.rounds, pathlib.Path(folder), flags.only)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
