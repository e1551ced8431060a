"""Copies in a library: experts of equal weights, or of equal training rows or means, which count once."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from elm_jax.experts.card import SCHEMA_VERSION, StoredCard
from elm_jax.formats.places import EXPERT_FILE
from elm_jax.runtime import records


def fingerprint_in(folder: epath.Path) -> str | None:
    """Fingerprint of the weights of an expert of a library, as its file says; None where there is no file."""
    path = folder / EXPERT_FILE
    if not path.exists():
        return None
    facts = records.read_record(path, StoredCard, kind="expert's card", schema_version=SCHEMA_VERSION)
    return facts.get("overlay_fingerprint")


def copies_among(experts: Sequence[str], fingerprints: Mapping[str, str | None],
                 instances: Iterable[Mapping[str, Any]], keys: Mapping[str, np.ndarray] | None = None
                 ) -> np.ndarray | None:
    """Finds experts that are equal to an older one: in weights, instances behind keys, or keys.

    Instances and keys are equal in any order. The oldest of all that are equal, also by way of others,
    stands for them.

    Args:
        experts: E ids, the oldest first.
        fingerprints: of their weights; None where it is not known.
        instances: behind the keys: ``expert``, ``source``, ``choices_expression`` and ``labels`` of each.
        keys: f32[S, K] by expert, where they tell; an expert of whose texts the encoder knows nothing has no
            equal by them.

    Returns:
        i64[E], position of the oldest equal of each expert, its own for one that has none; None if all
        experts are different.
    """
    oldest = list(range(len(experts)))

    def first_of(expert: int) -> int:
        while oldest[expert] != expert:
            expert = oldest[expert]
        return expert

    for facts in (fingerprints, _row_sets(experts, instances), _key_sets(keys or {})):
        seen: dict[Any, int] = {}
        for number, name in enumerate(experts):
            fact = facts.get(name)
            if fact is not None:
                pair = first_of(seen.setdefault(fact, number)), first_of(number)
                oldest[max(pair)] = min(pair)
    copies = np.array([first_of(expert) for expert in oldest], np.int64)
    return None if np.array_equal(copies, np.arange(len(copies))) else copies


def _row_sets(experts: Sequence[str], instances: Iterable[Mapping[str, Any]]) -> dict[str, frozenset]:
    """Of each expert that may be a copy its instances, with how often each is there.

    First only their number and one text of each are compared, which is little for a library of many experts.
    """
    of: dict[str, list[Mapping[str, Any]]] = {name: [] for name in experts}
    for row in instances:
        of[row["expert"]].append(row)
    signs = {name: (len(rows), min(row["source"] for row in rows)) for name, rows in of.items() if rows}
    common = collections.Counter(signs.values())
    return {name: _counted(of[name]) for name, sign in signs.items() if common[sign] > 1}


def _key_sets(keys: Mapping[str, np.ndarray]) -> dict[str, tuple[bytes, ...]]:
    """Of each expert that may be a copy its keys, sorted.

    First only their number and the least value of the first dimension are compared.
    """
    signs = {name: (len(rows), rows[:, 0].min()) for name, rows in keys.items() if rows.any()}
    common = collections.Counter(signs.values())
    return {name: tuple(sorted(row.tobytes() for row in keys[name]))
            for name, sign in signs.items() if common[sign] > 1}


def _counted(rows: Iterable[Mapping[str, Any]]) -> frozenset:
    found = collections.Counter(
        (row["source"], row["choices_expression"], tuple(row["labels"])) for row in rows)
    return frozenset(found.items())
