"""Plans `elm train`: memory, traffic and time of its step on chips that need not be present.

Compiles the step of `elm train` ahead of time for the slice, and reads the compiled program.
"""

import dataclasses
import logging
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.errors import RunError, describe
from elm_jax.experts.overlay import leaves_to_train
from elm_jax.models import families
from elm_jax.models.network import TRUNK_STATES, Network, NetworkConfig
from elm_jax.planning import hlo, traffic
from elm_jax.planning.chips import Topology, devices_of
from elm_jax.planning.token_flops import active_parameters
from elm_jax.runtime import sharding, trees
from elm_jax.training import state as states
from elm_jax.training import step as steps
from elm_jax.training.run_settings import RunSettings
from elm_jax.training.trunk.trunk_cache import abstract_states
from elm_jax.types import Batch, Params
from elm_jax.workflows.train import frozen_trunk
from elm_jax.workflows.train.train_config import FORM_OF_KIND, TrainConfig, check_expert_axis

logger = logging.getLogger(__name__)
GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Needs of one training step; bytes and operations are of one chip unless said otherwise.

    Attributes:
        title: which run.
        topology: ``v5e:4x4``.
        mesh: sizes of the mesh's axes.
        parameters: of the whole network; `trained` of them train.
        trained: see `parameters`.
        active: parameters that one token uses: of a sparse layer's experts those that it chooses.
        rows: global batch; `num_microbatches` parts of it run one after another.
        num_microbatches: see `rows`.
        lengths: (S, T).
        memory: bytes by use: frozen, overlay, optimizer, batch, temporaries, program.
        capacity: bytes of a chip's memory.
        compiled_for: ``tpu``, or ``cpu`` where there is no compiler for the chip: `memory`'s temporaries
            and `collectives` are then estimates.
        flops: of a step, all chips, of matrix products, recomputed ones too.
        collectives: `hlo.by_kind`.
        needed: `traffic.needs`.
        seconds: bounds of a step's time: compute, memory, wires.
        compile_seconds: of tracing and compiling.
        num_chips: of the slice.
        steps: of the whole run, at most; None if that depends on data.
    """

    title: str
    topology: str
    mesh: dict[str, int]
    parameters: int
    trained: int
    active: int
    rows: int
    num_microbatches: int
    lengths: tuple[int, int]
    memory: dict[str, int]
    capacity: float
    compiled_for: str
    flops: float
    collectives: dict[str, dict[str, float]]
    needed: list[traffic.Need]
    seconds: dict[str, float]
    compile_seconds: float
    num_chips: int
    steps: int | None

    @property
    def total(self) -> int:
        """Bytes that a chip needs."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the needed bytes fit into a chip's memory."""
        return self.total < self.capacity

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in a step, by the compiled program."""
        return sum(entry["bytes"] for entry in self.collectives.values())

    @property
    def must_send(self) -> float:
        """Bytes that a chip must send in a step, by the shardings."""
        return sum(need.bytes for need in self.needed)

    @property
    def ratio(self) -> float:
        """Sent over needed bytes; 1 if both are zero."""
        if self.must_send:
            return self.sent / self.must_send
        return 1.0 if self.sent < 1e6 else math.inf

    @property
    def cut_all_reduce(self) -> float:
        """Bytes of all-reduces beyond what is needed, as far as they can replace reduce-scatters.

        XLA for TPUs has no reduce-scatter on many slices (libtpu 0.0.51: v5e:2x2, 4x4, 8x8, 16x16, v4:2x2x4,
        4x4x4, v5p:2x2x4; v5e:2x4 and 4x8 have it): also one that the program spells out becomes an
        all-reduce over rings in all directions, of twice the bytes.
        """
        if self.compiled_for != "tpu":
            return 0.0
        needed = {kind: sum(need.bytes for need in self.needed if need.kind == kind)
                  for kind in ("all-reduce", "reduce-scatter")}
        sent = {kind: self.collectives.get(kind, {}).get("bytes", 0.0) for kind in needed}
        missing = max(0.0, needed["reduce-scatter"] - sent["reduce-scatter"])
        return min(2 * missing, max(0.0, sent["all-reduce"] - needed["all-reduce"]))

    @property
    def asked_ratio(self) -> float:
        """`ratio` of the collectives that the program asks for; see `cut_all_reduce`."""
        return self.ratio - (self.cut_all_reduce / 2 / self.must_send if self.must_send else 0.0)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Seconds of a step if all three bounds overlap wholly, and if none overlaps."""
        return max(self.seconds.values()), sum(self.seconds.values())

    @property
    def device_hours(self) -> tuple[float, float] | None:
        """Chip-hours of the whole run, by both times of `step_seconds`."""
        if self.steps is None:
            return None
        return tuple(self.steps * seconds * self.num_chips / 3600 for seconds in self.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-ready dictionary."""
        return {
            **dataclasses.asdict(self), "total": self.total, "fits": self.fits, "sent": self.sent,
            "must_send": self.must_send, "ratio": self.ratio, "cut_all_reduce": self.cut_all_reduce,
            "asked_ratio": self.asked_ratio, "step_seconds": self.step_seconds,
            "device_hours": self.device_hours,
        }


def plan_run(config: TrainConfig, network: NetworkConfig, topology: Topology, title: str = "") -> StepPlan:
    """Plans a run: compiles its step for a slice and accounts for it. Needs no base, data or chip.

    Args:
        config: the run.
        network: dimensions of its base.
        topology: the slice.
        title: for the table.

    Raises:
        InputError: mesh, batch and slice do not fit; no compiler.
        RunError: the program does not fit the chip's memory, says the compiler.
    """
    check_expert_axis(config, network)
    mesh = sharding.make_mesh(config.mesh_data, config.mesh_model, config.mesh_experts,
                              devices_of(topology))
    start = time.monotonic()
    spec = _spec(config, network, mesh)
    traced = steps.trace_step(spec)
    try:
        compiled = traced.lower().compile(steps.compiler_options(mesh))
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_fit(error, config, topology) from error
    seconds = time.monotonic() - start
    logger.info("compiled %s for %s in %.0f s", title or config.kind, topology.name, seconds)
    text = compiled.as_text()
    frozen, overlay = steps.abstract_of(spec.frozen), steps.abstract_of(spec.overlay)
    lengths = (config.task_feature_lengths["inputs"], config.task_feature_lengths["targets"])
    shape = traffic.StepShape(mesh, spec.rules, config.batch_size, *lengths, config.num_microbatches)
    collectives = hlo.by_kind(hlo.collectives_of(text, mesh.size))
    flops = traffic.flops_of(traced.jaxpr)
    memory = _memory(config, spec, frozen, overlay, compiled.memory_analysis())
    return StepPlan(
        title=title or config.kind, topology=topology.name, mesh=dict(mesh.shape),
        parameters=trees.count(frozen) + trees.count(overlay), trained=trees.count(overlay),
        active=active_parameters(spec.network.config.sparse, {
            path: leaf.size for part in (frozen, overlay) for path, leaf in trees.flatten(part).items()}),
        rows=config.batch_size, num_microbatches=config.num_microbatches, lengths=lengths, memory=memory,
        capacity=topology.chip.memory, compiled_for="tpu" if topology.is_compiled_for else "cpu",
        flops=flops, collectives=collectives, needed=traffic.needs(spec.network, frozen, overlay, shape),
        seconds=_seconds(topology, flops / _workers(spec), memory, collectives, config,
                         traffic.streamed_bytes(spec.network, frozen, overlay, shape)),
        compile_seconds=seconds, num_chips=topology.num_chips, steps=most_steps(config))


def most_steps(config: TrainConfig, num_datasets: int = 1) -> int | None:
    """Largest number of steps of a run: as given, or as the cap of examples allows, one example a row."""
    if config.train_steps is not None:
        return config.train_steps
    if config.max_examples is None:
        return None
    return math.ceil(config.epochs * config.max_examples * num_datasets / config.batch_size)


def _spec(config: TrainConfig, base: NetworkConfig, mesh: Mesh) -> steps.StepSpec:
    overlay, frozen = split_leaves(config, base)
    network = frozen_trunk.network_of(config, _network(config, base).config, overlay)
    batch = _batch(config, network)
    if config.trunk_cache is not None:
        batch = {**batch, TRUNK_STATES: abstract_states(network, batch)}
    frozen = states.frozen_leaves(network, frozen, mesh, config.rules(), config.base_dtype)
    settings = RunSettings.of(config, rules=config.rules())
    return steps.make_spec(settings.step_config(network), frozen, overlay, batch, mesh, settings.rules)


def _network(config: TrainConfig, base: NetworkConfig) -> Network:
    adapter = config.adapter() if FORM_OF_KIND[config.kind] == "adapter" else None
    return config.network_of(base.with_adapter(adapter))


def split_leaves(config: TrainConfig, base: NetworkConfig) -> tuple[Params, Params]:
    """(overlay, frozen) of a run, as ShapeDtypeStructs: trained and frozen leaves."""
    network = _network(config, base)
    trains = leaves_to_train(network, FORM_OF_KIND[config.kind], config.train_norms, config.freeze)
    return trees.split(network.abstract_params(), trains)


def _batch(config: TrainConfig, network: Network) -> Batch:
    form = form_of(network)
    make = form.make_packed if config.pack else form.make
    return make([], config.task_feature_lengths, config.batch_size, [])


def _waiting_base(config: TrainConfig, network: Network, mesh: Mesh) -> int:
    """Bytes on a chip of the base that was read, beside the run's own copy: float32, and split."""
    if FORM_OF_KIND[config.kind] == "full":
        return 0  # its leaves are those that train
    alone = families.network_of(network.config.with_adapter(None))
    params = alone.abstract_params()
    return traffic.bytes_on_a_chip(
        params, sharding.tree_shardings(alone.logical_axes(), params, mesh, config.base_rules()))


def _memory(config: TrainConfig, spec: steps.StepSpec, frozen: Params, overlay: Params, found: Any
            ) -> dict[str, int]:
    """Bytes of one chip by use; exact, from the shardings, for values that live through the step."""
    network, mesh, rules = spec.network, spec.mesh, spec.rules
    state = states.abstract_state(overlay, spec.optimizer)
    shardings = states.shardings_of_state(network, overlay, spec.optimizer, mesh, rules)
    batch = steps.abstract_of(spec.batch)
    parts = {
        "base as it was read": _waiting_base(config, network, mesh),
        "frozen parameters": traffic.bytes_on_a_chip(
            frozen, states.shardings_of_params(network, frozen, mesh, rules)),
        "overlay": traffic.bytes_on_a_chip(overlay, shardings.overlay),
        "optimiser state": traffic.bytes_on_a_chip(state.opt_state, shardings.opt_state),
        "batch": traffic.bytes_on_a_chip(batch, {name: sharding.batch_sharding(mesh) for name in batch}),
    }
    held = found.argument_size_in_bytes + parts["base as it was read"]
    # Without the state: the new one is written over the old one.
    new = max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    return {**parts, "padding of arrays": max(0, held - sum(parts.values())),
            "gradients, activations, temporaries": found.temp_size_in_bytes + new,
            "program": found.generated_code_size_in_bytes}


def _workers(spec: steps.StepSpec) -> int:
    """Number of chips that share the products: an axis that splits nothing repeats the work."""
    used = {"data"}
    for name in ("batch", "heads", "joined_kv", "mlp", "vocab", "length"):
        used.update(sharding.axes_in(dict(spec.rules)[name]))
    return math.prod(spec.mesh.shape[axis] for axis in used)


def _seconds(topology: Topology, flops: float, memory: dict[str, int],
             collectives: dict[str, dict[str, float]], config: TrainConfig, streamed: float
             ) -> dict[str, float]:
    """Time bounds by the chip's peaks: products; reading parameters in every pass; bytes sent."""
    chip = topology.chip
    passes = (3 if config.remat == "layer" else 2) * config.num_microbatches
    moved = streamed * passes + 2 * (memory["overlay"] + memory["optimiser state"])
    sent = sum(entry["bytes"] for entry in collectives.values())
    return {"compute": flops / chip.flops, "memory": moved / chip.memory_rate,
            "wires": sent / chip.wire_rate}


def _does_not_fit(error: Exception, config: TrainConfig, topology: Topology) -> Exception:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "hbm" not in text.lower():
        return error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return RunError(describe(
        "The step does not fit the chip's memory, says its compiler", where=topology.name,
        got=next((line for line in lines if "hbm" in line.lower()), lines[0])[:300],
        expected=f"at most {topology.chip.memory / GIGA:.0f} GB a chip",
        cure="split more (gin/sharding/), more NUM_MICROBATCHES, REMAT='layer', BASE_DTYPE='bfloat16', "
        "or more chips"))
