"""The trunk cache: states of rows behind a network's frozen lower layers, computed once and kept on disk.

Kept are sequences: an example's tokens, without padding, whichever batch or packed row it is in. Their key is a
hash of the tokens, so other rows, another rendering or another cut have other keys. All else that changes a
state names the folder: base, network, number of layers, dtypes, platform.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.errors import InputError, describe
from elm_jax.models.network import TRUNK_STATES, Network, has_trunk
from elm_jax.runtime import hosts, sharding, storage, trees
from elm_jax.runtime.row_store import RowStore
from elm_jax.training import state as states
from elm_jax.types import Array, Batch, Params

logger = logging.getLogger(__name__)
DEFAULT_BYTES = 16 * 2**30
_VERSION = 1
"""Of the meaning of stored states: a change of it makes new folders."""


class TrunkSettings(NamedTuple):
    """Where states are kept, and how many.

    Attributes:
        folder: on a local disk; runs and evaluations of one base share it.
        most_bytes: of all files in it.
    """

    folder: storage.PathLike
    most_bytes: int = DEFAULT_BYTES


class TrunkBase(NamedTuple):
    """The base whose lower layers are the trunk.

    Attributes:
        fingerprint: of its weights.
        params: its leaves; those of the trunk are used.
        dtype: of the frozen kernels on the devices; None as they are.
    """

    fingerprint: str
    params: Params
    dtype: str | None = None


class _Segment(NamedTuple):
    """One sequence of a batch: its row, its place in the row, the key of its tokens."""

    row: int
    part: slice
    key: bytes


class TrunkCache:
    """Looks up the states of a batch's rows, and computes and keeps those that are missing.

    Args:
        network: with a trunk.
        base: gives the trunk's leaves.
        settings: folder and limit.
        mesh: states are computed on it.
        rules: sharding rules of the base.

    Raises:
        InputError: the network has no trunk, several processes, or a folder that does not fit.
    """

    def __init__(self, network: Network, base: TrunkBase, settings: TrunkSettings, mesh: Mesh,
                 rules: sharding.Rules = sharding.DEFAULT_RULES) -> None:
        if hosts.count() > 1:
            raise InputError(describe("States of the lower layers are kept by one process only",
                                      where="trunk_cache", got=f"{hosts.count()} processes",
                                      cure="leave TRUNK_CACHE out"))
        depth = has_trunk(network).trunk
        if not depth:
            raise InputError(describe("There are no frozen lower layers whose states could be kept",
                                      where="trunk_cache", got="trained leaves in the lowest layer, or below"))
        # Adapters are above the trunk, and dropout is off in it: all experts share one program and one folder.
        config = dataclasses.replace(network.config.with_adapter(None), dropout_rate=0.0)
        self._network = dataclasses.replace(network, config=config)
        self._mesh, self._computed, self._looked_up = mesh, 0, 0
        trunk, _ = trees.split(base.params, lambda path: network.depth_of(path) < depth)
        self._params = states.frozen_leaves(self._network, trunk, mesh, rules, base.dtype)
        facts = _facts(self._network, base, mesh)
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        shape = jax.eval_shape(functools.partial(states_of, self._network), self._params,
                               *2 * [jax.ShapeDtypeStruct((1, 1), np.int32)])
        self.store = RowStore(settings.folder, name, facts, width=shape.shape[-1], dtype=shape.dtype,
                              most_bytes=settings.most_bytes)

    def __enter__(self) -> "TrunkCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.store.flush()
        logger.info("states of %d layers: %d sequences looked up, %d computed; %d kept in %s",
                    self._network.trunk, self._looked_up, self._computed, len(self.store), self.store.folder)

    def with_states(self, batch: Batch) -> Batch:
        """Adds the states f[B, L, D] of a training batch of numpy arrays."""
        return {**batch, TRUNK_STATES: self.states(*self._network.trunk_rows(batch))}

    def states(self, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """Returns the states f[B, L, D] of rows; those of padding are 0.

        Args:
            tokens: i32[B, L].
            segment_ids: i32[B, L], as `Trunk.trunk_states` takes them.
        """
        segments = list(_segments(tokens, segment_ids))
        found = np.zeros((*tokens.shape, self.store.width), self.store.dtype)
        missing: dict[int, list[_Segment]] = {}
        for segment in segments:
            kept = self.store.get(segment.key)
            if kept is None:
                missing.setdefault(segment.row, []).append(segment)
            else:
                found[segment.row, segment.part] = kept
        self._looked_up += len(segments)
        if missing:
            rows = np.asarray(sorted(missing))
            computed = self._compute(tokens[rows], segment_ids[rows])
            for row, values in zip(rows.tolist(), computed, strict=True):
                for segment in missing[row]:
                    found[row, segment.part] = values[segment.part]
                    self.store.put(segment.key, values[segment.part])
            self._computed += sum(map(len, missing.values()))
        return found

    def _compute(self, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """States f[B, L, D] of rows; their number is filled up to few sizes, so that few programs compile."""
        count, parts = len(tokens), self._mesh.shape["data"]
        size = -(-(1 << (count - 1).bit_length()) // parts) * parts
        rows = np.resize(np.arange(count), size)
        placed = sharding.put_batch({"tokens": tokens[rows], "segment_ids": segment_ids[rows]}, self._mesh)
        return hosts.whole(_compiled(self._network, self._params, **placed))[:count]


def states_of(network: Network, params: Params, tokens: Array, segment_ids: Array) -> Array:
    """States f[B, L, D] behind a network's trunk; see `Trunk.trunk_states`."""
    return has_trunk(network).trunk_states(params, tokens, segment_ids)


_compiled = jax.jit(states_of, static_argnames="network")


def _segments(tokens: np.ndarray, segment_ids: np.ndarray) -> Iterator[_Segment]:
    """The sequences of rows i32[B, L], each with the key of its tokens."""
    edges = np.diff(segment_ids, axis=1, prepend=0, append=0) != 0
    for row in range(len(tokens)):
        places = np.flatnonzero(edges[row]).tolist()
        for start, stop in zip(places, places[1:], strict=False):
            if segment_ids[row, start]:
                own = np.ascontiguousarray(tokens[row, start:stop], np.int32)
                yield _Segment(row, slice(start, stop), hashlib.blake2b(own.tobytes(), digest_size=16).digest())


def _facts(network: Network, base: TrunkBase, mesh: Mesh) -> dict[str, Any]:
    """All that changes a row's states beside its tokens."""
    return {"version": _VERSION, "base": base.fingerprint, "layers": has_trunk(network).trunk,
            "network": {"family": network.config.family, **network.config.to_dict()},
            "base_dtype": base.dtype or "float32", "platform": mesh.devices.flat[0].platform}
