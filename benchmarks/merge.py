"""Merging from disk to disk: elm_jax and mergekit in turn, in one run.

    python benchmarks/merge.py WORKDIR [--num_models 3,8] [--methods linear,ties,slerp]
        [--dtypes bfloat16,float32] [--size 1.1GB] [--rounds 3] [--kind llama] [--precision float32]
        [--output FILE] [--keep]

Checkpoints are made by `merge_checkpoints.py`. Both programs get the same YAML file, each merge in a process
of its own (`elm merge --config FILE --output OUTPUT`, `mergekit-yaml FILE OUTPUT`), in turn, the order
changing from round to round. The page cache cannot be emptied everywhere, so it is filled: every input is
read once before each measured run. PyTorch's threads wait for each other at every operation and lose much
time on a machine that others use: `mergekit -j 1` does without them. Printed, as medians:

- wall time of the process, and its processor time, which says more on a machine that others use;
- its peak resident size, and how much of that no file backs (mergekit's also counts the files that it maps);
- bytes moved (inputs once, output once) a second as a share of what `cp` of one checkpoint moves in the same
  run, once as the processes end and once with the output forced to the disk;
- how far apart the two outputs are.

`slerp` takes two checkpoints, `ties` one more as its base. WORKDIR needs room for the most checkpoints
and four more, and is left empty.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).parent
BUFFER, INTERVAL = 1 << 24, 0.02
PEER_INSIDE = """
import json, sys, time
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1]).read()))
start = time.monotonic()
run_merge(config, sys.argv[2], MergeOptions(quiet=True))
print(json.dumps({"seconds": time.monotonic() - start}))
"""
ELM = [sys.executable, "-m", "elm_jax.cli", "merge", "--config", "FILE", "--output", "OUTPUT"]
MERGEKIT = [str(pathlib.Path(sys.executable).with_name("mergekit-yaml")), "FILE", "OUTPUT"]
COMMANDS = {"elm_jax": ELM, "mergekit": MERGEKIT, "mergekit -j 1": [*MERGEKIT, "-j", "1"],
            "mergekit --lazy-unpickle": [*MERGEKIT, "--lazy-unpickle"]}
INSIDE = {"elm_jax": [*ELM, "--json"], "mergekit": [sys.executable, "-c", PEER_INSIDE, "FILE", "OUTPUT"]}
"""Programs that say at the end, as JSON, how many seconds they took without their start."""
Row = dict[str, Any]


def linear(models: Sequence[str], base: str) -> Row:
    """The mean."""
    del base  # a mean has none
    return {"merge_method": "linear",
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models]}


def ties(models: Sequence[str], base: str) -> Row:
    """TIES of a fifth of each task vector, as its paper has it."""
    return {"merge_method": "ties", "base_model": base, "parameters": {"density": 0.2},
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models]}


def slerp(models: Sequence[str], base: str) -> Row:
    """Half way between the first two experts."""
    del base  # mergekit's base_model is the first of the two
    return {"merge_method": "slerp", "base_model": models[0], "parameters": {"t": 0.5},
            "models": [{"model": model} for model in models[:2]]}


METHODS: dict[str, Callable[[Sequence[str], str], Row]] = {"linear": linear, "ties": ties, "slerp": slerp}


def inputs_of(config: Row) -> list[pathlib.Path]:
    """The folders that a merge reads, each once."""
    models = [entry["model"] for entry in config["models"]]
    return [pathlib.Path(path) for path in dict.fromkeys([*models, config.get("base_model", models[0])])]


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files with tensors."""
    return sorted(folder.glob("*.safetensors"))


def size_of(folders: Iterable[pathlib.Path]) -> int:
    """Bytes of the files with tensors."""
    return sum(file.stat().st_size for folder in folders for file in files_of(folder))


def warm(folders: Iterable[pathlib.Path]) -> None:
    """Reads files into the page cache."""
    buffer = bytearray(BUFFER)
    for folder in folders:
        for path in files_of(folder):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def to_disk(folder: pathlib.Path) -> None:
    """Waits until a folder's files lie on the disk."""
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def own_memory(pid: int) -> int:
    """Resident bytes of a process that no file backs, now; 0 where it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def measured(command: list[str], output: pathlib.Path, log: pathlib.Path) -> Row:
    """Runs a merge; its times and memory.

    The peak is the kernel's own figure. It counts the size of the process that starts another as well, so
    this one must stay small; memory that no file backs has no such figure and is looked at as it runs.
    """
    start, own = time.monotonic(), 0
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            own = max(own, own_memory(child.pid))
            time.sleep(INTERVAL)
    seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{log.read_text(errors='replace')[-4000:]}")
    to_disk(output)
    return {"seconds": seconds, "synced_seconds": time.monotonic() - start,
            "processor_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024, "own_peak_bytes": own}


def filled(command: Sequence[str], config: pathlib.Path, output: pathlib.Path) -> list[str]:
    """A command with its file and its output."""
    return [{"FILE": str(config), "OUTPUT": str(output)}.get(word, word) for word in command]


def inside_seconds(log: pathlib.Path) -> float:
    """What a program says of its own time, in the last line of JSON that it printed."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    return float(json.loads(lines[-1])["seconds"])


def copy(source: pathlib.Path, target: pathlib.Path) -> Row:
    """Bytes a second, read and written, of `cp` of one checkpoint: at its end, and with the disk done."""
    warm([source])
    start = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    seconds = time.monotonic() - start
    to_disk(target)
    synced = time.monotonic() - start
    moved = 2 * size_of([source])
    shutil.rmtree(target)
    return {"copy": moved / seconds, "synced_copy": moved / synced}


def checkpoints(*arguments: object) -> Row:
    """Runs `merge_checkpoints.py`, which needs more memory than this process may."""
    command = [sys.executable, str(HERE / "merge_checkpoints.py"), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Bench:
    """One run of the benchmark: its flags, its folder and what it has measured."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.copies: list[Row] = []
        self.rows: list[Row] = []

    def compare(self, dtype: str, method: str, num_models: int) -> None:
        """Measures all programs on one merge, in turn, and keeps a row for each."""
        folders = [str(self.flags.workdir / dtype / f"expert{number}") for number in range(num_models)]
        config = METHODS[method](folders, str(self.flags.workdir / dtype / "base"))
        config["dtype"], config["out_dtype"] = self.flags.precision or dtype, dtype
        path = self.flags.workdir / "merge.yaml"
        path.write_text(yaml.safe_dump(config))
        names = [name for name in COMMANDS if name in self.flags.programs]
        runs: dict[str, list[Row]] = {name: [] for name in names}
        agreement: Row = {}
        for number in range(self.flags.rounds):
            self.copies.append(copy(inputs_of(config)[0], self.flags.workdir / "copy"))
            for name in names if number % 2 == 0 else names[::-1]:
                runs[name].append(self.run(name, path, config))
            if not number and names[0] == "elm_jax" and len(names) > 1:
                agreement = checkpoints("compare", *map(self.output, names[:2]), *inputs_of(config))
        moved = size_of([*inputs_of(config), self.output(names[0])])
        for name in names:
            self.rows.append({"program": name, "dtype": dtype, "method": method,
                              "models": len(config["models"]), "moved_bytes": moved, "runs": runs[name],
                              **{key: statistics.median(run[key] for run in runs[name])
                                 for key in runs[name][0]},
                              **(agreement if name == "elm_jax" else {})})
            shutil.rmtree(self.output(name))
            print(f"{dtype} {method} {len(config['models'])} {name}: {self.rows[-1]['seconds']:.1f} s",
                  file=sys.stderr)

    def output(self, name: str) -> pathlib.Path:
        """The folder that a program writes."""
        return self.flags.workdir / f"out_{name.split()[0]}_{len(name)}"

    def run(self, name: str, path: pathlib.Path, config: Row) -> Row:
        """One merge by one program, with all inputs in the page cache and its last output gone."""
        output, log = self.output(name), self.flags.workdir / "log.txt"
        result: Row = {}
        if self.flags.inside and name in INSIDE:
            shutil.rmtree(output, ignore_errors=True)
            warm(inputs_of(config))
            measured(filled(INSIDE[name], path, output), output, log)
            result["inside_seconds"] = inside_seconds(log)
        shutil.rmtree(output, ignore_errors=True)
        warm(inputs_of(config))
        return result | measured(filled(COMMANDS[name], path, output), output, log)

    def finish(self) -> list[Row]:
        """Rows with shares of the copy's speed and ratios to the fastest mergekit, which need all of them."""
        speed = {key: statistics.median(each[key] for each in self.copies) for key in ("copy", "synced_copy")}
        for row in self.rows:
            row |= {f"{key}_bytes_per_second": value for key, value in speed.items()}
            row["share_of_copy"] = row["moved_bytes"] / row["seconds"] / speed["copy"]
            row["share_of_synced_copy"] = row["moved_bytes"] / row["synced_seconds"] / speed["synced_copy"]
            peers = [each["seconds"] for each in self.rows if each["program"].startswith("mergekit") and all(
                each[key] == row[key] for key in ("dtype", "method", "models"))]
            row["speed_against_mergekit"] = min(peers) / row["seconds"] if peers else None
        return self.rows


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The rows as people read them."""
    table = Table(title=title)
    for column in ("dtype", "method", "models", "program", "seconds", "of processor", "inside",
                   "times mergekit", "peak MB", "own MB", "GB/s", "of copy", "of synced", "furthest apart"):
        table.add_column(column, justify="right" if column not in ("dtype", "method", "program") else "left")
    for row in rows:
        inside, ratio = row.get("inside_seconds"), row["speed_against_mergekit"]
        table.add_row(
            row["dtype"], row["method"], str(row["models"]), row["program"], f"{row['seconds']:.2f}",
            f"{row['processor_seconds']:.2f}", "" if inside is None else f"{inside:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}", f"{row['own_peak_bytes'] / 1e6:.0f}",
            f"{row['moved_bytes'] / row['seconds'] / 1e9:.2f}", f"{row['share_of_copy']:.2f}",
            f"{row['share_of_synced_copy']:.2f}", agreement_of(row))
    return table


def agreement_of(row: Row) -> str:
    """How far the two outputs are apart, in units in the last place, and how often by more than one."""
    if "unlike" in row:
        return f"UNLIKE TENSORS: {len(row['unlike'])}"
    if "elements" not in row:
        return ""
    return f"{row['largest_difference_in_units']:.2g} units, {row['share_beyond_one_unit']:.1g} beyond 1"


def machine() -> Row:
    """Where and with what."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "torch", "mergekit")}
    return {"machine": platform.platform(), "processors": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "load": [round(each, 2) for each in os.getloadavg()], **versions}


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    listed = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--methods", type=listed, default=list(METHODS))
    parser.add_argument("--num_models", type=listed, default=["3", "8"], help="slerp takes two of them")
    parser.add_argument("--dtypes", type=listed, default=["bfloat16", "float32"])
    parser.add_argument("--size", default="1.1GB", help="of one checkpoint")
    parser.add_argument("--shards", type=int, default=2, help="files of one checkpoint")
    parser.add_argument("--kind", default="llama", help="llama or t5")
    parser.add_argument("--precision", help="`dtype` of the YAML: float32 makes mergekit compute as we do; "
                        "unset, it computes in the files' own (ours always in float32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", type=listed, default=["elm_jax", "mergekit", "mergekit -j 1"],
                        help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--inside", action="store_true",
                        help="also the seconds without the interpreter's start and the imports")
    parser.add_argument("--output", type=pathlib.Path, help="a file that gets the rows too, as JSON lines")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints where they are")
    flags = parser.parse_args()
    for name, given, known in (("methods", flags.methods, METHODS), ("programs", flags.programs, COMMANDS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name}: got {', '.join(unknown)}; expected some of {', '.join(known)}")
    return flags


def main() -> None:
    """Makes the checkpoints, measures every merge, prints the table and writes the rows."""
    flags = parse_flags()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bench, where = Bench(flags), machine()
    counts = sorted({int(count) for count in flags.num_models})
    for dtype in flags.dtypes:
        if not (flags.workdir / dtype).exists():
            made = checkpoints("make", flags.workdir / dtype, "--count", max(2, *counts), "--dtype", dtype,
                               "--size", flags.size, "--kind", flags.kind, "--shards", flags.shards)
            print(f"{dtype}: {json.dumps(made)}", file=sys.stderr)
        for method in flags.methods:
            for count in [2] if method == "slerp" else counts:
                bench.compare(dtype, method, count)
        if not flags.keep:
            shutil.rmtree(flags.workdir / dtype)
    rows = bench.finish()
    speeds = f"cp {rows[0]['copy_bytes_per_second'] / 1e9:.2f} GB/s read and written, " \
             f"{rows[0]['synced_copy_bytes_per_second'] / 1e9:.2f} GB/s with fsync"
    Console(width=160).print(table_of(rows, f"{flags.size} {flags.kind} checkpoints; {speeds}"))
    if flags.output:
        with flags.output.open("a") as file:
            file.writelines(json.dumps({**where, "size": flags.size, "kind": flags.kind,
                                        "precision": flags.precision, **row}) + "\n" for row in rows)
    for name in ("merge.yaml", "log.txt"):
        (flags.workdir / name).unlink(missing_ok=True)
    if any("unlike" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
