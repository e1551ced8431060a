"""Expert libraries: experts, embedded training instances of each (the keys), and one text format.

A library of means keeps a few means of the embedded instances as keys, and none of the instances.

On disk: experts under ``experts/<id>/``, and `library_files` of cards, keys and instances. An expert more is
written behind what counts in them, at the cost of that expert; a removal writes new ones beside the old. Then
follows ``library.json``, and what it does not name any longer is removed, so an interrupted change leaves the
library as it was, or as it should be. What it leaves beside that the next change clears (`library_changes`).
Changes of several processes come one after another, each to what the one before has left.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.experts import library_changes, library_files
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.generality import forget_experts
from elm_jax.experts.library_changes import LibraryChange
from elm_jax.experts.overlay import Expert, copy_expert, load_expert
from elm_jax.experts.routed_library import faults_of_generality, generality_in, routed_of
from elm_jax.routing.cases import RoutedLibrary
from elm_jax.routing.embed import TextEncoder
from elm_jax.routing.encoders import load_encoder, save_encoder
from elm_jax.routing.evidence import centroids_of
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.runtime import locks, storage
from elm_jax.runtime.config_checks import items_of

_SETTINGS = ("encoder", "text_format", "instances_per_expert", "means_per_expert")
"""Facts of a library that no change alters."""


@dataclasses.dataclass(frozen=True)
class LibraryEntry:
    """One expert of a library: its card and its number of keys."""

    card: ExpertCard
    num_keys: int


class ExpertLibrary:
    """A library of experts: a mapping from an expert's id to its entry; `load` reads the expert itself."""

    def __repr__(self) -> str:
        """Says where it is, and what it holds."""
        return (f"ExpertLibrary({str(self.path)!r}, {len(self)} experts, {len(self.index)} keys, "
                f"encoder={self.encoder.name!r})")

    def __init__(self, path: storage.PathLike, facts: dict[str, Any], encoder: TextEncoder,
                 index: KeyIndex, instances: list[dict[str, Any]],
                 listed: Mapping[str, tuple[ExpertCard, int]]) -> None:
        self.path = storage.as_path(path)
        self.facts = facts
        self.encoder = encoder
        self.index = index
        self.instances = instances
        self.entries = {name: LibraryEntry(*entry) for name, entry in listed.items()}

    @classmethod
    def open(cls, path: storage.PathLike, encoder: TextEncoder | None = None) -> "ExpertLibrary":
        """Opens a library.

        Args:
            path: the library's folder.
            encoder: the encoder to query with; by default the one that the library names.

        Raises:
            InputError: no library here, another schema, or keys made by another encoder.
        """
        path = storage.as_path(path)
        while True:
            facts = library_files.read_library(path)
            try:
                return cls._of_facts(path, facts, encoder)
            except InputError:
                if library_files.read_library(path) == facts:
                    raise  # else another process has changed the library meanwhile

    @classmethod
    def _of_facts(cls, path: epath.Path, facts: dict[str, Any], encoder: TextEncoder | None
                  ) -> "ExpertLibrary":
        encoder = encoder or load_encoder(facts["encoder"], path / "encoder")
        place, sizes = path / "keys" / facts["keys"], facts.get("sizes")
        index = KeyIndex.open(place, encoder, sizes=sizes)
        instances = library_files.read_instances(path, facts, index)
        return cls(path, facts, encoder, index, instances, library_files.read_listed_of(path, facts, index))

    @classmethod
    def create(cls, path: storage.PathLike, encoder: TextEncoder, text_format: str,
               instances_per_expert: int, means: int | None = None) -> "ExpertLibrary":
        """Creates an empty library in memory; the first `add` writes it to disk.

        Of the `instances_per_expert` that an expert is added with each is a key, and is kept; or `means` of
        them are its keys, and none is kept.
        """
        path = storage.as_path(path)
        if not library_changes.was_interrupted(path):  # else `add` sees whether it was this one
            _check_none(path)
        facts = {"schema_version": library_files.SCHEMA_VERSION, "encoder": {"name": encoder.name,
                 "fingerprint": encoder.fingerprint}, "text_format": text_format,
                 "instances_per_expert": instances_per_expert, "keys": None, "revision": 0,
                 **({} if means is None else {"means_per_expert": means})}
        return cls(path, facts, encoder, KeyIndex.empty(encoder, text_format), [], {})

    @property
    def text_format(self) -> str:
        """Format of the texts of keys and queries, one of `routing.text.FORMATS`."""
        return self.facts["text_format"]

    @property
    def means(self) -> int | None:
        """Means that an expert has as keys, at most; None where each instance is a key, and is kept."""
        return self.facts.get("means_per_expert")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, expert_id: str) -> bool:
        return expert_id in self.entries

    def __getitem__(self, expert_id: str) -> LibraryEntry:
        if expert_id not in self.entries:
            raise unknown_name("expert", expert_id, self.entries, where=self.path)
        return self.entries[expert_id]

    def load(self, expert_id: str) -> Expert:
        """Reads an expert and checks it against its fingerprint."""
        self[expert_id]
        return load_expert(self.path / "experts" / expert_id)

    def routed(self) -> RoutedLibrary:
        """The library as routers see it: its keys, and priors and copies if there are any."""
        return routed_of(self)

    def add(self, experts: Mapping[str, Sequence[RoutingInstance]]) -> None:
        """Adds experts, with the training instances that become their keys, or whose means do.

        What other processes have added or removed since the library was read stays so: it is read again, and
        kept from them while this writes. Nothing is done where a killed process had just added the same.

        Args:
            experts: from an expert's folder to its training instances, of which the caller has drawn at most
                `instances_per_expert`.

        Raises:
            InputError: an expert is there already, or belongs to another base than the others.
        """
        cards = {folder: load_expert(folder).card for folder in experts}
        ids = tuple(card.id for card in cards.values())
        made = self._end_interrupted()
        if made is not None and made.added == ids and all(self[one.id].card == one for one in cards.values()):
            return
        _check_new(self.entries, cards)
        added = _listing_of(self, cards, experts)
        with self._changing():
            _check_new(self.entries, cards)
            index, adds = self.index.add_all(added.keys), "sizes" in self.facts
            _begin(self, added=ids, replaced=None if adds else self.facts["keys"])
            for folder, card in cards.items():
                copy_expert(folder, self.path / "experts" / card.id)
            if not adds:
                self._write_anew(index, [*self.instances, *added.instances], [*_listed(self), *added.cards])
                return
            self._commit(added.write(self.path, self.facts))
            self.index = index
            self.instances += added.instances
            self.entries |= {card.id: LibraryEntry(card, count) for card, count in added.cards}
            library_changes.end_change(self.path, self.facts, self.entries)

    def remove(self, expert_ids: Sequence[str]) -> None:
        """Removes experts and their keys, as `add` adds them; a string is one expert's id."""
        expert_ids = items_of(expert_ids)
        made = self._end_interrupted()
        if made is not None and made.removed == tuple(expert_ids):
            return
        with self._changing():
            for expert_id in expert_ids:
                self[expert_id]
            index, known = self.index.remove_all(expert_ids), generality_in(self)
            _begin(self, removed=tuple(expert_ids), replaced=self.facts["keys"])
            out = set(expert_ids)
            self._write_anew(index, [row for row in self.instances if row["expert"] not in out],
                             [entry for entry in _listed(self) if entry[0].id not in out])
            forget_experts(self.path, known, expert_ids)  # last: a removal that is killed leaves priors, too

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Keeps the library's folder for a change, and reads what others have changed before it."""
        with locks.alone(self.path, locks.CHANGE_SECONDS) as is_kept:
            if not is_kept:
                library_changes.refuse_recent(self.path)
            if self.facts["keys"] is None:
                _check_none(self.path)
            elif (facts := library_files.read_library(self.path)) != self.facts:
                self.__dict__.update(self._of_facts(self.path, facts, self.encoder).__dict__)
            library_changes.end_change(self.path, self.facts, self.entries)
            yield

    def _end_interrupted(self) -> LibraryChange | None:
        """Clears what a killed process left; returns its change if the library, one like this, has it."""
        if not library_changes.was_interrupted(self.path):
            return None
        with locks.alone(self.path, locks.CHANGE_SECONDS) as is_kept:
            if not is_kept:
                library_changes.refuse_recent(self.path)
            there = (self.path / library_files.LIBRARY).exists()
            facts = library_files.read_library(self.path) if there else self.facts
            listed = library_files.read_listed(self.path, facts) if there else self.entries
            made = library_changes.end_change(self.path, facts, listed)
            if made is None or any(facts.get(name) != self.facts.get(name) for name in _SETTINGS):
                return None
            self.__dict__.update(self._of_facts(self.path, facts, self.encoder).__dict__)
            return made

    def verify(self) -> list[str]:
        """Reads every expert and key back; returns the faults in words, none for an intact library."""
        return [*faults_of_generality(self),
                *(fault for expert_id in self for fault in _faults(self, expert_id))]

    def _write_anew(self, index: KeyIndex, rows: Sequence[dict[str, Any]],
                    listed: Sequence[tuple[ExpertCard, int]]) -> None:
        """Writes all files of the library beside those that are there, and reads them."""
        order = np.argsort(index.owners, kind="stable") if rows else ()  # as the keys are written
        whole = library_files.Listing(index.by_expert(), [rows[row] for row in order], listed)
        name = library_changes.keys_name(self.facts["revision"] + 1)
        facts = whole.write_anew(self.path, self.facts, index.facts(), name)
        if self.facts["keys"] is None:
            save_encoder(self.encoder, self.path / "encoder")
        self._commit(facts)
        self.__dict__.update(self._of_facts(self.path, self.facts, self.encoder).__dict__)
        library_changes.end_change(self.path, self.facts, self.entries)

    def _commit(self, facts: dict[str, Any]) -> None:
        """Makes facts of files that are written those of the library, of the next revision."""
        facts = {**facts, "revision": self.facts["revision"] + 1}
        storage.write_json(self.path / library_files.LIBRARY, facts)
        self.facts = facts


def _begin(library: ExpertLibrary, **change: Any) -> None:
    """Names a change of a library's next revision, before anything is written."""
    library_changes.begin_change(library.path, LibraryChange(library.facts["revision"] + 1, **change))


def _listing_of(library: ExpertLibrary, cards: Mapping[Any, ExpertCard],
                experts: Mapping[Any, Sequence[RoutingInstance]]) -> library_files.Listing:
    """What a library will hold of experts, by folder; InputError for one without instances."""
    keys: dict[str, np.ndarray] = {}
    for folder, instances in experts.items():
        if not instances:
            raise InputError(describe("An expert needs instances for its keys", where=folder))
        rows = library.encoder.embed([format_text(one, library.text_format) for one in instances])
        keys[cards[folder].id] = rows if library.means is None else _means_of(rows, library.means)
    kept = [] if library.means else [
        {"expert": cards[folder].id, **dataclasses.asdict(one), "labels": [*one.labels]}
        for folder, instances in experts.items() for one in instances]
    return library_files.Listing(keys, kept, [(card, len(keys[card.id])) for card in cards.values()])


def _means_of(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` unit means of rows f32[S, K], whatever their order; fewer if not so many differ."""
    different = np.unique(rows, axis=0)
    return centroids_of(different if len(different) <= count else rows[np.lexsort(rows.T)], count)


def _listed(library: ExpertLibrary) -> list[tuple[ExpertCard, int]]:
    return [(entry.card, entry.num_keys) for entry in library.entries.values()]


def _faults(library: ExpertLibrary, expert_id: str) -> Iterator[str]:
    """What is wrong with one expert of a library, in words."""
    entry = library[expert_id]
    try:
        card = library.load(expert_id).card
    except InputError as error:  # also of damaged files
        yield f"{expert_id}: {error}"
        return
    if card != entry.card:
        yield library_files.unlike_card(card, entry.card)
    count = library.index.count(expert_id)
    if count != entry.num_keys:
        where = library_files.listing(library.path, library.facts)
        yield f"{expert_id}: {count} keys, expected {entry.num_keys} (num_keys in {where})"


def _check_none(path: epath.Path) -> None:
    """Raises InputError if there is a library."""
    if (path / library_files.LIBRARY).exists():
        raise InputError(describe("There is a library here already", where=path,
                                  cure="use `elm library add`, or another folder"))


def _check_new(entries: Mapping[str, LibraryEntry], cards: Mapping[Any, ExpertCard]) -> None:
    """Raises InputError for an expert, by folder, that is there already or is of another base."""
    seen: set[str] = set()
    others = [entry.card for entry in itertools.islice(entries.values(), 1)] + [*cards.values()]
    for folder, card in cards.items():
        if card.id in entries or card.id in seen:
            raise InputError(describe("The library has an expert of this name already", where=folder,
                                      got=card.id, cure="remove it first, or give another id"))
        seen.add(card.id)
        if others[0].base["fingerprint"] != card.base["fingerprint"]:
            raise InputError(describe(
                "The expert belongs to another base than the library's experts", where=folder,
                got=card.base, expected=f"{others[0].base} as {others[0].id}"))
