"""Two processes on one mesh: each reads what its own devices hold, and together they hold the base."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import hf_folders
import numpy as np
import pytest

from elm_jax.experts.base import load_base
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import t5_models
from elm_jax.formats.model import Model
from elm_jax.formats.t5x import t5x_writer
from elm_jax.formats.tensors import streaming
from elm_jax.models.t5.hf_names import config_from_hf
from elm_jax.runtime import trees

# Every matrix but the biases is split eight ways, along its longer side.
SIZES = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 8, "num_layers": 2, "num_decoder_layers": 2,
         "vocab_size": 4096}
HOST = """
import json, os, pathlib, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from elm_jax.runtime import sharding, trees
from elm_jax.experts.base import load_base
def bytes_read():  # by every read of this process, whoever makes it
    return int(pathlib.Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
mesh = sharding.make_mesh(1, 8)
load_base(sys.argv[1], mesh=mesh)  # loads Python's own files
before = bytes_read()
base = load_base(sys.argv[1], mesh=mesh)
read = bytes_read() - before
sums = {path: float(jax.jit(lambda x: (x.astype("float32") ** 2).sum())(leaf))
        for path, leaf in trees.flatten(base.params).items()}
local = sum(shard.data.size for leaf in trees.flatten(base.params).values()
            for shard in {str(s.index): s for s in leaf.addressable_shards}.values())
print(json.dumps({"fingerprint": base.fingerprint, "read": read, "sums": sums, "local": 4 * local}))
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
@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
@pytest.mark.parametrize("kind", ["hf", "elm", "t5x"])
def test_each_host_reads_its_own_slices(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(elm_folders, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(t5x_writer, "CHUNK_BYTES", 1 << 16)
    config = config_from_hf({**hf_folders.PUBLISHED["t5_1_1"], **SIZES})
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=shape).astype(np.float32)
              for path, shape in t5_models.leaf_shapes(config).items()}
    model = Model("made", "made", config, streaming.ArrayTensors(trees.unflatten(params)))
    {"hf": t5_models.write_hf, "elm": elm_folders.write_elm,
     "t5x": t5x_writer.write_t5x}[kind](tmp_path / kind, model)
    whole = load_base(tmp_path / kind)
    total = 4 * trees.count(whole.params)
    first, second = on_two_hosts(tmp_path / kind)
    assert first["fingerprint"] == second["fingerprint"] == whole.fingerprint
    assert first["sums"] == pytest.approx(second["sums"])
    for path, leaf in trees.flatten(whole.params).items():
        assert first["sums"][path] == pytest.approx(float((leaf.astype("float64") ** 2).sum()), rel=1e-5)
    assert first["local"] == second["local"] == pytest.approx(total / 2, rel=0.01)
    # The first host alone reads all once more, for a fingerprint that no file records.
    for_fingerprint = total if kind != "elm" else 0
    # Headers and indices. Chunks that are asked for at once each read the database's list anew, 3 kB for
    # every one of the 64 kB here: 2 to 3.5 percent, as the threads run.
    lists = 0.06 * total
    print(kind, {host["read"] / total for host in (first, second)})
    assert second["local"] <= second["read"] < second["local"] + lists
    assert first["read"] < first["local"] + for_fingerprint + lists
