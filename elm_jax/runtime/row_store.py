"""Rows of numbers on disk under keys of their contents: bounded, written safely, shared by runs.

A store is a folder of shards. A shard is one file, which appears when it is whole; its name begins with the
checksum of its index:

```
index   npy, one record a row: key, length, checksum
values  dtype[rows' lengths added up, D], row after row
```

Nothing in a shard ever changes, so many processes may read and write one store; a row that two of them write
is there twice, with equal values.
"""

import contextlib
import io
import logging
import os
import time
import zlib
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.runtime import leftovers, storage
from elm_jax.runtime.differences import as_json, differences
from elm_jax.runtime.npy_files import read_head

logger = logging.getLogger(__name__)
ABOUT, SUFFIX = "about.json", ".rows"
SHARD_BYTES = 64 * 2**20
_HEAD_BYTES = 1024  # more than a shard's head and, once, the store's description
_INDEX = np.dtype([("key", "u1", (16,)), ("length", "<i8"), ("checksum", "<u4")])


class _Place(NamedTuple):
    """Where a row is: its shard's values, and the row's own part and checksum."""

    values: np.ndarray
    start: int
    stop: int
    checksum: int
    file: str


class RowStore:
    """Rows dtype[n, D] under keys of 16 bytes, in a folder and, until they are written, in memory.

    Args:
        root: folder of stores, on a local disk; the limit of bytes holds for all of it.
        name: of this store's folder in `root`.
        facts: what the rows were made of, JSON-ready; written beside them, and compared.
        width: D.
        dtype: of the values.
        most_bytes: of all files in `root`; a row beyond is not kept.
        writers: processes of one run that write into `root`: each may fill its share of what is left.

    Raises:
        InputError: a bucket, a store of other facts, or a damaged shard.
    """

    def __init__(self, root: storage.PathLike, name: str, facts: dict[str, Any], *, width: int,
                 dtype: np.dtype, most_bytes: int, writers: int = 1) -> None:
        if not storage.is_local(root):
            raise InputError(describe("A store of rows is on a local disk", where=root, got="a bucket"))
        self.root, self.folder = storage.as_path(root), storage.as_path(root) / name
        self.width, self.dtype, self.most_bytes = width, np.dtype(dtype), most_bytes
        self.full = False
        self._writers = writers
        self._read: set[str] = set()
        self._places: dict[bytes, _Place] = {}
        self._waiting: dict[bytes, np.ndarray] = {}
        self._about = {"schema_version": 1, "facts": facts, "width": width, "dtype": self.dtype.name}
        self._waiting_bytes, self._room = 0, 0
        self._open()

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def get(self, key: bytes) -> np.ndarray | None:
        """Returns the row of a key, dtype[n, D], or None.

        Raises:
            InputError: the row on disk is damaged.
        """
        if key in self._waiting:
            return self._waiting[key]
        place = self._places.get(key)
        if place is None:
            return None
        row = place.values[place.start:place.stop]
        if zlib.crc32(row) != place.checksum:
            raise _damaged(place.file, "a row whose checksum differs")
        return row.view(self.dtype)

    def put(self, key: bytes, row: np.ndarray) -> bool:
        """Keeps a row dtype[n, D]; returns False, and says so once, if the store is full."""
        if key in self._waiting or key in self._places:
            return True
        size = row.nbytes + _INDEX.itemsize + (0 if self._waiting else _HEAD_BYTES)
        if size > self._room:
            self._say_full()
            return False
        self._room -= size
        self._waiting[key] = np.array(row, self.dtype)
        self._waiting_bytes += size
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Writes the rows that wait in memory as one shard."""
        if not self._waiting:
            return
        index = np.zeros(len(self._waiting), _INDEX)
        rows = [np.ascontiguousarray(row).view(np.uint8) for row in self._waiting.values()]
        index["key"] = [np.frombuffer(key, np.uint8) for key in self._waiting]
        index["length"] = list(map(len, rows))
        index["checksum"] = list(map(zlib.crc32, rows))
        head = io.BytesIO()
        np.save(head, index, allow_pickle=False)
        content = b"".join([head.getvalue(), *(row.tobytes() for row in rows)])
        name = f"{zlib.crc32(index.tobytes()):08x}-{time.time_ns():x}{SUFFIX}"
        if not (self.folder / ABOUT).exists():
            storage.write_json(self.folder / ABOUT, self._about, own=True)
        storage.write_bytes(self.folder / name, content, own=True)
        self._waiting, self._waiting_bytes = {}, 0
        self._read_shard(self.folder / name)
        if self._writers == 1:  # several cannot count together: each keeps to the share that it began with
            self._room = self.most_bytes - self._bytes_used()

    def read_others(self) -> None:
        """Reads the shards that other processes have written since."""
        if self.folder.exists():
            for path in sorted(self.folder.iterdir()):
                if path.name.endswith(SUFFIX) and path.name not in self._read:
                    self._read_shard(path)

    def _open(self) -> None:
        if (self.folder / ABOUT).exists():
            found = storage.read_json(self.folder / ABOUT, kind="store's description", schema_version=1)
            if found != as_json(self._about):
                raise InputError(describe("The store holds rows that were made of something else",
                                          where=self.folder / ABOUT, cure="remove this folder",
                                          got="; ".join(differences(found, self._about))))
        self.read_others()
        if self._read and not (self.folder / ABOUT).exists():  # which is written before the first shard
            raise InputError(describe("The store lacks its description", where=self.folder, expected=ABOUT,
                                      cure="remove this folder: its rows are computed again"))
        leftovers.clear(str(self.folder))
        self._room = (self.most_bytes - self._bytes_used()) // self._writers

    def _read_shard(self, path: epath.Path) -> None:
        """Reads a shard's index, and maps its values into memory."""
        self._read.add(path.name)
        try:
            with open(path, "rb") as file:
                index = np.frombuffer(file.read(_INDEX.itemsize * read_head(file, _INDEX)), _INDEX)
                offset = file.tell()
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        if not path.name.startswith(f"{zlib.crc32(index):08x}-"):
            raise _damaged(path, "an index whose checksum is not that in the file's name")
        if path.stat().length != offset + int(index["length"].sum()) * self._row_bytes:
            raise _damaged(path, f"{path.stat().length} bytes")
        values = np.memmap(path, np.uint8, "r", offset).view(np.ndarray).reshape(-1, self._row_bytes)
        ends = np.cumsum(index["length"]).tolist()
        for record, end in zip(index, ends, strict=True):
            self._places[record["key"].tobytes()] = _Place(
                values, end - int(record["length"]), end, int(record["checksum"]), str(path))

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def _bytes_used(self) -> int:
        used = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process has renamed it
                    used += os.stat(os.path.join(folder, name)).st_size
        return used

    def _say_full(self) -> None:
        if not self.full:
            logger.warning("%s is full: at most %d bytes may lie in %s; %d rows are kept, the others are "
                           "computed each time (give more bytes, or remove folders that no run needs)",
                           self.folder, self.most_bytes, self.root, len(self))
        self.full = True


def _damaged(path: Any, got: str) -> InputError:
    return InputError(describe("A file of stored rows is damaged", where=path, got=got[:200],
                               cure="remove this file: its rows are computed again"))
