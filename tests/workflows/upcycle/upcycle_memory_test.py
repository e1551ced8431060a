"""Peak memory of upcycling: copies of a feed-forward take none, however many experts there are."""

import os
import pathlib
import subprocess
import sys

import pytest
import weights

from elm_jax.experts.base import save_base
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network

UPCYCLE = """
import pathlib, sys
from elm_jax.cli import main as cli
status = cli.main(["upcycle", *sys.argv[1:]])
# Not getrusage: its peak counts that of the process which started this one.
print("peak", 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
sys.exit(status)
"""
CONFIG = T5Config(64, 1024, 2, 8, 2048, 1, 1, mlp_activations=("relu",), logits_via_embedding=True)
KERNEL = CONFIG.emb_dim * CONFIG.mlp_dim * 4


def peak_of(base: pathlib.Path, experts: int, output: pathlib.Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", UPCYCLE, "--base", str(base), "--output", str(output), "--num_experts",
         str(experts), "--step", "1"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for the peak")
def test_more_copies_take_no_more_memory(tmp_path):
    """32 copies of a kernel are 235 MB more than 4, of which there are four such leaves."""
    save_base(tmp_path / "base", weights.drawn(T5Network(CONFIG)), CONFIG, None, {})
    few, many = (peak_of(tmp_path / "base", experts, tmp_path / f"{experts}") for experts in (4, 32))
    assert many - few < 0.5 * (32 - 4) * KERNEL, f"{(many - few) / 1e6:.0f} MB more"
