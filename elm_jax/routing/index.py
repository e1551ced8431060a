"""The index of a library: its keys, and the experts that own them."""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.routing import index_files
from elm_jax.routing.embed import TextEncoder, check_encoder
from elm_jax.routing.key_room import KeyRoom, read_only
from elm_jax.routing.text import FORMATS
from elm_jax.runtime import storage, trees

CHECKED = 4_096
"""Rows that are checked at once: checks take no memory beside the keys."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeyIndex:
    """The keys of a library: N embedded training instances, or means, of K dimensions, each of one expert.

    Attributes:
        keys: f32[N, K], unit rows (zero for a text of which the encoder knows nothing).
        owners: i32[N], position in `experts` of each key's expert; every expert has a key.
        experts: E ids, in the order in which they were added: the order of the library.
        encoder: name of the encoder that made the keys.
        encoder_fingerprint: of everything its embeddings depend on.
        text_format: of the keys' texts, one of `routing.text.FORMATS`.
        instances_per_expert: S, how many keys an expert was to have; None if that was not fixed.
    """

    keys: np.ndarray
    owners: np.ndarray
    experts: tuple[str, ...]
    encoder: str
    encoder_fingerprint: str
    text_format: str
    instances_per_expert: int | None = None
    _room: KeyRoom = dataclasses.field(init=False, repr=False)

    def __repr__(self) -> str:
        """Says what it is, without its keys."""
        return (f"KeyIndex({self.keys.shape[0]} keys of {self.keys.shape[1]} dimensions, "
                f"{len(self.experts)} experts, encoder={self.encoder!r})")

    def __post_init__(self) -> None:
        """Raises InputError if the fields do not fit each other."""
        if self.text_format not in FORMATS:
            raise unknown_name("text format", self.text_format, FORMATS)
        check_rows(self.keys, self.keys.shape[-1], "keys")
        number = len(self.experts)
        fits = self.owners.shape == self.keys.shape[:1] and self.owners.dtype == np.int32
        if not fits or not _has_all(self.owners, number):
            raise InputError(
                describe(
                    "Keys and experts do not fit each other",
                    got=f"{len(self.keys)} keys, {number} experts, owners "
                    f"{self.owners.dtype}{list(self.owners.shape)}",
                    expected="one int32 owner a key, and a key for every expert",
                )
            )
        if len(set(self.experts)) != number:
            raise InputError(describe("The index has an expert twice", got=self.experts))
        self._fill(_room=KeyRoom(self.keys, self.owners, self.experts))

    def _fill(self, **fields: object) -> "KeyIndex":
        """Sets fields of an index that is being made: what others see of one never changes."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def empty(
        cls, encoder: TextEncoder, text_format: str, instances_per_expert: int | None = None
    ) -> "KeyIndex":
        """Makes an index without keys."""
        return cls(
            np.zeros((0, encoder.dimension), np.float32),
            np.zeros(0, np.int32),
            (),
            encoder.name,
            encoder.fingerprint,
            text_format,
            instances_per_expert,
        )

    def add(self, expert: str, keys: np.ndarray) -> "KeyIndex":
        """Returns an index with one more expert, whose keys f32[S, K] follow all others.

        Raises:
            InputError: the expert is in the index already, or has no keys, or they are not unit rows of K.
        """
        return self.add_all({expert: keys})

    def add_all(self, experts: Mapping[str, np.ndarray]) -> "KeyIndex":
        """Returns an index with more experts, each with its keys f32[S, K], in the given order.

        It costs what is added: the keys that are there are shared with the new index.

        Raises:
            InputError: as `add`.
        """
        added = {expert: np.asarray(keys, np.float32) for expert, keys in experts.items()}
        for expert, keys in added.items():
            if expert in self:
                raise InputError(describe("The index has this expert already", got=expert))
            check_rows(keys, self.keys.shape[1], expert)
            if not len(keys):
                raise InputError(describe("An expert needs instances for its keys", where=expert))
        room, keys, owners = self._room.add(len(self.keys), self.experts, added)
        new = object.__new__(KeyIndex)._fill(  # only what is new needs a check
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return new._fill(keys=keys, owners=owners, experts=(*self.experts, *added), _room=room)

    def remove(self, expert: str) -> "KeyIndex":
        """Returns an index without one expert and its keys. Inverse of `add` of the last expert."""
        return self.remove_all((expert,))

    def remove_all(self, experts: Collection[str]) -> "KeyIndex":
        """Returns an index without some experts and their keys, in one pass.

        Raises:
            InputError: one of them is not in the index.
        """
        stays = np.ones(len(self.experts), bool)
        for expert in experts:
            place = self._room.place(expert, self.experts)
            if place is None:
                raise unknown_name("expert", expert, self.experts)
            stays[place] = False
        kept = stays[self.owners]
        places = np.cumsum(stays, dtype=np.int32) - 1
        return dataclasses.replace(
            self, keys=self.keys[kept], owners=places[self.owners[kept]],
            experts=tuple(expert for expert, stay in zip(self.experts, stays, strict=True) if stay))

    def __contains__(self, expert: str) -> bool:
        return self._room.place(expert, self.experts) is not None

    def count(self, expert: str) -> int:
        """Number of keys of an expert; 0 if it is not in the index."""
        place = self._room.place(expert, self.experts)
        return 0 if place is None else int(self.counts[place])

    def places_of(self, expert: int) -> np.ndarray:
        """Positions i64[S] of the keys of the expert at a position."""
        return np.flatnonzero(self.owners == expert)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Number of keys i64[E] of each expert."""
        return read_only(np.bincount(self.owners, minlength=len(self.experts)))

    def digest(self) -> str:
        """Hash of the keys and their owners."""
        return trees.fingerprint({"keys": self.keys, "owners": self.owners})

    def save(self, folder: storage.PathLike) -> None:
        """Writes the index's files (`index_files`); the caller writes the folder's commit marker.

        Keys of one expert are written together, in their order.
        """
        index_files.write_index(folder, self.facts(), self.by_expert())

    def facts(self) -> dict[str, str | int | None]:
        """What an index says of its keys, JSON-ready."""
        return {"dimension": self.keys.shape[1], "encoder": self.encoder,
                "encoder_fingerprint": self.encoder_fingerprint, "text_format": self.text_format,
                "instances_per_expert": self.instances_per_expert}

    def by_expert(self) -> dict[str, np.ndarray]:
        """Each expert's keys f32[S, K], in the order of the experts; views where they stand together."""
        order = np.argsort(self.owners, kind="stable") if (np.diff(self.owners) < 0).any() else None
        ends = np.cumsum(self.counts)
        parts = ((end - count, end) for count, end in zip(self.counts, ends, strict=True))
        return {expert: self.keys[start:end] if order is None else self.keys[order[start:end]]
                for expert, (start, end) in zip(self.experts, parts, strict=True)}

    @classmethod
    def open(cls, folder: storage.PathLike, encoder: TextEncoder, *, mapped: bool = True,
             sizes: Mapping[str, int] | None = None) -> "KeyIndex":
        """Reads an index that `save` wrote, now or in an older version, for queries made by `encoder`.

        Args:
            folder: of the index.
            encoder: of queries.
            mapped: whether keys on a local disk are mapped into memory, and read from there as they are used.
            sizes: bytes of each file that count, where others are being added; by default all.

        Raises:
            InputError: the folder is not whole, its files do not belong together, or its keys were
                made by another encoder.
        """
        folder = storage.require_committed(folder, "index of keys")
        facts = index_files.read_facts(folder)
        where = f"{folder / index_files.FACTS}: encoder_fingerprint"
        check_encoder(encoder, facts["encoder"], facts["encoder_fingerprint"], where)
        stored = index_files.read_keys(folder, facts, mapped, sizes)
        try:
            index = cls(stored.keys, stored.owners, stored.experts, facts["encoder"],
                        facts["encoder_fingerprint"], facts["text_format"], facts.get("instances_per_expert"))
        except InputError as error:
            raise InputError(
                describe(
                    "The keys cannot be read",
                    where=f"{folder}: {index_files.FACTS} (experts, text_format) and its keys",
                    got=error,
                    cure="build the library again",
                )
            ) from error
        if "digest" in facts:  # of an older version: one for all keys
            index_files.require_digest(folder, index.digest(), facts["digest"])
        return index


def check_rows(rows: np.ndarray, dimension: int, where: str) -> None:
    """Raises InputError unless rows are f32[n, K], each of unit length or zero."""
    if rows.ndim != 2 or rows.shape[1] != dimension or rows.dtype != np.float32:
        raise InputError(
            describe(
                "Embeddings have the wrong shape",
                where=where,
                got=f"{rows.dtype}{list(rows.shape)}",
                expected=f"float32[n, {dimension}]",
            )
        )
    for start in range(0, len(rows), CHECKED):
        part = rows[start : start + CHECKED]
        norms = np.sqrt(np.einsum("nk,nk->n", part, part))
        wrong = np.flatnonzero(~((np.abs(norms - 1) < 1e-3) | (norms == 0)))
        if len(wrong):
            raise InputError(
                describe(
                    "An embedding is not of unit length",
                    where=f"{where}, row {start + wrong[0]}",
                    got=f"length {norms[wrong[0]]}",
                    expected="1, or 0 for a text of which nothing is known",
                )
            )


def _has_all(owners: np.ndarray, number: int) -> bool:
    """Whether owners i32[N] are positions below a number, each of which owns something."""
    if not len(owners) or owners.min() < 0 or owners.max() >= number:
        return not len(owners) and not number
    return bool(np.bincount(owners, minlength=number).all())
