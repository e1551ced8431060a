"""Files of a prepared split: written with digests, and checked when they are read (see `prepared`).

Checked always: commit marker, description, dtypes, numbers of values and bytes, offsets, labels. To read
all contents, for their digests and the ids of tokens, takes about a second a GiB, so the first process of a
run does it, once.
"""

import dataclasses
import hashlib
import io
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import npy_files, records, storage

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
CURE = "remove the folder and prepare the split again"
ARRAYS = {
    "tokens": np.int32, "sequences": np.int64, "rows": np.int64, "labels": np.int32,
    "texts": np.uint8, "text_ends": np.int64,
}
"""Names and dtypes of the arrays; each is flat."""
_MAPPED = ("tokens", "texts")
"""The large ones. Each holds a file open, and a study opens hundreds of splits: the others are read."""
_INFO_FILE, _DIGEST = "info.json", "info_sha256"


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What the description says of an array's file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Fields of ``info.json``; what `info` holds is the split's own. Older versions wrote no `arrays`."""

    name: str
    split: str
    num_rows: int
    info: dict[str, Any]
    arrays: dict[str, FileFacts] = dataclasses.field(default_factory=dict)


def write(folder: storage.PathLike, name: str, split: str, info: Mapping[str, Any],
          arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a split's arrays, then its description with their digests, then the commit marker."""
    folder = storage.begin(folder)
    files = {}
    for key in ARRAYS:
        buffer = io.BytesIO()
        np.save(buffer, arrays[key], allow_pickle=False)
        content = buffer.getvalue()
        files[key] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with storage.guard_writes(folder):
            (folder / f"{key}.npy").write_bytes(content)
    storage.write_json(folder / _INFO_FILE, {
        "schema_version": SCHEMA_VERSION, "name": name, "split": split,
        "num_rows": len(arrays["labels"]), "info": info, "arrays": files,
    })
    storage.commit(folder, {_DIGEST: hashlib.sha256((folder / _INFO_FILE).read_bytes()).hexdigest()})


def read(folder: storage.PathLike, contents: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a split's description and arrays; tokens and texts are memory-mapped on a local disk.

    Args:
        folder: of the split.
        contents: whether all of it is read, and compared with its digests.

    Raises:
        InputError: as `PreparedSplit.open` says.
    """
    folder = storage.require_committed(folder, "prepared split")
    head = read_info(folder)
    arrays = {key: _load(folder / f"{key}.npy", key, head["arrays"].get(key)) for key in ARRAYS}
    _check_offsets(arrays, head["num_rows"], folder)
    _check_labels(arrays, folder)
    if contents:
        check_tokens(arrays["tokens"], None, folder)
        for key, facts in head["arrays"].items():
            _check_digest(folder / f"{key}.npy", facts["sha256"])
        if not head["arrays"]:
            logger.info("%s is of an older version, which wrote no digests: its ranges are checked", folder)
    return head, arrays


def read_info(folder: epath.Path) -> dict[str, Any]:
    """Reads ``info.json``: ``name``, ``split``, ``num_rows``, ``info``; ``arrays``, empty in older ones.

    Raises:
        InputError: a field is missing or of another type, the names leave the folder, or the file is not the
            one that the commit marker tells.
    """
    path = folder / _INFO_FILE
    head = records.read_record(path, SplitInfo, kind="description of a prepared split",
                               schema_version=SCHEMA_VERSION)
    for key in ("name", "split"):  # results are kept by them, in files of these names
        storage.require_name(head[key], f"{path}: {key}", f"split's {key}")
    files = head.setdefault("arrays", {})
    written = storage.read_marker(folder, "prepared split").get(_DIGEST)
    if files.keys() not in (set(), ARRAYS.keys()):
        raise InputError(describe("The description of a prepared split lists other arrays", cure=CURE,
                                  where=f"{path}: arrays", got=in_short(list(files)),
                                  expected=", ".join(ARRAYS)))
    if (files and written is None) or written not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        raise InputError(describe("The description of a prepared split is not the one that was written",
                                  where=path, expected=f"the {_DIGEST} in {storage.MARKER}", cure=CURE))
    return head


def check_tokens(tokens: np.ndarray, size: int | None, where: Any) -> None:
    """Raises InputError if an id of tokens i32[n] is below 0, or not below a vocabulary's size if given."""
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or (size is not None and high >= size):
        raise InputError(describe("A token of the prepared split has no such id", where=f"{where}/tokens.npy",
                                  got=f"{low} to {high}",
                                  expected="at least 0" if size is None else f"0 to {size - 1}", cure=CURE))


def _load(path: epath.Path, key: str, written: Mapping[str, Any] | None) -> np.ndarray:
    try:
        length = path.stat().length
        if written is not None and length != written["bytes"]:
            raise ValueError(f"{length} bytes, expected {written['bytes']}")
        return npy_files.read_flat(path, ARRAYS[key], mapped=key in _MAPPED)
    except TypeError as error:
        raise InputError(describe("An array of the prepared split has another type", where=path,
                                  got=error, cure=CURE)) from error
    except (OSError, ValueError) as error:
        raise InputError(describe("An array of the prepared split cannot be read", where=path,
                                  got=error, cure=CURE)) from error


def _check_digest(path: epath.Path, written: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != written:
        raise InputError(describe("An array of the prepared split is not the one that was written",
                                  where=path, got=f"sha256 {found}", expected=written, cure=CURE))


def _check_offsets(arrays: Mapping[str, np.ndarray], num_rows: int, folder: epath.Path) -> None:
    """Checks that offsets rise inside the arrays that they are of, and that each row has what it must."""
    chain = (("sequences", "tokens", len(arrays["tokens"]), None, 1),
             ("rows", "sequences", len(arrays["sequences"]) - 1, num_rows, 2),
             ("text_ends", "texts", len(arrays["texts"]), num_rows, 1))
    for key, target, behind, count, least in chain:
        values = arrays[key]
        whole = len(values) > 0 and values[0] == 0 and values[-1] == behind
        if not whole or (np.diff(values) < least).any() or count not in (None, len(values) - 1):
            raise InputError(describe("The arrays of a prepared split do not fit each other",
                                      where=f"{folder}/{key}.npy: {key} against {target}", cure=CURE))
    if len(arrays["labels"]) != num_rows:
        raise InputError(describe("The arrays of a prepared split do not fit each other",
                                  where=f"{folder}/labels.npy", got=len(arrays["labels"]),
                                  expected=num_rows, cure=CURE))


def _check_labels(arrays: Mapping[str, np.ndarray], folder: epath.Path) -> None:
    labels, choices = arrays["labels"], np.diff(arrays["rows"]) - 2
    wrong = np.flatnonzero((labels < -1) | (labels >= choices))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(describe(
            "A label of the prepared split is not the index of a choice",
            where=f"{folder}/labels.npy, row {row}", got=int(labels[row]),
            expected=f"-1 to {int(choices[row]) - 1}", cure=CURE))
