"""Conversion of a model of T5-XL's real shapes (2.85 B parameters): memory, and speed against the disk's.

    python benchmarks/convert.py WORKDIR [--size xl] [--dtype bfloat16] [--keep]

Random weights are written as a Hugging Face folder in shards, tensor by tensor. Then each of these runs in
a process of its own, in turn: hf -> elm, elm -> hf, and before and after each a plain copy of the same
files, followed by a sync. Printed are the peak resident size of each process against its bound, 1.2 times
the largest tensor plus 1 GB; its speed as a share of the copy's; and whether the folder that came back holds
the bits of the first. WORKDIR needs room for four copies of the model (XL in bfloat16: 23 GB) and is left
empty.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns the name "bfloat16" from it)
import numpy as np

from elm_jax.cli import gin_config as config_lib
from elm_jax.formats.hf import t5_models
from elm_jax.formats.model import Model, TensorSpec
from elm_jax.formats.tensors import safetensors_files
from elm_jax.formats.tensors.streaming import PIECE_BYTES

GIGA = 1e9


class RandomTensors:
    """`Tensors` whose values are random bits of a finite number, made piece by piece from a fixed seed."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        self.specs = {path: TensorSpec(shape, dtype) for path, shape in shapes.items()}
        self.origins: dict[str, Any] = {}

    def read(self, path: str, index: object = None) -> np.ndarray:
        """A whole leaf."""
        spec = self.specs[path]
        out = np.empty(spec.shape, np.dtype(spec.dtype))
        draw = np.random.default_rng(list(self.specs).index(path))
        flat, step = out.reshape(-1), PIECE_BYTES // 4
        for start in range(0, flat.size, step):
            part = flat[start:start + step]
            part[...] = draw.standard_normal(part.size, np.float32).astype(out.dtype)
        return out


def make_model(folder: pathlib.Path, size: str, dtype: str) -> None:
    """Writes the Hugging Face folder that is converted."""
    config_lib.parse([f"models/{size}.gin"], [])
    config = config_lib.build("T5Config")
    t5_models.write_hf(folder, Model("elm", "random", config, RandomTensors(t5_models.leaf_shapes(config),
                                                                            dtype)))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own.

    This process must stay small: Linux counts its resident size into the peak of those that it starts.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measured(arguments: list[str]) -> tuple[float, float, int]:
    """(seconds, processor seconds, peak resident bytes) of a child process."""
    start = time.monotonic()
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    os.sync()
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def convert(source_kind: str, source: pathlib.Path, target_kind: str, target: pathlib.Path) -> list[str]:
    """The command line of a conversion."""
    return [sys.executable, "-m", "elm_jax.cli", "convert", "--from", source_kind, "--to", target_kind,
            str(source), str(target)]


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds of cp and sync."""
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def forget(folder: pathlib.Path) -> None:
    """Drops a folder's files from the page cache, so that every reader has to go to the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same_bits(left: pathlib.Path, right: pathlib.Path) -> bool:
    """Whether two Hugging Face folders hold equal tensors."""
    ours, theirs = safetensors_files.open_tensors(left), safetensors_files.open_tensors(right)
    if ours.keys() != theirs.keys():
        return False
    for name, tensor in ours.items():
        rows = max(1, PIECE_BYTES // max(1, math.prod(tensor.shape[1:]) * 4))
        for one, other in zip(_blocks(tensor, rows), _blocks(theirs[name], rows), strict=True):
            if not np.array_equal(one, other):
                return False
    return True


def _blocks(tensor: safetensors_files.StoredTensor, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, tensor.shape[0], rows):
        block = np.empty((min(rows, tensor.shape[0] - start), *tensor.shape[1:]), np.dtype(tensor.dtype))
        tensor.fill(block, start)
        yield block.view(np.uint8)


def main() -> None:
    """Parses the flags, runs everything in turn, prints the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--size", default="xl", help="a file of gin/models (default: xl)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="leave the folders where they are")
    flags = parser.parse_args()
    source, middle, back = (flags.workdir / name for name in ("source", "elm", "back"))
    flags.workdir.mkdir(parents=True, exist_ok=True)
    apart(make_model, source, flags.size, flags.dtype)
    tensors = safetensors_files.open_tensors(source)
    sizes = [math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors.values()]
    total, largest = sum(sizes), max(sizes)
    bound = 1.2 * largest + GIGA
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    print(f"{len(tensors)} tensors, {parameters:,} parameters, {total / GIGA:.2f} GB, largest "
          f"{largest / GIGA:.3f} GB, in {len(list(source.glob('model-*.safetensors'))) or 1} files")
    rows: dict[str, dict[str, float]] = {}
    copies = []
    for name, command, read in (("hf -> elm", convert("hf", source, "elm", middle), source),
                                ("elm -> hf", convert("elm", middle, "hf", back), middle)):
        forget(read)
        copies.append(copy(read, flags.workdir / "copy"))
        forget(read)
        seconds, processor, peak = measured(command)
        forget(read)
        copies.append(copy(read, flags.workdir / "copy"))
        copying = (copies[-1] + copies[-2]) / 2
        rows[name] = {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak,
                      "copy_seconds": copying, "share_of_copy": copying / seconds}
        print(f"{name}: {seconds:.1f} s ({total / 1e6 / seconds:.0f} MB/s, {processor:.1f} processor s); "
              f"cp and sync of the same files {copies[-2]:.1f} and {copies[-1]:.1f} s; "
              f"{100 * copying / seconds:.0f} % of the disk's speed; peak {peak / GIGA:.3f} GB of "
              f"{bound / GIGA:.3f} GB allowed {'(within)' if peak <= bound else '(ABOVE)'}")
    equal = apart(same_bits, source, back)
    print("the folder that came back holds the same bits" if equal else "THE BITS DIFFER")
    print(json.dumps({"machine": platform.platform(), "processors": os.cpu_count(), "load": os.getloadavg(),
                      "size": flags.size, "dtype": flags.dtype, "bytes": total, "largest": largest,
                      "bound": bound, "equal": equal, **rows}))
    if not flags.keep:
        for folder in (source, middle, back):
            shutil.rmtree(folder)
    if not equal or any(row["peak_bytes"] > bound for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
