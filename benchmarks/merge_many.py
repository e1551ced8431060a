"""Many experts of T5-XL's shapes on a modest host: what a merge of 36 plans, and what it really needs.

    python benchmarks/merge_many.py WORKDIR [--experts 36] [--methods mean,ties] [--share 10]
        [--dtype bfloat16]

1. The plan (`elm merge --dry_run`) of all leaves, on files that hold headers and no contents (sparse files).
2. The same merge of every tenth leaf, on real contents: three checkpoints of random values, which the
   experts' folders link to in turn. Measured: wall time and the peak resident size of the process.

Prints one line of JSON for each method.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from elm_jax.formats.hf import t5_models
from elm_jax.formats.model import TensorSpec
from elm_jax.formats.tensors import safetensors_files
from elm_jax.models.t5.config import T5Config

XL = T5Config(vocab_size=32128, emb_dim=2048, num_heads=32, head_dim=64, mlp_dim=5120, num_encoder_layers=24,
              num_decoder_layers=24, mlp_activations=("gelu", "linear"), logits_via_embedding=False)
DISTINCT = 3
PIECE = 1 << 22
SETTINGS = {"ties": ["--density", "0.2"]}


def specs_of(dtype: str, share: int) -> dict[str, TensorSpec]:
    """Every so-manieth leaf of T5-XL, from the first."""
    shapes = t5_models.leaf_shapes(XL)
    return {path: TensorSpec(shapes[path], dtype) for path in sorted(shapes)[::share]}


def write_sparse(folder: pathlib.Path, specs: dict[str, TensorSpec]) -> None:
    """A file of the right length with a header and a hole."""
    folder.mkdir(parents=True)
    text, _ = safetensors_files.make_header(specs, {"format": "pt"})
    path = folder / safetensors_files.SINGLE_FILE
    path.write_bytes(text)
    os.truncate(path, len(text) + sum(spec.nbytes for spec in specs.values()))


def write_random(folder: pathlib.Path, specs: dict[str, TensorSpec], seed: int) -> None:
    """Normal values of deviation 0.02, a few million different ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pool = (0.02 * rng.standard_normal(PIECE, np.float32)).astype(jnp.dtype(next(iter(specs.values())).dtype))

    def contents(name: str) -> Any:
        left = int(np.prod(specs[name].shape))
        while left:
            yield np.roll(pool, int(rng.integers(PIECE)))[:left]
            left -= min(left, PIECE)

    safetensors_files.write_file(folder / safetensors_files.SINGLE_FILE, specs, contents, {"format": "pt"})


def links(folder: pathlib.Path, targets: list[pathlib.Path], count: int) -> list[str]:
    """Folders that link to the targets in turn."""
    found = []
    for number in range(count):
        link = folder / f"expert{number}"
        link.symlink_to(targets[number % len(targets)], target_is_directory=True)
        found.append(str(link))
    return found


def command(method: str, experts: list[str], base: pathlib.Path) -> list[str]:
    """The merge, without where it goes."""
    with_base = ["--base", str(base), *SETTINGS.get(method, [])] if method != "mean" else []
    return [sys.executable, "-m", "elm_jax.cli", "merge", "--method", method, *with_base, "--json", *experts]


def measured(words: list[str]) -> tuple[dict[str, Any], float, int]:
    """What it printed, its seconds, its peak resident bytes."""
    start = time.monotonic()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed: {' '.join(words)}")
    return json.loads(text), time.monotonic() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Plans all, then merges a share."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--experts", type=int, default=36)
    parser.add_argument("--methods", default="mean,ties")
    parser.add_argument("--share", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    flags = parser.parse_args()
    root = flags.workdir / "merge_many"
    try:
        write_sparse(root / "whole", specs_of(flags.dtype, 1))
        (root / "plan").mkdir()
        planned = links(root / "plan", [(root / "whole").resolve()], flags.experts)
        part = specs_of(flags.dtype, flags.share)
        real = [(root / f"part{number}").resolve() for number in range(DISTINCT)]
        for number, folder in enumerate(real):
            write_random(folder, part, number)
        (root / "run").mkdir()
        experts = links(root / "run", real, flags.experts)
        for method in flags.methods.split(","):
            plan, _, _ = measured([*command(method, planned, root / "whole"), "--dry_run"])
            small, _, _ = measured([*command(method, experts, real[0]), "--dry_run"])
            report, seconds, peak = measured([*command(method, experts, real[0]), "--output",
                                              str(root / "merged")])
            shutil.rmtree(root / "merged")
            print(json.dumps({
                "method": method, "experts": flags.experts, "dtype": flags.dtype,
                "planned": {name: value for name, value in plan.items()
                            if name.startswith("num_") or "bytes" in name},
                "part": {"num_leaves": report["num_leaves"], "bytes_to_read": small["bytes_to_read"],
                         "planned_memory_bytes": small["memory_bytes"], "peak_bytes": peak,
                         "seconds": round(seconds, 1)}}), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
