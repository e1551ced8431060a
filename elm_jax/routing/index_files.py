"""Files of an index of keys: only ever added to, so that one more expert costs what it costs itself.

```
keys.f32       keys, little-endian float32, row after row, without a head: mapped into memory as they are
experts.jsonl  a line an expert, in the order of its keys: id, number of keys, digest of them
index.json     encoder, text format, number of dimensions
```

An older version wrote ``keys.npz`` in place of the first two, and the ids in ``index.json``.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import npy_files, records, storage, trees

KEYS, LISTED, FACTS, OLDER_KEYS = "keys.f32", "experts.jsonl", "index.json", "keys.npz"
SCHEMA_VERSION, OLDER_VERSION = 2, 1
_ROW = np.dtype("<f4")


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """Fields of ``index.json``."""

    dimension: int
    encoder: str
    encoder_fingerprint: str
    text_format: str
    instances_per_expert: int | None = None


@dataclasses.dataclass(frozen=True)
class OlderIndexFacts:
    """Fields of the ``index.json`` of an older version."""

    experts: list[str]
    encoder: str
    encoder_fingerprint: str
    text_format: str
    digest: str
    instances_per_expert: int | None = None


@dataclasses.dataclass(frozen=True)
class KeysOfExpert:
    """Fields of a line of ``experts.jsonl``."""

    expert: str
    num_keys: int
    digest: str


class StoredKeys(NamedTuple):
    """Keys f32[N, K], owners i32[N] and ids of the experts, as files hold them."""

    keys: np.ndarray
    owners: np.ndarray
    experts: tuple[str, ...]


def write_index(folder: storage.PathLike, facts: Mapping[str, Any], keys: Mapping[str, np.ndarray]
                ) -> dict[str, int]:
    """Writes an index of experts with their keys f32[S, K]; returns the bytes of the files that grow."""
    folder = storage.as_path(folder)
    storage.write_json(folder / FACTS, {"schema_version": SCHEMA_VERSION, **facts})
    return append_keys(folder, {KEYS: 0, LISTED: 0}, keys)


def append_keys(folder: storage.PathLike, sizes: Mapping[str, int], keys: Mapping[str, np.ndarray]
                ) -> dict[str, int]:
    """Writes more experts' keys f32[S, K] behind those that are there.

    Args:
        folder: of the index.
        sizes: bytes of ``keys.f32`` and ``experts.jsonl`` that count; what is behind them is cut off.
        keys: of each expert.

    Returns:
        The bytes that count with these experts.
    """
    folder = storage.as_path(folder)
    rows = {expert: np.ascontiguousarray(part, _ROW) for expert, part in keys.items()}
    lines = [{"expert": expert, "num_keys": len(part), "digest": _digest_of(part)}
             for expert, part in rows.items()]
    return {KEYS: storage.append_bytes(folder / KEYS, sizes[KEYS], map(_bytes_of, rows.values())),
            LISTED: storage.append_bytes(folder / LISTED, sizes[LISTED], as_lines(lines))}


def as_lines(rows: Iterable[Mapping[str, Any]]) -> Iterable[bytes]:
    """Rows as JSON lines."""
    return ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def read_facts(folder: epath.Path) -> dict[str, Any]:
    """Reads ``index.json``, as it is written now or as an older version wrote it."""
    path = folder / FACTS
    found = storage.read_json(path, kind="index of keys", schema_version=None)
    older = found.get("schema_version") == OLDER_VERSION
    return records.read_record(path, OlderIndexFacts if older else IndexFacts, kind="index of keys",
                               schema_version=OLDER_VERSION if older else SCHEMA_VERSION)


def read_keys(folder: epath.Path, facts: Mapping[str, Any], mapped: bool,
              sizes: Mapping[str, int] | None = None) -> StoredKeys:
    """Reads the keys of an index, of any version.

    Args:
        folder: of the index.
        facts: of its ``index.json``.
        mapped: whether they are mapped into memory, where that can be.
        sizes: bytes of each file that count; None for all.

    Raises:
        InputError: the files are damaged, or do not belong together.
    """
    if "experts" in facts:
        arrays = npy_files.read_npz(folder / OLDER_KEYS, ("keys", "owners"))
        return StoredKeys(arrays["keys"], arrays["owners"], tuple(facts["experts"]))
    sizes, dimension = sizes or {}, facts["dimension"]
    lines = records.read_records(folder / LISTED, KeysOfExpert, kind="expert of an index",
                                 size=sizes.get(LISTED))
    counts = np.array([line["num_keys"] for line in lines], np.int64)
    path = storage.require_file(folder / KEYS)
    size = sizes.get(KEYS, path.stat().length)
    if dimension < 1 or (counts < 1).any() or int(counts.sum()) * dimension * _ROW.itemsize != size:
        raise _unlike(folder, f"{size} bytes, {in_short(counts.tolist())} keys of {dimension} dimensions",
                      "four bytes a value")
    keys = _rows(path, len(counts) and int(counts.sum()), dimension, mapped)
    ends = np.cumsum(counts)
    for line, end, count in zip(lines, ends, counts, strict=True):
        require_digest(folder, _digest_of(keys[end - count:end]), line["digest"], line["expert"])
    owners = np.repeat(np.arange(len(lines), dtype=np.int32), counts)
    return StoredKeys(keys, owners, tuple(line["expert"] for line in lines))


def _rows(path: epath.Path, count: int, dimension: int, mapped: bool) -> np.ndarray:
    """Reads the first rows f32[count, dimension] of a file."""
    size = count * dimension * _ROW.itemsize
    held = path.stat().length
    if held < size:
        raise _unlike(path.parent, f"{held} bytes", f"{size} bytes")
    if mapped and count and storage.is_local(path):
        return np.memmap(path, _ROW, "r", 0, (count, dimension)).view(np.ndarray)
    return np.frombuffer(storage.read_bytes(path, end=size), _ROW).reshape(count, dimension)


def require_digest(folder: epath.Path, found: str, written: str, expert: str | None = None) -> None:
    """Raises InputError if keys are not those of a digest that is written beside them."""
    if found != written:
        raise _unlike(folder, found, written, f" of expert {expert}" if expert else "")


def _bytes_of(keys: np.ndarray) -> memoryview:
    return keys.reshape(-1).view(np.uint8).data


def _digest_of(keys: np.ndarray) -> str:
    """Hash of keys f32[S, K]."""
    digest = trees.Fingerprint()
    digest.leaf("keys", keys.shape, "float32", [keys])
    return str(digest)


def _unlike(folder: epath.Path, got: str, expected: str, whose: str = "") -> InputError:
    return InputError(describe(
        f"The keys{whose} are not those that were written",
        where=f"{folder}: {FACTS} (digest, dimension), {LISTED} (num_keys, digest), {KEYS} or {OLDER_KEYS}",
        got=got, expected=expected, cure="build the library again"))
