"""Many small programs in turn on two processes: their messages must not mix.

Without `hosts.in_order` this ends in a deadlock within seconds: a copy and the collective that needs it are
started once more before the first pair is through, and Gloo cannot tell the two collectives apart.
"""

import json

import numpy as np
import pytest
from processes import Run

pytestmark = pytest.mark.slow
ROUNDS, LEAVES = 60, 24
HOST = f"""
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from elm_jax.runtime import hosts, sharding
hosts.start()
mesh = sharding.make_mesh(4, 2)
split = NamedSharding(mesh, PartitionSpec("data", "model"))
targets = [NamedSharding(mesh, PartitionSpec(None, "model")), NamedSharding(mesh, PartitionSpec())]
values = [np.random.default_rng(number).normal(size=(64, 64)).astype("float32") for number in range({LEAVES})]
leaves = [hosts.put(value, split) for value in values]
times = jax.jit(lambda leaf: leaf.T @ leaf, out_shardings=split)
for turn in range({ROUNDS}):
    moved = [hosts.put(leaf, targets[number % 2], own=True) for number, leaf in enumerate(leaves)]
    squares = [hosts.in_order(times(hosts.in_order(leaf))) for leaf in moved]
sums = [float(hosts.whole(leaf).astype("float64").sum()) for leaf in squares]
print(json.dumps([[hosts.count(), len(jax.devices())], sums]), flush=True)
hosts.finish()
"""


def test_messages_of_programs_do_not_mix(tmp_path):
    run = Run(tmp_path, [HOST], program=("-c",))
    assert run.wait(240) == [0, 0], run.said()[-3000:]
    for output in run.outputs:
        words = [line for line in output.read_text().splitlines() if line.startswith("[[")]
        (count, devices), sums = json.loads(words[0])
        assert (count, devices) == (2, 8)
        for number, found in enumerate(sums):
            leaf = np.random.default_rng(number).normal(size=(64, 64)).astype("float32").astype("float64")
            assert found == pytest.approx((leaf.T @ leaf).sum(), rel=1e-3, abs=1e-2)
