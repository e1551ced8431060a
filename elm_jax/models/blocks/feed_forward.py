"""Feed-forward block of a layer: plain or gated, with adapters on its projections."""

import flax.linen as nn
import jax.numpy as jnp

from elm_jax.models.adapters.config import attach
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.layers.dense import Dense, Dropout, activate, stream
from elm_jax.runtime.sharding import constrain
from elm_jax.types import Array


class Mlp(nn.Module):
    """Feed-forward block: ``act(x wi) wo``, or gated ``(act_0(x wi_0) * act_1(x wi_1)) wo``.

    Source of the gated kind: Shazeer, https://arxiv.org/abs/2002.05202.

    Attributes:
        emb_dim: D.
        mlp_dim: hidden width F.
        activations: one or two names of `layers.dense.ACTIVATION_FUNCTIONS`.
        dropout_rate: of the hidden layer.
        dtype: of the computation.
        adapter: of the network, which may attach to the projections; None for none.
        use_bias: whether the projections have biases.
    """

    emb_dim: int
    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: jnp.dtype
    adapter: AdapterKind | None = None
    use_bias: bool = False

    def setup(self) -> None:
        """Creates ``wi``, or ``wi_0`` and ``wi_1``, and ``wo``, each with its adapter."""
        axes = ("embed", "mlp")
        for name in self._inner:
            setattr(self, name, Dense(self.mlp_dim, axes, self.dtype, use_bias=self.use_bias))
            setattr(self, f"{name}_adapter", attach(self.adapter, name, self.dtype))
        self.hidden_adapter = attach(self.adapter, "hidden", self.dtype)
        self.dropout = Dropout(self.dropout_rate)
        self.wo = Dense(self.emb_dim, axes[::-1], self.dtype, use_bias=self.use_bias)
        self.wo_adapter = attach(self.adapter, "wo", self.dtype)

    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Applies the block: f[B, L, D] -> f[B, L, D]."""
        parts = [getattr(self, f"{name}_adapter")(getattr(self, name)(x), x) for name in self._inner]
        hidden = constrain(activate(self.activations, parts), "batch", None, "mlp")
        hidden = self.dropout(self.hidden_adapter(hidden, hidden), deterministic)
        return stream(self.wo_adapter(self.wo(hidden), hidden))

    @property
    def _inner(self) -> tuple[str, ...]:
        return ("wi",) if len(self.activations) == 1 else ("wi_0", "wi_1")
