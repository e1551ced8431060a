"""Token cross-entropy as sums, so that parts of a batch add up exactly to the whole."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.gates import RouterSums
from elm_jax.types import Array

_OF_SPARSE = ("balance_loss", "router_z_loss")

@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the loss: of the cross-entropy, and of sparse layers; hashable, a static argument of jit.

    Attributes:
        label_smoothing: share of the target's probability spread evenly over all V, in [0, 1).
        z_loss: factor of the squared log of the softmax's denominator, at least 0.
            Source: https://arxiv.org/abs/2204.02311, section 5.
        balance_loss: factor of the loss of uneven loads of experts (`blocks.router_losses`), at least 0; 0.01
            is usual. For networks with sparse layers.
        router_z_loss: likewise of the loss of the routers' logits; 1e-3 or 1e-4 are usual.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    balance_loss: float = 0.0
    router_z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "z_loss", *_OF_SPARSE):
            value, upper = getattr(self, name), 1.0 if name == "label_smoothing" else float("inf")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value < upper:
                raise InputError(
                    describe("Loss setting is wrong", where=f"LossConfig.{name}", got=repr(value),
                             expected=f"a number from 0 to below {upper}")
                )

    @property
    def of_sparse_layers(self) -> tuple[str, ...]:
        """Names of the losses of sparse layers that are asked for."""
        return tuple(name for name in _OF_SPARSE if getattr(self, name))

    def facts(self) -> dict[str, float]:
        """The settings by name, JSON-ready; those of sparse layers, which came later, unless they are 0."""
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if value or name not in _OF_SPARSE}


PLAIN = LossConfig()
"""Plain cross-entropy."""


@flax.struct.dataclass
class LossSums:
    """Loss sums over tokens; the sums of two batches add leaf by leaf.

    Attributes:
        loss: f32[], weighted sum of the tokens' losses, in nats.
        weight: f32[], sum of the weights.
        correct: f32[], weighted number of tokens whose most likely token is the target.
        auxiliary: other losses by name, f32[] each: times their coefficients and times the weight, so that
            they add to `loss`.
        router: what each sparse layer above a frozen trunk did, by the layer (``encoder/layers_1``); empty
            for a dense network.
    """

    loss: Array
    weight: Array
    correct: Array
    auxiliary: dict[str, Array] = flax.struct.field(default_factory=dict)
    router: dict[str, RouterSums] = flax.struct.field(default_factory=dict)

    def total(self) -> Array:
        """The sum f32[] that training minimises: the tokens' losses and the auxiliary ones."""
        return sum(self.auxiliary.values(), self.loss)


def token_cross_entropy(
    logits: Array, targets: Array, weights: Array, config: LossConfig
) -> LossSums:
    """Weighted cross-entropy ``-log softmax(logits)[target]``, summed in float32.

    With smoothing e the target distribution is ``(1 - e) onehot + e / V``; z-loss adds
    ``z * logsumexp(logits)^2`` a token.

    Args:
        logits: [B, T, V], any float dtype.
        targets: i32[B, T].
        weights: f32[B, T], 0 where nothing is predicted.
        config: smoothing and z-loss.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum rather than a gather: it stays local where V is split over the mesh.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    hit = vocabulary == targets[..., None]
    loss = log_z - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    if config.label_smoothing:
        even = log_z - jnp.mean(logits, axis=-1)
        loss = (1.0 - config.label_smoothing) * loss + config.label_smoothing * even
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(log_z)
    weights = weights.astype(jnp.float32)
    correct = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return LossSums(
        loss=jnp.sum(loss * weights), weight=jnp.sum(weights), correct=jnp.sum(correct * weights)
    )
