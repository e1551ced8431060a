"""Places of processes, shares of batches, and what a stream reads for a share."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from t5_rows import FORM

from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.errors import InputError
from elm_jax.runtime import hosts, sharding

LENGTHS = {"inputs": 24, "targets": 8}
SLURM = {"SLURM_JOB_ID": "9000", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07,09-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


def test_flags_win_over_the_environment():
    env = {"ELM_COORDINATOR": "a:1", "ELM_NUM_PROCESSES": "3", "ELM_PROCESS_ID": "2"}
    assert hosts.place_of(None, None, None, env) == hosts.Place("a:1", 3, 2)
    assert hosts.place_of("b:2", 4, 0, env) == hosts.Place("b:2", 4, 0)
    assert hosts.place_of(None, 1, None, {**SLURM, **env}) is None  # this one alone, wherever it is
    assert hosts.place_of(None, None, None, {}) is None


@pytest.mark.parametrize("given", [
    ("a:1", 2, None), (None, 2, 0), ("a", 2, 0), ("a:1", 2, 2), ("a:1", 2, -1), ("a:x", 2, 0),
    ("a:1", "x", 0)])
def test_half_a_place_is_refused(given):
    with pytest.raises(InputError, match="process"):
        hosts.place_of(*given, {})


def test_slurm_tells_the_place():
    place = hosts.place_of(None, None, None, SLURM)
    assert place == hosts.Place(f"gpu07:{9002 % 4096 + 61440}", 4, 3)
    shared = {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}  # both tasks of the node see all its GPUs
    assert hosts.place_of(None, None, None, shared).local_device_ids == (2, 3)
    bound = {**SLURM, "CUDA_VISIBLE_DEVICES": "3"}  # Slurm has bound each task to its own
    assert hosts.place_of(None, None, None, bound).local_device_ids is None
    assert hosts.place_of(None, None, None, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(("nodes", "first"), [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"),
    ("node[7,9-15]", "node7"), ("10.0.0.1", "10.0.0.1")])
def test_the_first_node_of_a_list(nodes, first):
    assert hosts.first_node(nodes) == first


def test_one_process_is_the_first_of_one():
    assert (hosts.index(), hosts.count(), hosts.is_first()) == (0, 1, True)
    hosts.barrier()
    hosts.finish()
    assert hosts.by_first(lambda: [1, "a"]) == [1, "a"]


class HostOf:
    """A sharding as one of several hosts sees it: only some of the mesh's devices are its own."""

    def __init__(self, where: NamedSharding, devices) -> None:
        self._where, self._own = where, set(devices)

    def addressable_devices_indices_map(self, shape):
        found = self._where.devices_indices_map(shape)
        return {device: index for device, index in found.items() if device in self._own}


def hosts_of(mesh, count):
    devices = jax.devices()
    each = len(devices) // count
    return [HostOf(sharding.batch_sharding(mesh), devices[number * each:(number + 1) * each])
            for number in range(count)]


@pytest.mark.parametrize(("shape", "count", "shares"), [
    ((8, 1), 2, [range(0, 8), range(8, 16)]), ((8, 1), 4, [range(4 * i, 4 * i + 4) for i in range(4)]),
    ((2, 4), 2, [range(0, 8), range(8, 16)]), ((2, 4), 4, [range(8), range(8), range(8, 16), range(8, 16)]),
    ((1, 8), 2, [range(16), range(16)])])
def test_the_rows_of_a_host_are_those_of_its_devices(shape, count, shares):
    found = [list(hosts.rows_of(where, 16)) for where in hosts_of(sharding.make_mesh(*shape), count)]
    assert found == [list(share) for share in shares]


class CountingSource:
    """Examples that say who they are, and which of them were read."""

    def __init__(self, size: int = 40) -> None:
        self.size, self.read = size, []

    def __len__(self) -> int:
        return self.size

    def lengths_of(self, index: int, epoch: int = 0) -> tuple[int, int]:
        del epoch
        return 2 + index % 7, 2

    def example(self, index: int, epoch: int = 0):
        self.read.append((epoch, index))
        return (np.full(self.lengths_of(index)[0], 2 + index, np.int32), np.array([2 + index, 1], np.int32))


@pytest.mark.parametrize("pack", [False, True])
def test_hosts_read_disjoint_shares_whose_union_is_the_batch(pack):
    """Of an example, its host alone reads the tokens; the rows are those of a single process, bit for bit."""
    def stream():
        return TrainStream(CountingSource(), form=FORM, batch_size=16, lengths=LENGTHS, seed=3, pack=pack)

    whole = stream()
    shares = [(stream(), hosts.rows_of(where, 16)) for where in hosts_of(sharding.make_mesh(8, 1), 2)]
    for step in range(6):  # over epochs' ends too
        whole.source.read.clear()
        expected = whole.batch(step)
        parts = []
        for own, rows in shares:
            own.source.read.clear()
            parts.append(own.batch(step, rows))
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
        reads = [set(own.source.read) for own, _ in shares]
        assert reads[0] and reads[1] and not reads[0] & reads[1]
        assert reads[0] | reads[1] == set(whole.source.read)


def test_rows_on_the_mesh_are_the_global_batch():
    mesh = sharding.make_mesh(4, 2)
    where = sharding.batch_sharding(mesh)
    batch = {"a": np.arange(48).reshape(8, 6), "b": np.arange(8.0, dtype=np.float32)}
    placed = hosts.put_rows(batch, hosts.rows_of(where, 8), where, 8)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), array.ndim)


def test_lengths_are_told_without_reading():
    rows = [{"inputs": np.arange(1, 3 + number), "targets": np.arange(1, 2 + number % 3 + 1),
             "text": {"inputs": "x", "targets": "y", "choices": [], "index": number}} for number in range(5)]
    split = PreparedSplit.from_rows("t", "train", {"kind": "generation"}, rows)
    mixture = MixtureSource([split, split], [3, None], seed=1)
    for source in (split, mixture):
        for index in range(len(source)):
            inputs, targets = source.example(index, 2)
            assert source.lengths_of(index, 2) == (len(inputs), len(targets))

