"""Two processes on one mesh: each reads its own slices only, and together they hold the base."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import hf_folders
import pytest
import torch

from elm_jax import trees
from elm_jax.experts.base import load_base
from elm_jax.experts.formats import elm, hf

HOST = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import numpy as np
from jax.experimental import multihost_utils
from elm_jax import sharding, trees
from elm_jax.experts.base import load_base
from elm_jax.experts.formats import elm, streaming
elements, whole = 0, 0
for kind in (streaming.StoredTensors, elm.ElmTensors):
    def counted(self, path, index=None, read=kind.read):
        global elements, whole
        part = read(self, path, index)
        whole += index is None
        elements += part.size if index is not None else 0
        return part
    kind.read = counted
base = load_base(sys.argv[1], mesh=sharding.make_mesh(1, 8))
sums = {path: float(jax.jit(lambda x: (x.astype("float32") ** 2).sum())(leaf))
        for path, leaf in trees.flatten(base.params).items()}
local = sum(shard.data.size for leaf in trees.flatten(base.params).values()
            for shard in leaf.addressable_shards)
print(json.dumps({"fingerprint": base.fingerprint, "elements": elements, "whole": whole, "sums": sums,
                  "total": trees.count(base.params), "local": local}))
"""


def on_two_hosts(folder: pathlib.Path) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    hosts = [subprocess.Popen([sys.executable, "-c", HOST, str(folder), address, str(number)], text=True,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for number in range(2)]
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert all(host.returncode == 0 for host in hosts), outputs[0][1][-2000:] + outputs[1][1][-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "elm"])
def test_each_host_reads_its_own_slices(kind, tmp_path):
    hf_folders.publish(hf_folders.build("t5_1_1", torch.bfloat16), "t5_1_1", tmp_path / "hf")
    elm.write_elm(tmp_path / "elm", hf.open_hf(tmp_path / "hf"))
    whole = load_base(tmp_path / "hf")
    first, second = on_two_hosts(tmp_path / kind)
    assert first["fingerprint"] == second["fingerprint"] == whole.fingerprint
    assert first["sums"] == pytest.approx(second["sums"]) and first["total"] == second["total"]
    for path, leaf in trees.flatten(whole.params).items():
        assert first["sums"][path] == pytest.approx(float((leaf.astype("float64") ** 2).sum()), rel=1e-5)
    # The first host alone reads whole leaves, once, for a fingerprint that no file records.
    leaves = len(first["sums"])
    assert (first["whole"], second["whole"]) == ((leaves, 0) if kind == "hf" else (0, 0))
    for host in (first, second):
        assert host["elements"] < 0.75 * host["total"], "some leaves are too small to be split"
