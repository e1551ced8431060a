"""Files of a library of experts: their fields, checked when they are read, and how a change writes them.

```
library.json            settings, revision, names of the two below, and how many bytes of each file count
cards/<revision>.jsonl  a line an expert: its card and its number of keys
keys/<revision>/        the index of the keys, and the instances behind them, a line a key
```

A library of means (``means_per_expert`` in ``library.json``) keeps no instances: their file is empty.

Files that ``library.json`` gives a size are only ever added to, behind what counts; it is written last. An
older version listed the cards in ``library.json``, and wrote keys and instances anew with every change.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.formats.places import EXPERT_FILE
from elm_jax.routing import index_files
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.text import FORMATS
from elm_jax.runtime import records, storage
from elm_jax.runtime.differences import differences

SCHEMA_VERSION, OLDER_VERSION = 2, 1
LIBRARY, INSTANCES, CARDS = "library.json", "instances.jsonl", "cards"
GROWING = (CARDS, index_files.KEYS, index_files.LISTED, INSTANCES)
"""Files whose sizes ``library.json`` holds."""
MOST_MEANS = 10
"""Means of an expert, at most."""
_NAME = re.compile(r"\d{6,}")


@dataclasses.dataclass(frozen=True)
class EncoderFacts:
    """The encoder that a library names."""

    name: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ListedExpert:
    """One expert as a library lists it; `ExpertCard` checks the card."""

    card: dict[str, Any]
    num_keys: int


@dataclasses.dataclass(frozen=True)
class LibraryFacts:
    """Fields of ``library.json``."""

    encoder: EncoderFacts
    text_format: str
    instances_per_expert: int
    revision: int
    keys: str
    cards: str
    sizes: dict[str, int]
    means_per_expert: int | None = None


@dataclasses.dataclass(frozen=True)
class OlderLibraryFacts:
    """Fields of the ``library.json`` of an older version."""

    encoder: EncoderFacts
    text_format: str
    instances_per_expert: int
    keys: str
    revision: int
    experts: list[ListedExpert]


@dataclasses.dataclass(frozen=True)
class Instance:
    """Fields of a line of ``instances.jsonl``: a training instance behind a key."""

    expert: str
    source: str
    choices_expression: str | None
    labels: list[str]


def read_library(folder: epath.Path) -> dict[str, Any]:
    """Reads ``library.json``, as it is written now or as an older version wrote it.

    Raises:
        InputError: there is none, or a field of it is missing or wrong.
    """
    path = folder / LIBRARY
    found = storage.read_json(path, kind="library", schema_version=None)
    older = found.get("schema_version") == OLDER_VERSION
    facts = records.read_record(path, OlderLibraryFacts if older else LibraryFacts, kind="library",
                                schema_version=OLDER_VERSION if older else SCHEMA_VERSION)
    for field in ("keys",) if older else ("keys", "cards"):
        if not _NAME.fullmatch(facts[field]):  # becomes a path
            raise InputError(describe(f"The library's {field} have no valid name", where=f"{path}: {field}",
                                      got=repr(facts[field])[:100], expected="six digits"))
    if facts["text_format"] not in FORMATS:
        raise InputError(describe("The library's texts have no known format", where=f"{path}: text_format",
                                  got=repr(facts["text_format"])[:100], expected=" or ".join(FORMATS)))
    if not older and (set(facts["sizes"]) != set(GROWING) or min(facts["sizes"].values()) < 0):
        raise InputError(describe("The library's files have no valid sizes", where=f"{path}: sizes",
                                  got=str(facts["sizes"])[:300], expected=f"bytes of {', '.join(GROWING)}"))
    check_means(facts.get("means_per_expert"), f"{path}: means_per_expert")
    return facts


def check_means(count: int | None, where: str = "means") -> None:
    """Raises InputError for a number of means of an expert that no library has; None is for none."""
    if count is not None and not 1 <= count <= MOST_MEANS:
        raise InputError(describe("The number of means of an expert is not valid", where=where, got=count,
                                  expected=f"1 to {MOST_MEANS}"))


def cards_path(folder: epath.Path, name: str) -> epath.Path:
    """Path of a library's file of cards."""
    return folder / CARDS / f"{name}.jsonl"


def listing(folder: epath.Path, facts: Mapping[str, Any]) -> epath.Path:
    """Path of the file in which a library lists its experts."""
    return folder / LIBRARY if "experts" in facts else cards_path(folder, facts["cards"])


def read_listed_of(folder: epath.Path, facts: Mapping[str, Any], index: KeyIndex
                   ) -> dict[str, tuple[ExpertCard, int]]:
    """Reads the experts that a library lists; InputError if its keys are of others."""
    listed = read_listed(folder, facts)
    unlike = sorted(listed.keys() ^ set(index.experts))
    if unlike:
        raise InputError(describe(
            "The library does not list the experts that its keys are of", where=listing(folder, facts),
            got=f"{unlike[0]}, " + ("without keys" if unlike[0] in listed else "not listed"),
            cure="build the library again"))
    return listed


def read_listed(folder: epath.Path, facts: Mapping[str, Any]) -> dict[str, tuple[ExpertCard, int]]:
    """Reads the experts that a library lists: card and number of keys, by id.

    Raises:
        InputError: one is not valid, or listed twice.
    """
    where = listing(folder, facts)
    if "experts" in facts:
        entries = facts["experts"]
    else:
        entries = records.read_records(where, ListedExpert, kind="expert of a library",
                                       size=facts["sizes"][CARDS])
    found: dict[str, tuple[ExpertCard, int]] = {}
    for entry in entries:
        card = ExpertCard.from_dict(entry["card"], where=where)
        if card.id in found:
            raise InputError(describe("The library lists an expert twice", where=f"{where}: experts",
                                      got=repr(card.id)[:100], cure="take one of them out"))
        found[card.id] = card, entry["num_keys"]
    return found


def read_instances(folder: epath.Path, facts: Mapping[str, Any], index: KeyIndex) -> list[dict[str, Any]]:
    """Reads the instances behind the keys of a library, one a key, none of means; InputError for others."""
    path, means = folder / "keys" / facts["keys"] / INSTANCES, facts.get("means_per_expert")
    instances = records.read_records(path, Instance, kind="instance of a library",
                                     size=(facts.get("sizes") or {}).get(INSTANCES))
    owners = [] if means else index.owners
    if [row["expert"] for row in instances] != [index.experts[owner] for owner in owners]:
        raise InputError(describe("The instances are not those of the library's keys", where=path,
                                  got=f"{len(instances)} instances", expected="none behind means" if means
                                  else f"{len(index)}, one a key", cure="build the library again"))
    return instances


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a library holds of some experts beside their folders.

    Attributes:
        keys: f32[S, K] of each expert, by id.
        instances: one a key, in the order of the keys; none behind means.
        cards: of each expert, with its number of keys.
    """

    keys: Mapping[str, np.ndarray]
    instances: Sequence[Mapping[str, Any]]
    cards: Sequence[tuple[ExpertCard, int]]

    def write(self, folder: epath.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Writes these experts behind those that count in a library's files; returns its new facts."""
        place, sizes = folder / "keys" / facts["keys"], facts["sizes"]
        cards = ({"card": card.to_dict(), "num_keys": count} for card, count in self.cards)
        grown = {
            **index_files.append_keys(place, sizes, self.keys),
            INSTANCES: storage.append_bytes(place / INSTANCES, sizes[INSTANCES],
                                            index_files.as_lines(self.instances)),
            CARDS: storage.append_bytes(cards_path(folder, facts["cards"]), sizes[CARDS],
                                        index_files.as_lines(cards))}
        return {**facts, "sizes": grown}

    def write_anew(self, folder: epath.Path, facts: Mapping[str, Any], index_facts: Mapping[str, Any],
                   name: str) -> dict[str, Any]:
        """Writes these experts, all that a library has, into new files; returns its new facts."""
        place = storage.begin(folder / "keys" / name)
        index_files.write_index(place, index_facts, {})
        settings = {field: value for field, value in facts.items() if field != "experts"}
        written = self.write(folder, {**settings, "schema_version": SCHEMA_VERSION, "keys": name,
                                      "cards": name, "sizes": dict.fromkeys(GROWING, 0)})
        storage.commit(place)
        return written


def cut_off(folder: epath.Path, facts: Mapping[str, Any]) -> None:
    """Cuts off what an interrupted change has written behind what counts in a library's files."""
    for name, size in (facts.get("sizes") or {}).items():
        path = cards_path(folder, facts["cards"]) if name == CARDS else folder / "keys" / facts["keys"] / name
        if path.exists() and path.stat().length > size:
            storage.append_bytes(path, size, ())


def unlike_card(card: ExpertCard, listed: ExpertCard) -> str:
    """The fault, in words, of an expert whose card is not the one that its library lists."""
    unlike = "; ".join(differences(card.to_dict(), listed.to_dict()))
    return f"{listed.id}: its {EXPERT_FILE} is not what the library lists: {unlike}"
