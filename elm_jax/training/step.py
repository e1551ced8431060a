"""The training step: a pure function, and its compilation for a mesh.

No clock, flag or disk here. Gradients are taken of the overlay only; XLA then drops by itself the
part of the backward pass that only frozen weights would need.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from elm_jax.errors import InputError, describe
from elm_jax.models.losses import LossConfig, LossSums
from elm_jax.models.network import Network
from elm_jax.runtime import sharding, trees
from elm_jax.runtime.sharding import Rules
from elm_jax.training import state as states
from elm_jax.training.optimizers import OptimizerConfig, learning_rate, make_optimizer
from elm_jax.training.state import TrainState
from elm_jax.types import Array, Batch, Params

Signature = tuple[tuple[str, tuple[int, ...], str], ...]
"""(path, shape, dtype) of every leaf, in path order: a hashable form of a tree's shapes."""
ROUTER = "router"
"""Key, in a step's metrics, of what each sparse layer did: `RouterSums` by layer, ``encoder/layers_1``."""
Metrics = dict[str, Any]
"""f32[] by name, and perhaps `ROUTER`."""


class StepConfig(NamedTuple):
    """Settings of a training step; hashable, a static argument of jit.

    Attributes:
        network: computes the loss.
        optimizer: optimiser and learning rate.
        loss: of tokens, and of sparse layers.
        num_microbatches: parts into which a batch is cut to save memory.
    """

    network: Network
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    num_microbatches: int = 1


class StepSpec(NamedTuple):
    """All that a compiled step depends on; equal specs share one program.

    The first fields are those of `StepConfig`; `frozen`, `overlay` and `batch` are shapes.
    """

    network: Network
    optimizer: OptimizerConfig
    loss: LossConfig
    num_microbatches: int
    mesh: Mesh
    frozen: Signature
    overlay: Signature
    batch: Signature
    rules: Rules = sharding.DEFAULT_RULES

    @property
    def config(self) -> StepConfig:
        """The settings of the step."""
        return StepConfig(self.network, self.optimizer, self.loss, self.num_microbatches)


def batch_loss(
    overlay: Params, frozen: Params, network: Network, loss: LossConfig, batch: Batch,
    dropout_rng: Array | None,
) -> tuple[Array, LossSums]:
    """Total loss f32[] of a batch [B, ...], auxiliary losses included, and all sums; for `jax.grad`.

    Without a key there is no dropout, and sparse layers have the capacity that they have outside of training.
    """
    trains = network.config.dropout_rate > 0 or network.config.sparse is not None
    rng = dropout_rng if trains else None
    sums = network.loss(trees.merge(frozen, overlay), batch, rng, loss)
    return sums.total(), sums


def split_microbatches(batch: Batch, count: int) -> Batch:
    """Splits a batch [B, ...] -> [count, B / count, ...]; row r goes to microbatch r % count.

    Striding keeps every microbatch spread over all devices of the data axis without moving a row.
    """
    return {
        name: sharding.constrain(
            jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1),
            None, "batch", *[None] * (array.ndim - 1),
        )
        for name, array in batch.items()
    }


def placed_as_parameters(network: Network, tree: Params) -> Params:
    """Constrains a tree of gradients, or of some leaves [...], to the shardings of the parameters."""
    return trees.unflatten({
        path: sharding.constrain(leaf, *network.axes_of(path)) for path, leaf in trees.flatten(tree).items()
    })


def train_step(
    config: StepConfig, frozen: Params, state: TrainState, batch: Batch, seed: Array, train_steps: Array,
    peak: Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Updates the overlay from one batch; returns the next state and metrics.

    The gradient is ``sum over tokens of d loss / d overlay`` divided by the whole batch's weight,
    so it does not depend on the number of microbatches (with dropout, its noise does). The balance loss of
    sparse layers is that of each microbatch, weighted by its targets.

    Args:
        config: network, optimiser, loss and number of microbatches; static.
        frozen: leaves that do not train.
        state: before the update.
        batch: arrays [B, ...], B a multiple of `num_microbatches`, of the network's form.
        seed: u32[], of dropout.
        train_steps: i32[], length of the run, for the learning rate's schedule.
        peak: f32[], takes the place of the optimiser config's learning rate; None keeps that.

    Returns:
        The state after the update, and f32[] metrics: loss (mean a token, nats), accuracy (share of
        tokens), tokens, grad_norm (before clipping), param_norm (overlay after the update),
        learning_rate, and each auxiliary loss by its name, times its coefficient. A network with sparse
        layers adds `ROUTER`: a dictionary of `RouterSums` by layer, sums over the whole batch.
    """
    network, optimizer, loss, num_microbatches = config
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    grad_fn = jax.grad(batch_loss, has_aux=True)

    def accumulate(total: tuple, part: tuple) -> tuple[tuple, None]:
        number, rows = part
        dropout_rng = jax.random.fold_in(rng, number)
        grads, sums = grad_fn(state.overlay, frozen, network, loss, rows, dropout_rng)
        found = (placed_as_parameters(network, grads), sums)
        return jax.tree.map(jnp.add, total, found), None

    if num_microbatches == 1:  # no sum, so no second buffer of the gradient's size
        grads, sums = grad_fn(state.overlay, frozen, network, loss, batch, jax.random.fold_in(rng, 0))
    else:
        parts = split_microbatches(batch, num_microbatches)
        _, shapes = jax.eval_shape(functools.partial(batch_loss, state.overlay, frozen, network, loss),
                                   jax.tree.map(lambda array: array[0], parts), rng)
        start = (placed_as_parameters(network, jax.tree.map(jnp.zeros_like, state.overlay)),
                 jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
        (grads, sums), _ = jax.lax.scan(accumulate, start, (jnp.arange(num_microbatches), parts))
    grads = placed_as_parameters(network, grads)
    weight = jnp.maximum(sums.weight, 1.0)  # a batch of nothing but padding changes nothing
    grads = jax.tree.map(lambda grad: grad / weight, grads)

    transformation = make_optimizer(optimizer, train_steps, peak)
    updates, opt_state = transformation.update(grads, state.opt_state, state.overlay)
    overlay = optax.apply_updates(state.overlay, updates)
    metrics = {
        "loss": sums.loss / weight,
        "accuracy": sums.correct / weight,
        "tokens": sums.weight,
        "grad_norm": optax.global_norm(grads),
        "param_norm": optax.global_norm(overlay),
        "learning_rate": learning_rate(optimizer, state.step, train_steps, peak),
        **{name: value / weight for name, value in sums.auxiliary.items()},
        **({ROUTER: sums.router} if sums.router else {}),
    }
    return TrainState(step=state.step + 1, overlay=overlay, opt_state=opt_state), metrics


def signature(tree: Params | Batch) -> Signature:
    """Signature of a tree: (path, shape, dtype) of every leaf, in path order."""
    return tuple(
        (path, tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in trees.flatten(dict(tree)).items()
    )


def abstract_of(leaves: Signature) -> Params:
    """Tree of ShapeDtypeStructs of a signature. Inverse of `signature`."""
    return trees.unflatten(
        {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in leaves}
    )


def make_spec(
    config: StepConfig, frozen: Params, overlay: Params, batch: Batch, mesh: Mesh,
    rules: Rules = sharding.DEFAULT_RULES,
) -> StepSpec:
    """Makes the spec of a step from its settings and its arguments (arrays or ShapeDtypeStruct).

    Raises:
        InputError: the batch cannot be divided into microbatches over the mesh's data axis.
    """
    num_microbatches = config.num_microbatches
    rows, parts = next(iter(batch.values())).shape[0], mesh.shape["data"] * num_microbatches
    if num_microbatches < 1 or rows % parts:
        raise InputError(
            describe(
                "Batch size does not divide", got=rows,
                expected=f"a multiple of {parts} = {mesh.shape['data']} devices of the mesh's data "
                f"axis x {num_microbatches} microbatches",
            )
        )
    return StepSpec(*config, mesh, signature(frozen), signature(overlay), signature(batch), rules)


@functools.lru_cache(maxsize=32)
def compile_step(spec: StepSpec) -> jax.stages.Compiled:
    """Compiles `train_step` for a spec: ``(frozen, state, batch, seed, train_steps)``.

    The state's buffers are donated. Parameters, overlay, optimiser state and activations are split over
    the mesh as the rules say, the batch over its data axis. Programs are cached by spec, so that many runs
    of equal shapes in one process compile once.
    """
    return trace_step(spec).lower().compile(compiler_options(spec.mesh))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """XLA options for compiling a step.

    A product with split weights is fastest with one gather that overlaps with other work. XLA for TPUs would
    cut it into an unrolled ring of small products and permutations: at 16 chips a program many times as long,
    which takes minutes to compile for every kind of layer.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": str(2**20)}


def trace_step(spec: StepSpec) -> jax.stages.Traced:
    """Traces `train_step` for a spec without compiling; the mesh's devices need not exist."""
    mesh, network = spec.mesh, spec.network
    frozen, overlay = abstract_of(spec.frozen), abstract_of(spec.overlay)
    state = states.abstract_state(overlay, spec.optimizer)
    state_shardings = states.shardings_of_state(network, overlay, spec.optimizer, mesh, spec.rules)
    whole = sharding.replicated(mesh)
    batch: Mapping[str, jax.ShapeDtypeStruct] = abstract_of(spec.batch)

    def placed_step(*arguments: Any) -> tuple[TrainState, Metrics]:
        with sharding.placed(mesh, spec.rules):
            return train_step(spec.config, *arguments)

    step = jax.jit(
        placed_step,
        in_shardings=(states.shardings_of_params(network, frozen, mesh, spec.rules), state_shardings,
                      {name: sharding.batch_sharding(mesh) for name in batch}, whole, whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=1,
    )
    seed, train_steps = jax.ShapeDtypeStruct((), np.uint32), jax.ShapeDtypeStruct((), np.int32)
    return step.trace(frozen, state, batch, seed, train_steps)


def num_programs() -> int:
    """Number of training steps that this process has compiled."""
    return compile_step.cache_info().misses
