"""Checks whether a chunk of a zarr array is complete, by its first and last bytes, without decoding it."""

import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_ID_BYTES = (0, 1, 2, 4)
_ZSTD_SIZE_BYTES = (0, 2, 4, 8)
_RUN_LENGTH_BLOCK = 1


def is_whole(path: str, compressor: Mapping[str, Any] | None, decoded_bytes: int) -> bool:
    """Whether the file of a chunk is as long as its contents need.

    Args:
        path: a local file.
        compressor: as in the array's ``.zarray``; of a kind that is not known here, any file passes.
        decoded_bytes: size of the chunk when it is decoded.
    """
    size = os.path.getsize(path)
    if compressor is None:
        return size == decoded_bytes
    check = _CHECKS.get(compressor.get("id", ""))
    if check is None:
        return True
    with open(path, "rb") as file:
        try:
            return check(file, size, decoded_bytes)
        except struct.error:  # the file ends within a header
            return False


def _gzip(file: BinaryIO, size: int, decoded_bytes: int) -> bool:
    """Whether a gzip chunk (RFC 1952) is whole: its last four bytes are the decoded size."""
    file.seek(max(0, size - 4))
    return size >= 18 and struct.unpack("<I", file.read(4))[0] == decoded_bytes % 2**32


def _blosc(file: BinaryIO, size: int, decoded_bytes: int) -> bool:
    """Whether a Blosc chunk is whole: its header holds the decoded and the encoded size."""
    _, decoded, _, encoded = struct.unpack("<4I", file.read(16))
    return decoded == decoded_bytes and encoded == size


def _zstd(file: BinaryIO, size: int, decoded_bytes: int) -> bool:
    """Whether a Zstandard frame (RFC 8878) is whole: follows it from block to block."""
    del decoded_bytes  # a frame need not say it
    magic, descriptor = struct.unpack("<IB", file.read(5))
    if magic != _ZSTD_MAGIC:
        return False
    single = descriptor >> 5 & 1
    content = _ZSTD_SIZE_BYTES[descriptor >> 6] or single
    position = 5 + (1 - single) + _ZSTD_ID_BYTES[descriptor & 3] + content
    last = False
    while not last:
        file.seek(position)
        header = int.from_bytes(struct.unpack("3s", file.read(3))[0], "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == _RUN_LENGTH_BLOCK else length)
    return size == position + 4 * (descriptor >> 2 & 1)


_CHECKS: dict[str, Callable[[BinaryIO, int, int], bool]] = {"gzip": _gzip, "blosc": _blosc, "zstd": _zstd}
