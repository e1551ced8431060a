"""Benchmarks run, at their smallest: nothing else calls them."""

import os
import subprocess
import sys

import pytest
from checkout import ROOT


@pytest.mark.slow
def test_the_benchmarks_of_tiny_shapes_run():
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for words in (["accelerator.py"], ["mixed_batch.py"], ["stacked.py", "--experts", "1,2"],
                  ["trunk_cache.py", "--tiny"]):
        command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:], "--rounds", "1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("{"), done.stderr[-2000:]
