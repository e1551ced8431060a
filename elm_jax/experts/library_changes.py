"""Changes of a library that were interrupted: what they write and remove is named in a file until they end.

Only what that file names is ever cleared: other folders in a library are not this program's.
"""

import dataclasses
import math
import time
from collections.abc import Container, Mapping
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.experts import library_files
from elm_jax.runtime import locks, storage

CHANGE_FILE = "change.json"
_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LibraryChange:
    """One change of a library.

    Attributes:
        revision: of the library after it.
        added: ids of the experts that it adds.
        removed: ids of those that it removes.
        replaced: name of the keys and cards in whose place it writes new ones, if it does not add to them.
    """

    revision: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: str | None = None


def keys_name(revision: int) -> str:
    """Name of the keys, and of the cards, that a revision writes anew."""
    return f"{revision:06d}"


def begin_change(path: storage.PathLike, change: LibraryChange) -> None:
    """Names a change, before it writes anything else."""
    storage.write_json(storage.as_path(path) / CHANGE_FILE,
                       {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(change)})


def was_interrupted(path: storage.PathLike) -> bool:
    """Whether a change has not ended: a process is making it, or was killed."""
    return (storage.as_path(path) / CHANGE_FILE).exists()


def refuse_recent(path: storage.PathLike) -> None:
    """Raises InputError if a change may still be under way; where no lock tells, as in a bucket or on NFS.

    What it writes would be taken for the remains of a killed process.
    """
    file = storage.as_path(path) / CHANGE_FILE
    try:
        age = time.time() - file.stat().mtime
    except FileNotFoundError:
        age = math.inf
    if age < locks.CHANGE_SECONDS:
        raise InputError(describe(
            "Another process may be changing this library, and this disk has no locks to tell",
            where=file, got=f"a change that began {max(age, 0):.0f} s ago and has not ended",
            cure=f"wait for its end, or {locks.CHANGE_SECONDS:.0f} s if it was killed; or remove this file, "
            "if nothing else changes the library"))


def end_change(path: storage.PathLike, facts: Mapping[str, Any], listed: Container[str]
               ) -> LibraryChange | None:
    """Removes what a change leaves that the library does not list, and last the file that names it.

    Args:
        path: of the library, which this process keeps.
        facts: of ``library.json``; of an empty library where there is none.
        listed: ids of the library's experts.

    Returns:
        The change, if there was one and the library has it.

    Raises:
        InputError: the file that names the change is damaged.
    """
    if not was_interrupted(path):
        return None
    path = storage.as_path(path)
    change = _read(path)
    names = {keys_name(change.revision - 1), keys_name(change.revision), change.replaced} - {None}
    for name in names - {facts["keys"]}:
        storage.remove(path / "keys" / name)
    for name in names - {facts.get("cards")}:
        library_files.cards_path(path, name).unlink(missing_ok=True)
    library_files.cut_off(path, facts)
    for expert_id in (*change.added, *change.removed):
        if expert_id not in listed:
            storage.remove(path / "experts" / expert_id)
    (path / CHANGE_FILE).unlink(missing_ok=True)
    return change if change.revision == facts["revision"] else None


def _read(path: storage.PathLike) -> LibraryChange:
    where = storage.as_path(path) / CHANGE_FILE
    value = storage.read_json(where, kind="change of a library", schema_version=_SCHEMA_VERSION)
    revision, added, removed = (value.get(name) for name in ("revision", "added", "removed"))
    replaced = value.get("replaced")
    if type(revision) is not int or not isinstance(added, list) or not isinstance(removed, list):
        raise InputError(describe("The change of a library is not valid", where=where,
                                  expected="a revision, ids that were added, and ids that were removed",
                                  cure="remove it: `elm library verify` says whether the rest is whole"))
    names = [tuple(storage.require_name(name, where, "id of an expert") for name in ids)
             for ids in (added, removed)]
    if replaced is not None:
        storage.require_name(replaced, where, "name of keys")
    return LibraryChange(revision, *names, replaced)
