"""The processes of one run: how they find each other, and what they do together.

One process for each host, each with its own devices, all running the same program: JAX's multi-controller
model. The first process writes, and sends the others what it alone finds out.

Names: ``--coordinator_address --num_processes --process_id`` are `jax.distributed.initialize`'s own, so
that its documentation applies; T5X's ``--process_count`` and ``--process_index`` are accepted as well.
"""

import atexit
import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # JAX has no public name for its key-value store
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from elm_jax.errors import LOST_PROCESS, InputError, RunError, describe
from elm_jax.runtime.lifeline import Lifeline, give_time_before_abort, leave_process
from elm_jax.types import Batch

ENVIRONMENT = {"coordinator_address": "ELM_COORDINATOR", "num_processes": "ELM_NUM_PROCESSES",
               "process_id": "ELM_PROCESS_ID"}
START_SECONDS = 300
_KEY = "elm_jax/lifeline"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")

Value = TypeVar("Value")
_LINE: Lifeline | None = None
_ALONE = False  # whether the first process runs a function for which the others wait


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's id and its address within a run of several processes.

    Attributes:
        coordinator_address: ``host:port`` of the first process.
        num_processes: how many there are.
        process_id: number of this one, from 0.
        local_device_ids: its accelerators among those of its host; None for all.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


# -- starting


def place_of(coordinator_address: str | None, num_processes: int | None, process_id: int | None,
             environment: Mapping[str, str]) -> Place | None:
    """The place that flags, ``ELM_*`` variables or Slurm give; None if they describe a single process.

    Raises:
        InputError: one of the three is missing, or is no number that fits.
    """
    given: dict[str, Any] = {"coordinator_address": coordinator_address, "num_processes": num_processes,
                             "process_id": process_id}
    for name, variable in ENVIRONMENT.items():
        if given[name] is None and environment.get(variable):
            given[name] = environment[variable]
    if str(given["num_processes"]) == "1" or not any(value is not None for value in given.values()):
        asked_for_one = given["num_processes"] is not None
        return None if asked_for_one else _slurm_place(environment)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise InputError(describe(
            "A run of several processes needs three settings", got=f"no {', no '.join(missing)}",
            expected=", ".join(f"--{name} ({variable})" for name, variable in ENVIRONMENT.items())))
    return _checked(str(given["coordinator_address"]), given["num_processes"], given["process_id"])


def _checked(address: str, num_processes: Any, process_id: Any) -> Place:
    try:
        place = Place(address, int(num_processes), int(process_id))
        port = int(address.rsplit(":", 1)[1])
    except (ValueError, IndexError):
        place, port = None, 0
    if place is None or not 0 < port < 65536 or not 0 <= place.process_id < place.num_processes:
        raise InputError(describe(
            "The place of a process is wrong",
            got=f"coordinator {address}, process {process_id} of {num_processes}",
            expected="HOST:PORT, and a process from 0 to below the number of processes"))
    return place


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    """The place in a Slurm step of several tasks.

    Not JAX's own detection, which gives every task one accelerator, also where a task has a whole node.
    """
    if any(name not in environment for name in _SLURM) or int(environment["SLURM_STEP_NUM_TASKS"]) < 2:
        return None
    step = environment.get("SLURM_STEP_ID", "0")
    port = (int(environment["SLURM_JOB_ID"]) + (int(step) if step.isdecimal() else 0)) % 4096 + 61440
    first = first_node(environment["SLURM_STEP_NODELIST"])
    return Place(f"{first}:{port}", int(environment["SLURM_STEP_NUM_TASKS"]),
                 int(environment["SLURM_PROCID"]), _slurm_devices(environment))


def first_node(nodes: str) -> str:
    """The first host of Slurm's node list: ``node[003-005,9],other`` -> ``node003``."""
    head = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if head is None:
        raise InputError(describe("Slurm's list of nodes cannot be read", got=nodes))
    return head[1] + (head[2] or "")


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's share of its node's GPUs, if several tasks of a node see all of them."""
    tasks = int(re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if tasks < 2 or len(visible) < tasks:
        return None
    share, place = len(visible) // tasks, int(environment.get("SLURM_LOCALID", "0"))
    return tuple(range(place * share, (place + 1) * share))


def start(coordinator_address: str | None = None, num_processes: int | None = None,
          process_id: int | None = None) -> None:
    """Joins this process to its run, if flags, environment, Slurm, MPI or a TPU pod describe several.

    Call it before anything that asks JAX for its devices.

    Raises:
        InputError: the settings do not fit each other.
        RunError: JAX refuses. If the others do not join in time, the process ends with status 75.
    """
    place = place_of(coordinator_address, num_processes, process_id, os.environ)
    one_asked_for = str(num_processes or os.environ.get(ENVIRONMENT["num_processes"], "")) == "1"
    if place is None and (one_asked_for or not _found_by_jax()):
        return
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    settings = {} if place is None else {
        **dataclasses.asdict(place), "local_device_ids": place.local_device_ids,
        "cluster_detection_method": "deactivate"}
    where = "the address that the cluster gives" if place is None else place.coordinator_address
    # Before JAX's own limit, at which its C++ client aborts.
    alarm = threading.Timer(START_SECONDS, leave_process, (LOST_PROCESS, "elm: " + describe(
        "The processes of this run did not find each other", where=where,
        got=f"not all of them within {START_SECONDS} s" + (
            "" if place is None else f"; this is process {place.process_id} of {place.num_processes}"),
        cure="start all of them within that time, with one address that all reach")))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(**settings, initialization_timeout=START_SECONDS + 60)
    except ValueError as error:
        if place is None and "should be defined" in str(error):
            return  # an accelerator host that belongs to no pod
        raise InputError(describe("JAX cannot start several processes", got=str(error))) from error
    except RuntimeError as error:
        raise RunError(describe("JAX cannot start several processes", where=where,
                                got=str(error)[:300])) from error
    finally:
        alarm.cancel()
    if count() > 1:
        give_time_before_abort()
        line()
    else:  # a pod of one host: JAX's preemption service has taken SIGTERM, but nothing would query it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _found_by_jax() -> bool:
    """Whether `jax.distributed.initialize` can find the others itself: Open MPI, or a TPU host."""
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (platforms == "" or "tpu" in platforms) and on_tpu_host()


def on_tpu_host() -> bool:
    """Whether this host has TPU chips and the TPU library."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


# -- numbers of processes


def index() -> int:
    """Number of this process, from 0; process 0, the first, writes."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def count() -> int:
    """Number of processes of this run."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the first process, which writes."""
    return index() == 0


def line() -> Lifeline:
    """Returns the connections between the processes; every process must call it, to make them."""
    global _LINE
    if _LINE is None:
        made, client = Lifeline(index(), count()), distributed.global_state.client
        if index() == 0:
            client.key_value_set(_KEY, json.dumps(made.serve()))
            made.wait_for_all()
        else:
            told = json.loads(client.blocking_key_value_get(_KEY, START_SECONDS * 1000))
            made.join(distributed.global_state.coordinator_address.rsplit(":", 1)[0].strip("[]"), told)
        _LINE = made
        atexit.register(made.leave)
    return _LINE


# -- collective calls


def by_first(function: Callable[[], Value]) -> Value:
    """Calls a function in the first process and returns its result in all; the others wait without a limit.

    Inside the function the first process counts as the only one, so it may call functions that otherwise
    every process must call. An error in the first process ends all (see `fail`).

    Args:
        function: gives a JSON value.
    """
    global _ALONE
    if count() == 1 or _ALONE:
        return function()
    if not is_first():
        return line().told()
    _ALONE = True
    try:
        value = function()
    finally:
        _ALONE = False
    line().tell(value)
    return value


def barrier() -> None:
    """Waits until all processes have called it."""
    if count() > 1 and not _ALONE:
        line().barrier()


def fail(status: int, text: str) -> NoReturn:
    """Ends all processes with a status; the first one prints the text. Only for several processes."""
    line().fail(status, text)


def finish() -> None:
    """Waits until all processes are done, then closes their connections."""
    if count() == 1 or _LINE is None:
        return
    _LINE.barrier()
    _LINE.leave()
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()


# -- arrays


def in_order(result: Value) -> Value:
    """Returns a program's result; with several processes on CPUs it first waits until it is computed.

    XLA starts dispatched programs on a CPU in the order in which their inputs become ready, which differs
    between processes, and Gloo distinguishes the messages of two programs by their order alone: they
    deadlock, or mix up their data. Accelerators run programs in dispatch order, so nothing waits there.
    """
    if count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(result)
    return result


def rows_of(where: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices hold, ascending, i64[n]."""
    held = where.addressable_devices_indices_map((batch_size,)).values()
    parts = {tuple(range(batch_size)[part]) for (part,) in held}
    return np.unique(np.concatenate([np.asarray(part, np.int64) for part in parts]))


def put_rows(batch: Batch, rows: np.ndarray, where: jax.sharding.Sharding, batch_size: int) -> Batch:
    """Puts a global batch on the mesh; every process provides its own rows.

    Args:
        batch: arrays [n, ...], the rows `rows` of the global batch.
        rows: as `rows_of` gives them.
        where: splits axis B.
        batch_size: B of the global batch.
    """
    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return array[np.searchsorted(rows, wanted)][(slice(None), *index[1:])]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), where, part)

    return {name: place(np.asarray(array)) for name, array in batch.items()}


def put(leaf: Any, where: jax.sharding.Sharding, *, own: bool = False) -> jax.Array:
    """Puts one array on the mesh; an array that every process holds whole is split without communication.

    Args:
        leaf: an array that this process holds whole, or one that is split over several processes.
        where: target sharding.
        own: whether the result must share no buffer with `leaf`, because it will be donated.
    """
    if count() == 1 or is_spread(leaf):
        leaf = in_order(leaf)
        if own:
            leaf = in_order(jnp.array(leaf, copy=True))
        return in_order(jax.device_put(leaf, where, may_alias=False if own else None))
    held = np.asarray(leaf)
    return jax.make_array_from_callback(held.shape, where, lambda index: np.array(held[index]))


def whole(leaf: Any) -> np.ndarray:
    """Returns an array's contents as numpy, also if it is split over processes (every process must call)."""
    if not is_spread(leaf):
        return np.asarray(jax.device_get(leaf))
    if not isinstance(leaf.sharding, NamedSharding):
        return np.asarray(multihost_utils.process_allgather(in_order(leaf), tiled=True))
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    found = in_order(jax.jit(_same, out_shardings=everywhere)(in_order(leaf)))
    return np.asarray(found.addressable_data(0))


def _same(leaf: jax.Array) -> jax.Array:
    """The identity as a module-level function, so that jit caches its programs."""
    return leaf


def to_host(tree: Any) -> Any:
    """Returns a tree as numpy arrays; leaves that are split over several processes stay on the devices."""
    return jax.tree.map(lambda leaf: leaf if is_spread(leaf) else np.asarray(jax.device_get(leaf)), tree)


def is_spread(leaf: Any) -> bool:
    """Whether an array is split over several processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
