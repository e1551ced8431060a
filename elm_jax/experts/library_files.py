"""Files of a library of experts: their fields, checked when they are read."""

import dataclasses
import re
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.formats.places import EXPERT_FILE
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.text import FORMATS
from elm_jax.runtime import records
from elm_jax.runtime.differences import differences

SCHEMA_VERSION = 1
LIBRARY, INSTANCES = "library.json", "instances.jsonl"
_KEYS = re.compile(r"\d{6,}")


@dataclasses.dataclass(frozen=True)
class EncoderFacts:
    """The encoder that a library names."""

    name: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ListedExpert:
    """One expert as ``library.json`` lists it; `ExpertCard` checks the card."""

    card: dict[str, Any]
    num_keys: int


@dataclasses.dataclass(frozen=True)
class LibraryFacts:
    """Fields of ``library.json``."""

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
    """Reads ``library.json``; InputError if there is none, or a field of it is missing or wrong."""
    path = folder / LIBRARY
    facts = records.read_record(path, LibraryFacts, kind="library", schema_version=SCHEMA_VERSION)
    if not _KEYS.fullmatch(facts["keys"]):  # becomes a path
        raise InputError(describe("The library's keys have no valid name", where=f"{path}: keys",
                                  got=repr(facts["keys"])[:100], expected="six digits"))
    if facts["text_format"] not in FORMATS:
        raise InputError(describe("The library's texts have no known format", where=f"{path}: text_format",
                                  got=repr(facts["text_format"])[:100], expected=" or ".join(FORMATS)))
    ids = [entry["card"].get("id") for entry in facts["experts"]]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise InputError(describe("The library lists an expert twice", where=f"{path}: experts",
                                  got=repr(twice)[:100], cure="take one of them out"))
    return facts


def read_instances(path: epath.Path, index: KeyIndex) -> list[dict[str, Any]]:
    """Reads the instances behind an index's keys, one a key; InputError if they are others."""
    instances = records.read_records(path, Instance, kind="instance of a library")
    if [row["expert"] for row in instances] != [index.experts[owner] for owner in index.owners]:
        raise InputError(describe("The instances are not those of the library's keys", where=path,
                                  got=f"{len(instances)} instances", expected=f"{len(index)}, one a key",
                                  cure="build the library again"))
    return instances


def unlike_card(card: ExpertCard, listed: ExpertCard) -> str:
    """The fault, in words, of an expert whose card is not the one that its library lists."""
    unlike = "; ".join(differences(card.to_dict(), listed.to_dict()))
    return f"{listed.id}: its {EXPERT_FILE} is not what library.json lists: {unlike}"
