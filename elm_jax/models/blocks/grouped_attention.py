"""Causal attention with fewer heads of keys and values than of queries (grouped queries).

Keys and values are never repeated, neither for the queries of a group nor for the choices of a prompt.
Source: Ainslie et al., https://arxiv.org/abs/2305.13245.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from elm_jax.models.adapters.config import attach
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.blocks.rotary import Rotation, rotate
from elm_jax.models.layers.dense import MASKED, Dense, RMSNorm, stream
from elm_jax.models.layers.recompute import recomputed
from elm_jax.runtime.sharding import constrain
from elm_jax.types import Array


class HeadKeysValues(NamedTuple):
    """Keys and values of some tokens, each f[..., L, J, K]: J heads of size K."""

    keys: Array
    values: Array


class Reach(NamedTuple):
    """What the tokens of rows [B, S + C * T] attend to: a prefix of S tokens, then C branches of T tokens.

    Tokens of the prefix attend to each other as `allowed` says; those of a branch to the real tokens of the
    prefix, and causally to their own branch. No branch sees another.

    Attributes:
        allowed: bool[B or 1, 1, 1, S, S], axes (query, key).
        branches: C; 0 for rows that are all prefix.
        real: bool[B, S], which tokens of the prefix branches attend to; None without branches.
    """

    allowed: Array
    branches: int = 0
    real: Array | None = None


def causal(length: int) -> Array:
    """Mask bool[1, 1, 1, L, L]: no query attends to a later key."""
    index = jnp.arange(length)
    return (index[:, None] >= index[None, :])[None, None, None]


@recomputed(num_tied=3)
def attend_groups(queries: Array, keys: Array, values: Array, allowed: Array, keep: Array | None) -> Array:
    """Attention ``softmax(q k) v``; its gradient recomputes the probabilities.

    Args:
        queries: f[B, L, J, G, K], scaled: G heads of queries for each of J heads of keys.
        keys: f[B, S, J, 1, K].
        values: f[B, S, J, 1, K].
        allowed: bool[B or 1, 1, 1, L, S].
        keep: dropout of the probabilities, f[B, J, G, 1, S], or None.

    Returns:
        f[B, L, J, G, K].
    """
    logits = jnp.einsum("bqjgk,bsjk->bjgqs", queries, keys[..., 0, :], preferred_element_type=jnp.float32)
    logits = jnp.where(allowed, logits, jnp.float32(MASKED))
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    # The normaliser divides the mixed values, which are fewer than the probabilities.
    normaliser = jnp.moveaxis(weights.sum(axis=-1, keepdims=True), 3, 1)
    weights = weights.astype(values.dtype)
    if keep is not None:
        weights = weights * keep
    mixed = jnp.einsum("bjgqs,bsjk->bqjgk", weights, values[..., 0, :], preferred_element_type=jnp.float32)
    return (mixed / normaliser).astype(values.dtype)


def attend_branches(queries: Array, prefix: HeadKeysValues, own: HeadKeysValues, real: Array, allowed: Array
                    ) -> Array:
    """Attention of branches to the prefix that they share and to themselves: one softmax over both.

    Args:
        queries: f[B, C, Q, J, G, K], scaled.
        prefix: of f[B, S, J, K].
        own: of f[B, C, T, J, K].
        real: bool[B, S], which tokens of the prefix count.
        allowed: bool[Q, T], which of the own.

    Returns:
        f[B, C, Q, J, G, K].
    """
    def logits(keys: Array, sides: str, mask: Array) -> Array:
        found = jnp.einsum(sides, queries, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, found, jnp.float32(MASKED))

    shared = logits(prefix.keys, "bcqjgk,bsjk->bjgcqs", real[:, None, None, None, None, :])
    alone = logits(own.keys, "bcqjgk,bctjk->bjgcqt", allowed[None, None, None, None])
    largest = jnp.maximum(shared.max(axis=-1, keepdims=True), alone.max(axis=-1, keepdims=True))
    shared, alone = jnp.exp(shared - largest), jnp.exp(alone - largest)
    normaliser = shared.sum(axis=-1) + alone.sum(axis=-1)
    dtype = own.values.dtype
    mixed = sum(jnp.einsum(sides, weights.astype(dtype), values, preferred_element_type=jnp.float32)
                for sides, weights, values in (("bjgcqs,bsjk->bcqjgk", shared, prefix.values),
                                               ("bjgcqt,bctjk->bcqjgk", alone, own.values)))
    return (mixed / jnp.moveaxis(normaliser, (1, 2), (3, 4))[..., None]).astype(dtype)


def cached(tokens: HeadKeysValues) -> HeadKeysValues:
    """Puts keys and values f[B, L, J, K] into the order of caches: keys f[B, J, K, L], values f[B, J, L, K].

    In this order a step's products read them as they lie; in another one XLA copies them at every step.
    """
    keys, values = tokens
    return HeadKeysValues(jnp.transpose(keys, (0, 2, 3, 1)), jnp.transpose(values, (0, 2, 1, 3)))


def attend_cached(queries: Array, prefix: HeadKeysValues, own: HeadKeysValues, real: Array, steps: Array
                  ) -> Array:
    """Attention of one token a row to its prompt and to the tokens since: one softmax over both.

    Args:
        queries: f[B, J, G, K], scaled.
        prefix: in the order of `cached`, of S tokens.
        own: likewise, of N tokens.
        real: bool[B, S], which tokens of the prefix count.
        steps: bool[N], which of the own.

    Returns:
        f[B, J, G, K].
    """
    def logits(keys: Array, mask: Array) -> Array:
        found = jnp.einsum("bjgk,bjks->bjgs", queries, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, found, jnp.float32(MASKED))

    parts = [logits(prefix.keys, real[:, None, None, :]), logits(own.keys, steps[None, None, None, :])]
    largest = jnp.maximum(*(part.max(axis=-1, keepdims=True) for part in parts))
    parts = [jnp.exp(part - largest) for part in parts]
    normaliser = sum(part.sum(axis=-1, keepdims=True) for part in parts)
    dtype = own.values.dtype
    mixed = sum(jnp.einsum("bjgs,bjsk->bjgk", part.astype(dtype), each.values,
                           preferred_element_type=jnp.float32)
                for part, each in zip(parts, (prefix, own), strict=True))
    return (mixed / normaliser).astype(dtype)


class GroupedAttention(nn.Module):
    """Causal multi-head attention with grouped queries, rotary positions and norms of heads.

    Attributes:
        emb_dim: D.
        num_heads: H heads of queries.
        num_kv_heads: J heads of keys and values.
        head_dim: K.
        dropout_rate: of the probabilities; one draw for all queries of a head, as in T5X.
        dtype: of the computation.
        adapter: of the network, which may attach to the projections; None for none.
        biases: whether queries, keys and values, and whether the output have biases.
        norm_epsilon: of RMS norms of each head of queries and keys; None for no norms.
        joined_norms: the norms are of all heads together.
    """

    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dropout_rate: float
    dtype: jnp.dtype
    adapter: AdapterKind | None = None
    biases: tuple[bool, bool] = (False, False)
    norm_epsilon: float | None = None
    joined_norms: bool = False

    def setup(self) -> None:
        """Creates projections, their adapters, and norms."""
        inside, outside = self.biases
        for name, heads in (("query", self.num_heads), ("key", self.num_kv_heads),
                            ("value", self.num_kv_heads)):
            setattr(self, name, Dense(heads * self.head_dim, ("embed", "joined_kv"), self.dtype,
                                      use_bias=inside))
        self.out = Dense(self.emb_dim, ("joined_kv", "embed"), self.dtype, use_bias=outside)
        for name in ("query", "key", "value", "out"):
            setattr(self, f"{name}_adapter", attach(self.adapter, name, self.dtype))
        if self.norm_epsilon is not None:
            axes = ("joined_kv",) if self.joined_norms else ("kv",)
            self.query_norm = RMSNorm(self.dtype, self.norm_epsilon, axes)
            self.key_norm = RMSNorm(self.dtype, self.norm_epsilon, axes)

    def __call__(self, x: Array, rotation: Rotation | None, reach: Reach, deterministic: bool
                 ) -> tuple[Array, HeadKeysValues]:
        """Attends within rows.

        Args:
            x: f[B, S + C * T, D].
            rotation: of the tokens' positions; None for none.
            reach: what they attend to.
            deterministic: no dropout.

        Returns:
            f[B, S + C * T, D], and the keys and values of all tokens.
        """
        queries, own = self._project(x, rotation)
        length = reach.allowed.shape[-1]
        prefix = HeadKeysValues(*(each[:, :length] for each in own))
        mixed = self._attend(queries[:, :length], prefix, reach.allowed, deterministic)
        if reach.branches:
            branched = [each[:, length:].reshape(len(x), reach.branches, -1, *each.shape[2:])
                        for each in (queries, *own)]
            steps = branched[0].shape[2]
            below = attend_branches(branched[0], prefix, HeadKeysValues(*branched[1:]), reach.real,
                                    causal(steps)[0, 0, 0])
            mixed = jnp.concatenate([mixed, below.reshape(len(x), -1, *mixed.shape[2:])], axis=1)
        return self._finish(mixed), own

    def step(self, x: Array, rotation: Rotation | None, prefix: HeadKeysValues, own: HeadKeysValues,
             index: Array, real: Array) -> tuple[Array, HeadKeysValues]:
        """Attends from one further token of each row.

        Args:
            x: f[B, 1, D].
            rotation: of its position.
            prefix: of the prompt, as `cached` gives them.
            own: of the tokens since, likewise: f[B, J, K, N] and f[B, J, N, K].
            index: i32[], the place of this token in them.
            real: bool[B, S], which tokens of the prompt count.

        Returns:
            f[B, 1, D], and `own` with this token.
        """
        queries, new = self._project(x, rotation)
        own = HeadKeysValues(*(jax.lax.dynamic_update_slice_in_dim(old, each, index, axis)
                               for old, each, axis in zip(own, cached(new), (3, 2), strict=True)))
        steps = jnp.arange(own.values.shape[2]) <= index
        mixed = attend_cached(queries[:, 0], prefix, own, real, steps)
        return self._finish(mixed[:, None]), own

    def _project(self, x: Array, rotation: Rotation | None) -> tuple[Array, HeadKeysValues]:
        """Queries f[B, L, J, G, K], scaled by 1 / sqrt(K), and keys and values f[B, L, J, K]."""
        queries, keys = self.query_adapter(self.query(x), x), self.key_adapter(self.key(x), x)
        if self.joined_norms:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = self._heads(queries, self.num_heads), self._heads(keys, self.num_kv_heads)
        values = self._heads(self.value_adapter(self.value(x), x), self.num_kv_heads)
        if self.norm_epsilon is not None and not self.joined_norms:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        queries = (queries * self.head_dim**-0.5).astype(self.dtype)
        queries = constrain(queries, "batch", None, "heads", "kv")
        grouped = queries.reshape(*queries.shape[:2], self.num_kv_heads, -1, self.head_dim)
        keys, values = (constrain(each.astype(self.dtype), "batch", None, "heads", "kv")
                        for each in (keys, values))
        return grouped, HeadKeysValues(keys, values)

    def _heads(self, x: Array, heads: int) -> Array:
        return x.reshape(*x.shape[:-1], heads, self.head_dim)

    def _attend(self, queries: Array, own: HeadKeysValues, allowed: Array, deterministic: bool) -> Array:
        keep = None
        if not deterministic and self.dropout_rate > 0.0:
            batch, _, heads, group, _ = queries.shape
            drawn = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.dropout_rate,
                                         (batch, heads, group, 1, own.keys.shape[1]))
            keep = drawn.astype(self.dtype) / (1.0 - self.dropout_rate)
        return attend_groups(queries, own.keys[..., None, :], own.values[..., None, :], allowed, keep)

    def _finish(self, mixed: Array) -> Array:
        """Projects mixed values f[B, L, J, G, K] to f[B, L, D]."""
        mixed = mixed.reshape(*mixed.shape[:2], self.num_heads * self.head_dim)
        mixed = constrain(mixed, "batch", None, "joined_kv")
        return stream(self.out_adapter(self.out(mixed), mixed))
