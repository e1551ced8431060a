"""The trunk cache: states of rows behind a network's frozen lower layers, computed once and kept on disk.

Kept are sequences: an example's tokens, without padding, whichever batch or packed row it is in. Their key is
a hash of the tokens, so other rows, another rendering or another cut have other keys. All else that changes a
state names the folder: base, network, number of layers, dtypes, platform.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.errors import InputError, describe
from elm_jax.models.network import JOINED, TRUNK_STATES, Network, has_trunk
from elm_jax.runtime import hosts, sharding, storage, trees
from elm_jax.runtime.row_store import RowStore
from elm_jax.training import state as states
from elm_jax.types import Array, Batch, Padded, Params

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


class _Sequence(NamedTuple):
    """One sequence of a batch: its row, its array of states, its place in that row, the key of its tokens."""

    row: int
    array: int
    part: tuple[int | slice, ...]
    key: bytes


class TrunkCache:
    """Looks up the states of a batch's rows, and computes and keeps those that are missing.

    Args:
        network: with a trunk.
        base: gives the trunk's leaves.
        settings: folder and limit.
        mesh: states are computed on its devices; several processes each compute those of their own rows, on
            their own devices.
        rules: sharding rules of the base.

    Raises:
        InputError: the network has no trunk, one row lies on several processes, or the folder does not fit.
    """

    def __init__(self, network: Network, base: TrunkBase, settings: TrunkSettings, mesh: Mesh,
                 rules: sharding.Rules = sharding.DEFAULT_RULES) -> None:
        depth = has_trunk(network).trunk
        if not depth:
            raise InputError(describe("There are no frozen lower layers whose states could be kept",
                                      where="trunk_cache", got="a leaf of the lowest layer that trains"))
        # Adapters are above the trunk, and it has no dropout: all experts share one program and one folder.
        config = dataclasses.replace(network.config.with_adapter(None), dropout_rate=0.0)
        self._network = dataclasses.replace(network, config=config)
        self._mesh, self._computed, self._looked_up = _own_part(mesh), 0, 0
        trunk, _ = trees.split(base.params, lambda path: network.depth_of(path) < depth)
        if hosts.count() > 1:
            trunk = jax.tree.map(hosts.whole, trunk)
        self._params = states.frozen_leaves(self._network, trunk, self._mesh, rules, base.dtype)
        facts = _facts(self._network, base, mesh)
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        one = dict.fromkeys(("tokens", "segment_ids"), jax.ShapeDtypeStruct((1, 1), np.int32))
        shape = jax.eval_shape(functools.partial(states_of, self._network), self._params, one)[0]
        self.store = RowStore(settings.folder, name, facts, width=shape.shape[-1], dtype=shape.dtype,
                              most_bytes=settings.most_bytes, writers=hosts.count())

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
        found = np.zeros((*tokens.shape, self.store.width), self.store.dtype)
        batch = {"tokens": tokens, "segment_ids": segment_ids}
        self._fill((found,), _segments(tokens, segment_ids), batch)
        return found

    def with_scored_states(self, batch: Batch) -> Batch:
        """Adds the states of a batch of instances to score or to continue (see `data.arrays.batches.padded`).

        Joined rows that have no choices stay as they are: a text that is generated passes all layers.
        """
        tokens, lengths = np.asarray(batch["inputs"]), np.asarray(batch["input_lengths"])
        joined = self._network.batches == JOINED
        if joined and "choices" not in batch:
            return batch
        # A prompt without tokens stands for one token.
        ends = np.maximum(lengths, 1) if joined else lengths
        found = [np.zeros((*tokens.shape, self.store.width), self.store.dtype)]
        sequences = [_Sequence(row, 0, (slice(0, end),), _key(tokens[row, :lengths[row]]))
                     for row, end in enumerate(ends.tolist()) if end]
        own = {"inputs": tokens, "input_lengths": lengths}
        if joined:
            choices, last = np.asarray(batch["choices"]), np.asarray(batch["choice_lengths"]) - 1
            shape = (*choices.shape[:2], choices.shape[2] - 1, self.store.width)
            found.append(np.zeros(shape, self.store.dtype))
            sequences += [
                _Sequence(row, 1, (number, slice(0, int(last[row, number]))),
                          _key(tokens[row, :lengths[row]], choices[row, number, :last[row, number]]))
                for row, number in zip(*np.nonzero(last > 0), strict=True)]
            own |= {"choices": choices, "choice_lengths": last + 1}
        self._fill(found, sequences, own)
        return {**batch, **dict(zip(("inputs_states", "choices_states"), found, strict=False))}

    def _fill(self, found: Sequence[np.ndarray], sequences: Iterable["_Sequence"], batch: Batch) -> None:
        """Writes the states of sequences into arrays; computes and keeps those of rows that lack one.

        Args:
            found: arrays [B, ..., D], all 0.
            sequences: where each belongs.
            batch: of which the states are computed.
        """
        sequences = list(sequences)
        self._looked_up += len(sequences)
        missing = self._copy_kept(found, sequences)
        if missing and hosts.count() > 1:
            self.store.read_others()
            missing = self._copy_kept(found, itertools.chain(*missing.values()))
        if not missing:
            return
        rows = np.asarray(sorted(missing))
        computed = self._compute({name: array[rows] for name, array in batch.items()})
        for number, row in enumerate(rows.tolist()):
            for sequence in missing[row]:
                values = computed[sequence.array][number][sequence.part]
                found[sequence.array][row][sequence.part] = values
                self.store.put(sequence.key, values)
        self._computed += sum(map(len, missing.values()))

    def _copy_kept(self, found: Sequence[np.ndarray], sequences: Iterable["_Sequence"]
                   ) -> dict[int, list["_Sequence"]]:
        """Writes the states that are kept into arrays; returns the sequences of each row that lacks some."""
        missing: dict[int, list[_Sequence]] = {}
        for sequence in sequences:
            kept = self.store.get(sequence.key)
            if kept is None:
                missing.setdefault(sequence.row, []).append(sequence)
            else:
                found[sequence.array][sequence.row][sequence.part] = kept
        return missing

    def _compute(self, batch: Batch) -> list[np.ndarray]:
        """States of rows; their number is filled up to few sizes, so that few programs compile."""
        count, parts = len(next(iter(batch.values()))), self._mesh.shape["data"]
        size = -(-(1 << (count - 1).bit_length()) // parts) * parts
        rows = np.resize(np.arange(count), size)
        placed = sharding.put_batch({name: array[rows] for name, array in batch.items()}, self._mesh)
        return [hosts.whole(each)[:count] for each in _compiled(self._network, self._params, placed)]


def _own_part(mesh: Mesh) -> Mesh:
    """The part of a mesh that this process's devices are.

    Raises:
        InputError: a row of a batch lies on several processes, which would have to agree on it to the bit.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (owners != owners[..., :1]).any():
        raise InputError(describe(
            "States of the lower layers cannot be kept where the model axis spans processes",
            where="trunk_cache", got=f"{mesh.shape['model']} devices of the model axis, of several processes",
            expected="a model axis inside one process",
            cure="lower MESH_MODEL, or leave TRUNK_CACHE out"))
    return mesh if hosts.count() == 1 else mesh.local_mesh


def states_of(network: Network, params: Params, batch: Batch) -> list[Array]:
    """States behind a network's trunk: of rows, or of inputs and, if batches are joined, of choices."""
    door = has_trunk(network)
    if "inputs" not in batch:
        return [door.trunk_states(params, batch["tokens"], batch["segment_ids"])]
    inputs = Padded(batch["inputs"], batch["input_lengths"])
    targets = Padded(batch["choices"], batch["choice_lengths"]) if "choices" in batch else None
    return [each for each in door.trunk_of_choices(params, inputs, targets) if each is not None]


def abstract_states(network: Network, batch: Batch) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the states of a training batch."""
    tokens, segment_ids = has_trunk(network).trunk_rows(batch)
    rows = {"tokens": tokens, "segment_ids": segment_ids}
    return jax.eval_shape(functools.partial(states_of, network), network.abstract_params(), rows)[0]


_compiled = jax.jit(states_of, static_argnames="network")


def _segments(tokens: np.ndarray, segment_ids: np.ndarray) -> Iterator["_Sequence"]:
    """The sequences of rows i32[B, L], each with the key of its tokens."""
    edges = np.diff(segment_ids, axis=1, prepend=0, append=0) != 0
    for row in range(len(tokens)):
        places = np.flatnonzero(edges[row]).tolist()
        for start, stop in itertools.pairwise(places):
            if segment_ids[row, start]:
                yield _Sequence(row, 0, (slice(start, stop),), _key(tokens[row, start:stop]))


def _key(tokens: np.ndarray, choice: np.ndarray | None = None) -> bytes:
    """Key of the states of tokens i32[n], or of a choice i32[m] behind them."""
    parts = [tokens] if choice is None else [tokens, choice]
    head = b"" if choice is None else len(tokens).to_bytes(8, "little")
    content = b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in parts)
    person = b"" if choice is None else b"choice"
    return hashlib.blake2b(head + content, digest_size=16, person=person).digest()


def _facts(network: Network, base: TrunkBase, mesh: Mesh) -> dict[str, Any]:
    """All that changes a row's states beside its tokens."""
    return {"version": _VERSION, "base": base.fingerprint, "layers": has_trunk(network).trunk,
            "network": {"family": network.config.family, **network.config.to_dict()},
            "base_dtype": base.dtype or "float32", "platform": mesh.devices.flat[0].platform}
