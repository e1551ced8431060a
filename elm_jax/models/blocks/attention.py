"""Multi-head attention of T5: no scaling of the logits, biases added, softmax in float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.models.adapters.config import attach
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.layers.dense import Dense, Initializer, fan_in_normal, stream
from elm_jax.models.layers.recompute import recomputed
from elm_jax.runtime.sharding import constrain
from elm_jax.types import Array

KeysValues = tuple[Array, Array]
"""Keys and values, each f[B, S, H, K]."""


def _query_init(head_dim: int) -> Initializer:
    """Initialiser of query kernels, scaled by 1 / sqrt(K): T5 does not divide the logits by it."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return fan_in_normal(key, shape, dtype) * head_dim**-0.5

    return init


@jax.custom_vjp
def add_biases(logits: Array, biases: tuple[Array, ...]) -> Array:
    """Adds biases that broadcast over instances, heads or queries to logits f32[B, H, L, S].

    A bias's gradient sums over the instances by a product with ones. XLA's CPU backend takes 25 ms
    for f32[8, 6, 256, 256] by a reduction of the first axis, and 0.6 ms by the product.

    Args:
        logits: f32[B, H, L, S].
        biases: f32, each axis as in `logits` or 1.

    Returns:
        f32[B, H, L, S].
    """
    return logits + functools.reduce(jnp.add, biases)


def _add_biases_forward(
    logits: Array, biases: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    return add_biases(logits, biases), biases


def _add_biases_backward(
    biases: tuple[Array, ...], gradient: Array
) -> tuple[Array, tuple[Array, ...]]:
    return gradient, tuple(_sum_to(bias.shape, gradient) for bias in biases)


def _sum_to(shape: tuple[int, ...], gradient: Array) -> Array:
    if shape[0] != gradient.shape[0]:
        ones = jnp.ones(gradient.shape[0], gradient.dtype)
        highest = jax.lax.Precision.HIGHEST
        gradient = jnp.einsum("b,bhqs->hqs", ones, gradient, precision=highest)[None]
    shared = [axis for axis in range(1, 4) if shape[axis] != gradient.shape[axis]]
    return gradient.sum(axis=shared, keepdims=True)


add_biases.defvjp(_add_biases_forward, _add_biases_backward)


@recomputed(num_tied=3)
def attend(
    queries: Array, keys: Array, values: Array, biases: tuple[Array, ...], keep: Array | None
) -> Array:
    """Attention ``softmax(q k + biases) v`` without division by sqrt(K): f[B, L, H, K].

    The gradient recomputes the probabilities f[B, H, L, S]: that costs one product of queries and keys, and
    the largest array of a layer is not kept until the backward pass.

    Args:
        queries: f[B, L, H, K].
        keys: f[B, S, H, K].
        values: f[B, S, H, K].
        biases: f32, each broadcastable to [B, H, L, S].
        keep: dropout of the probabilities, f[B, H, 1, S], or None.

    Returns:
        f[B, L, H, K].
    """
    logits = jnp.einsum("bqhk,bshk->bhqs", queries, keys, preferred_element_type=jnp.float32)
    logits = add_biases(logits, biases)
    # The normaliser divides the mixed values [B, L, H, K], not the probabilities [B, H, L, S].
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    normaliser = jnp.moveaxis(weights.sum(axis=-1, keepdims=True), 1, 2)
    weights = weights.astype(values.dtype)
    if keep is not None:
        weights = weights * keep
    mixed = jnp.einsum("bhqs,bshk->bqhk", weights, values, preferred_element_type=jnp.float32)
    return (mixed / normaliser).astype(values.dtype)


def _by_heads(x: Array) -> Array:
    """Constrains f[B, L, H, K] to its sharding on the mesh."""
    return constrain(x, "batch", None, "heads", "kv")


class Attention(nn.Module):
    """Multi-head attention; keys and values can be computed separately from the queries.

    Attributes:
        emb_dim: D.
        num_heads: H.
        head_dim: K.
        dropout_rate: of the probabilities; one draw for all queries of a head, as in T5X.
        dtype: of the computation.
        adapter: of the network, which may attach to the projections; None for none.
    """

    emb_dim: int
    num_heads: int
    head_dim: int
    dropout_rate: float
    dtype: jnp.dtype
    adapter: AdapterKind | None = None

    def setup(self) -> None:
        """Creates the four projections and their adapters."""
        joined = self.num_heads * self.head_dim
        axes = ("embed", "joined_kv")
        self.query = Dense(joined, axes, self.dtype, _query_init(self.head_dim))
        self.key = Dense(joined, axes, self.dtype, fan_in_normal)
        self.value = Dense(joined, axes, self.dtype, fan_in_normal)
        self.out = Dense(self.emb_dim, ("joined_kv", "embed"), self.dtype, fan_in_normal)
        self.query_adapter = attach(self.adapter, "query", self.dtype)
        self.key_adapter = attach(self.adapter, "key", self.dtype)
        self.value_adapter = attach(self.adapter, "value", self.dtype)
        self.out_adapter = attach(self.adapter, "out", self.dtype)

    def keys_values(self, x: Array) -> KeysValues:
        """Projects f[B, S, D] to keys and values f[B, S, H, K]."""
        values = self.value_adapter(self.value(x), x)
        return self._heads(self.key_adapter(self.key(x), x)), self._heads(values)

    def __call__(
        self, x: Array, keys_values: KeysValues, biases: tuple[Array, ...], deterministic: bool
    ) -> Array:
        """Attends from the queries of `x` f[N, L, D]; returns f[N, L, D].

        Args:
            x: f[N, L, D]. N is B, or ``B * C`` when the C choices of an instance share the keys:
                they then go through as one query axis ``C * L``, and no key is repeated.
            keys_values: two f[B, S, H, K].
            biases: f32, each broadcastable to [B, H, C * L, S]; added to the logits.
            deterministic: no dropout.

        Returns:
            f[N, L, D].
        """
        keys, values = keys_values
        queries = self.query_adapter(self.query(x), x)
        queries = _by_heads(queries.reshape(keys.shape[0], -1, self.num_heads, self.head_dim))
        keep = None
        if not deterministic and self.dropout_rate > 0.0:
            keep = self._keep(queries.shape[0], keys.shape[1])
        mixed = _by_heads(attend(queries, keys, values, biases, keep))
        mixed = mixed.reshape(*x.shape[:-1], self.num_heads * self.head_dim)
        return stream(self.out_adapter(self.out(mixed), mixed))

    def _heads(self, x: Array) -> Array:
        return _by_heads(x.reshape(*x.shape[:-1], self.num_heads, self.head_dim))

    def _keep(self, batch: int, length: int) -> Array:
        """Dropout factors of the keys, f[B, H, 1, S]: 0, or ``1 / (1 - rate)``."""
        shape = (batch, self.num_heads, 1, length)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.dropout_rate, shape)
        return keep.astype(self.dtype) / (1.0 - self.dropout_rate)
