"""What a layer needs to have a sparse feed-forward in the place of a dense one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from elm_jax.models.adapters.config import Hook
from elm_jax.models.blocks.feed_forward import Mlp
from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers.dense import Dropout
from elm_jax.models.layers.gate_tasks import reads_tasks
from elm_jax.models.layers.gates import capacity
from elm_jax.types import Array


class Routed(NamedTuple):
    """What sparse layers read of rows [B, L] beside their states.

    Attributes:
        real: bool[B, L], tokens that are not padding; None: all.
        task: f[B, D_t], or f[B, L, D_t] where a row's tokens are of several tasks: vectors of their tasks;
            None for gates that do not read them.
        task_ids: i32[B] or i32[B, L], numbers of the tasks; None if nothing needs them.
    """

    real: Array | None = None
    task: Array | None = None
    task_ids: Array | None = None


def routed_of(config: Any, real: Array | None, task_ids: Array | None = None) -> Routed | None:
    """What the layers of a network read of rows with token mask bool[B, L]; None if none is sparse.

    The vectors of tasks are still to be added (`task_table.TaskTable.on`).

    Args:
        config: of the network.
        real: bool[B, L]; None: all are tokens.
        task_ids: i32[B] or i32[B, L], numbers of the rows' or tokens' tasks; None if nothing needs them.
    """
    return None if config.sparse is None else Routed(real, task_ids=task_ids)


def feed_forward_of(config: Any, use_bias: bool = False) -> Mlp | SparseMlp:
    """Makes the feed-forward of a layer: sparse if the layer's config says so. Experts have no biases.

    Args:
        config: of the layer.
        use_bias: whether the projections of a dense one have biases.
    """
    dtype = config.activation_dtype
    if config.sparse is None:
        return dense_of(config, use_bias)
    return SparseMlp(config.emb_dim, config.mlp_dim, config.mlp_activations, config.dropout_rate, dtype,
                     config.sparse)


def dense_of(config: Any, use_bias: bool = False) -> Mlp:
    """Makes a dense feed-forward of a layer's dimensions, with the layer's adapters."""
    return Mlp(config.emb_dim, config.mlp_dim, config.mlp_activations, config.dropout_rate,
               config.activation_dtype, config.adapter, use_bias)


def has_dense_sublayer(config: Any) -> bool:
    """Whether a dense feed-forward with a norm of its own follows the layer's own, by the layer's config."""
    return config.sparse is not None and config.sparse.dense_sublayer


class SubLayer(NamedTuple):
    """Modules of a feed-forward sub-layer: its norm, the feed-forward of either kind, and its adapter."""

    norm: nn.Module
    mlp: Mlp | SparseMlp
    adapter: Hook


def add_feed_forwards(x: Array, parts: Sequence[SubLayer], dropout: Dropout, routed: Routed | None,
                      deterministic: bool) -> Array:
    """Adds the outputs of a layer's feed-forward sub-layers, one after another, to f[B, L, D]."""
    for norm, mlp, adapter in parts:
        normed = norm(x)
        more = () if isinstance(mlp, Mlp) else routed or Routed()
        y = mlp(normed, deterministic, *more)
        x = x + dropout(adapter(y, normed), deterministic)
    return x


def feed_forward_traffic(config: Any, *stacks: tuple[int, int]) -> dict[str, float]:
    """What one row sends through the feed-forwards of a training step: fields of `StepAccount`.

    Args:
        config: of the network.
        stacks: (tokens, layers) of each; a second one is an encoder-decoder's decoder.
    """
    sparse, counts = config.sparse, {"mlp_outputs": 0, "sparse_outputs": 0, "routed": 0.0}
    for number, (tokens, layers) in enumerate(stacks):
        routed = 0 if sparse is None else sum(sparse.is_sparse(layer, number > 0) for layer in range(layers))
        counts["mlp_outputs"] += tokens * (layers - (0 if has_dense_sublayer(config) else routed))
        if routed:
            places = capacity(sparse, sparse.group_rows * tokens, training=True)
            counts["sparse_outputs"] += tokens * routed
            counts["routed"] += routed * (tokens * sparse.experts_per_token if places is None
                                          else sparse.num_experts * places / sparse.group_rows)
    return counts


def below_first_sparse(config: Any, layers: int) -> int:
    """Layers of a stack below its first sparse one; all if none is sparse.

    Args:
        config: of the network.
        layers: of the stack, which is no encoder-decoder's decoder.
    """
    sparse = config.sparse
    return next((layer for layer in range(layers) if sparse.is_sparse(layer)), layers) if sparse else layers


def below_drops(config: Any, layers: int) -> int:
    """Layers of a stack below the first whose states do not follow from a row's tokens alone.

    Those are layers in which tokens compete for places outside of training, or that read the row's task.

    Args:
        config: of the network.
        layers: of the stack, which is no encoder-decoder's decoder.
    """
    sparse = config.sparse
    alone = sparse is None or not (sparse.drops_in_use or reads_tasks(config))
    return layers if alone else below_first_sparse(config, layers)
