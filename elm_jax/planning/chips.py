"""Chips that runs are planned for without having them: their facts, and descriptions of their devices."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from elm_jax.errors import InputError, describe, unknown_name

LIBTPU = "libtpu==0.0.51"
"""The release that is tested with jax 0.10.2; 205 MB, 586 MB unpacked."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of one kind of chip.

    Attributes:
        memory: bytes of HBM, as sold (10^9 bytes to a GB). flops: peak of bfloat16 products a second.
        memory_rate: bytes a second that HBM gives. wire_rate: bytes a second that a chip sends along one ring
        of its neighbours, both directions together:
            on a torus two of its ports, however many others it has.
        source: of these figures.
        platform: for which XLA compiles.
        options: of `topologies.get_topology_desc`.
    """

    memory: float
    flops: float
    memory_rate: float
    wire_rate: float
    source: str
    platform: str = "tpu"
    options: tuple[tuple[str, str], ...] = ()


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_ONE_DEVICE_A_CHIP = (("chip_config_name", "megacore"),)
CHIPS = {
    # 1600 Gbit/s over 4 ports: 50 GB/s a port.
    "v5e": Chip(16e9, 197e12, 819e9, 100e9, _DOCS + "v5e"),
    # 2400 Gbit/s over 6 ports: 50 GB/s a port.
    "v4": Chip(32e9, 275e12, 1228e9, 100e9, _DOCS + "v4", options=_ONE_DEVICE_A_CHIP),
    # 4800 Gbit/s over 6 ports: 100 GB/s a port.
    "v5p": Chip(95e9, 459e12, 2765e9, 200e9, _DOCS + "v5p", options=_ONE_DEVICE_A_CHIP),
    # NVLink through switches: 900 GB/s, half of it in each direction.
    "h200": Chip(141e9, 989e12, 4800e9, 450e9, "https://www.nvidia.com/en-us/data-center/h200/", "gpu"),
    # Simulated devices of this machine, for trying things: no chip's figures.
    "cpu": Chip(16e9, 1e12, 50e9, 10e9, "none: round numbers", "cpu"),
}
_COMPILER_ONLY = {
    # A compiler has no use for the metadata server of a TPU host, and would wait for it.
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Nor does it take a chip, which only one process may: several plans are made at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_TOPOLOGY = re.compile(r"(?P<chip>\w+):(?P<shape>\d+(?:x\d+){0,2})")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips of one kind and the shape in which they are connected.

    Attributes:
        name: as it was given: ``v5e:4x4``.
        chip: facts of its chips.
        shape: of the slice; one number where there is no torus.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(self.shape)

    @property
    def is_compiled_for(self) -> bool:
        """Whether XLA compiles for these chips; if not, it compiles for as many CPU devices."""
        return self.chip.platform == "tpu"


def parse(text: str) -> Topology:
    """Parses a slice such as ``v5e:4x4``, ``v4:2x2x4``, ``h200:8``.

    Raises:
        InputError: another form, an unknown chip.
    """
    found = _TOPOLOGY.fullmatch(text)
    if not found:
        raise InputError(describe("This is no topology", where="--topology", got=text,
                                  expected="CHIP:SHAPE, for example v5e:4x4, v4:2x2x4, h200:8"))
    if found["chip"] not in CHIPS:
        raise unknown_name("chip", found["chip"], CHIPS, where="--topology")
    shape = tuple(int(size) for size in found["shape"].split("x"))
    if not math.prod(shape):
        raise InputError(describe("A topology has no chips", where="--topology", got=text))
    return Topology(text, CHIPS[found["chip"]], shape)


def devices_of(topology: Topology) -> list[jax.Device]:
    """Makes the devices of a slice: descriptions of TPU chips, or as many simulated CPU devices.

    Raises:
        InputError: no libtpu, a shape that the chip does not come in, too few simulated devices.
    """
    if not topology.is_compiled_for:
        return _simulated(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(describe(
            "Planning for TPUs needs libtpu, which holds their compiler", where=topology.name,
            got="no package libtpu", cure=f"pip install {LIBTPU} (or the extra [tpu]); no TPU is needed"))
    for name, value in _COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.shape))
    chip = topology.name.split(":")[0]
    shape += "x1" * (3 - len(topology.shape)) if chip in ("v4", "v5p") else ""
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{shape}", **dict(topology.chip.options))
    except Exception as error:
        text = str(error)
        raise InputError(describe("The compiler refuses the slice", where="--topology",
                                  got=f"{topology.name}: {text.splitlines()[0][:300]}")) from error
    return list(found.devices)


def _simulated(topology: Topology) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # once JAX has started, their number is fixed
        jax.config.update("jax_num_cpu_devices", topology.num_chips)
    devices = jax.devices("cpu")
    if len(devices) < topology.num_chips:
        raise InputError(describe(
            "Too few simulated devices", where=topology.name, got=len(devices),
            expected=topology.num_chips,
            cure=f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.num_chips}"))
    return devices[: topology.num_chips]
