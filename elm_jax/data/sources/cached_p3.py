"""Reads T0's cached P3: rendered prompts in SeqIO's cache format, without TensorFlow.

```
<folder>/<split>.tfrecord-00000-of-00004   records of tf.train.Example
```

A task to train on has ``inputs_pretokenized`` and ``targets_pretokenized`` (and perhaps
``answer_choices``). A task to score (``..._score_eval``) has an example for each answer choice: ``idx``
(row and choice), ``is_correct``, the choice as target. SeqIO deals the examples of a split over its files one
by one, so that the choices of a row need not stand together; they are gathered by ``idx``. ``inputs`` and
``targets`` hold token ids; where the texts are left out they are decoded from them, in the vocabulary that is
given.
"""

import collections
import dataclasses
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.vocabularies.vocabulary import Vocabulary

try:  # a hundred times as fast, where it is installed
    from google_crc32c import value as _fast_crc
except ImportError:
    _fast_crc = None

_MAX_RECORD = 100_000_000


@dataclasses.dataclass(frozen=True)
class CachedSplit:
    """Rows of one split of a cached task.

    Attributes:
        path: folder of the task.
        split: the split.
        vocabulary: file of that of the token ids, where the texts are left out; else None.
    """

    path: epath.Path
    split: str
    vocabulary: epath.Path | None = None
    transforms = False

    def exists(self) -> bool:
        """Whether any file of the split exists."""
        return bool(_found(self.path, self.split)[0])

    def read(self) -> list[dict[str, Any]]:
        """Reads all rows, see `read_rows`."""
        return read_rows(self.path, self.split, self.vocabulary and Vocabulary.load(self.vocabulary))

    def files(self) -> list[epath.Path]:
        """Paths of the split's files.

        Raises:
            InputError: a file of the split is missing.
        """
        return _shards(self.path, self.split) + ([self.vocabulary] if self.vocabulary else [])

    def place_of(self, index: int) -> str:
        """File and number of a row, for errors."""
        return f"{self.path}, split {self.split}, row {index + 1}"


def read_rows(folder: storage.PathLike, split: str,
              vocabulary: Vocabulary | None = None) -> list[dict[str, Any]]:
    """Reads the prompts of a cached split: in the files' order, or by row number if choices are scored.

    Args:
        folder: of the task.
        split: ``train``, ``validation``, ...
        vocabulary: in which token ids are decoded; None if the cache holds the texts.

    Returns:
        Rows ``{"inputs", "targets", "choices"}``; of a scored task, one for each instance, with ``scores`` if
        several of its choices are right.

    Raises:
        InputError: no such split, a damaged file (it and the record are named), an example that lacks a
            feature, or a scored row whose choices are not all there once.
    """
    raw = list(read_examples(folder, split))
    scored = any("is_correct" in example for example, _ in raw)
    examples = [_texts(example, vocabulary, where, scored) for example, where in raw]
    if not scored:
        return [{name: example[name] for name in ("inputs", "targets", "choices")} for example in examples]
    groups = collections.defaultdict(list)
    for example in examples:
        groups[example["row"]].append(example)
    return [_instance(groups[row], f"{folder}, split {split}, row {row} of idx") for row in sorted(groups)]


def _instance(examples: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    """Builds one instance from its scored choices, in their order.

    T0 marks each choice that is the row's target: two alike are both right, and a target that is none of the
    choices leaves none. The first right one is the target here, and none is no target; of several right ones
    ``scores`` says which.
    """
    examples = sorted(examples, key=lambda example: example["choice"])
    found = [example["choice"] for example in examples]
    if found != list(range(len(found))):
        raise InputError(describe("The choices of a scored row are not all there, once each", where=where,
                                  got=f"choices {', '.join(map(str, found))}",
                                  expected="0, 1, ... each once", cure="fetch the split's files again"))
    inputs = sorted({example["inputs"] for example in examples})
    if len(inputs) > 1:
        raise InputError(describe("The choices of a scored row have unlike inputs", where=where,
                                  got=" and ".join(repr(text[:60]) for text in inputs[:2]),
                                  expected="one input", cure="fetch files of one cached task alone"))
    right = [example["targets"] for example in examples if example["is_correct"]]
    scores = {"scores": [float(example["is_correct"]) for example in examples]} if len(right) > 1 else {}
    return {"inputs": inputs[0], "targets": right[0] if right else "",
            "choices": [example["targets"] for example in examples], **scores}


def _texts(example: dict[str, list[Any]], vocabulary: Vocabulary | None, where: str,
           scored: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: _text(example, name, vocabulary, where) for name in ("inputs", "targets")}
    found["choices"] = [choice.decode() for choice in example.get("answer_choices", ())]
    if scored:
        if len(example.get("is_correct", ())) != 1 or len(example.get("idx", ())) != 2:
            raise InputError(describe(
                "A scored example lacks a feature", where=where,
                got=f"is_correct {example.get('is_correct')}, idx {example.get('idx')}",
                expected="one number is_correct, and the two of idx, row and choice"))
        found["is_correct"] = bool(example["is_correct"][0])
        found["row"], found["choice"] = example["idx"]
    return found


def _text(example: dict[str, list[Any]], name: str, vocabulary: Vocabulary | None, where: str) -> str:
    values = example.get(f"{name}_pretokenized") or example.get(name) or []
    if len(values) == 1 and isinstance(values[0], bytes):
        return values[0].decode()
    if not values or isinstance(values[0], bytes):
        raise InputError(describe("An example lacks a feature", where=where, got=", ".join(sorted(example)),
                                  expected=f"{name}_pretokenized, or {name}"))
    if vocabulary is None:
        raise InputError(describe("An example holds token ids and no text", where=f"{where}, {name}",
                                  cure="give the vocabulary with which they were made"))
    return vocabulary.decode([int(token) for token in values if token != vocabulary.eos_id])


def read_examples(folder: storage.PathLike, split: str) -> Iterator[tuple[dict[str, list[Any]], str]]:
    """Yields the features of every example of a split, and the example's place.

    Raises:
        InputError: no such split, a shard is missing, or a file is damaged.
    """
    for path in _shards(storage.as_path(folder), split):
        data, start, number = storage.read_bytes(path), 0, 0
        while start < len(data):
            number += 1
            where = f"{path}, record {number}"
            record, start = _record(data, start, where)
            try:
                yield _example(record), where
            except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
                raise InputError(describe("A record holds no tf.train.Example", where=where,
                                          got=str(error), cure="fetch the file again")) from error


def _shards(folder: epath.Path, split: str) -> list[epath.Path]:
    found, wanted = _found(folder, split)
    if len(found) != wanted:
        raise InputError(describe(
            "A cached task lacks files of a split", where=folder, got=f"{len(found)} files of {split}",
            expected=f"{split}.tfrecord-00000-of-{wanted:05d} and so on, {wanted} in all"))
    return found


def _found(folder: epath.Path, split: str) -> tuple[list[epath.Path], int]:
    """Paths of the existing files of a split, in order, and how many there should be."""
    pattern = re.compile(rf"{re.escape(split)}\.tfrecord-(\d+)-of-(\d+)")
    found = sorted((path.name, path) for path in folder.iterdir()
                   if pattern.fullmatch(path.name)) if folder.exists() else []
    wanted = int(pattern.fullmatch(found[0][0])[2]) if found else 1
    return [path for _, path in found], wanted


def _record(data: bytes, start: int, where: str) -> tuple[bytes, int]:
    """Reads one TFRecord (u64 length, checksum, bytes, checksum); returns it and where the next starts."""
    head = data[start:start + 12]
    length = int.from_bytes(head[:8], "little")
    end = start + 12 + length
    if len(head) < 12 or length > _MAX_RECORD or end + 4 > len(data) or _masked_crc(head[:8]) != head[8:]:
        raise InputError(describe("A TFRecord file is cut off or damaged", where=where,
                                  cure="fetch the file again"))
    record = data[start + 12:end]
    if _masked_crc(record) != data[end:end + 4]:
        raise InputError(describe("A TFRecord file is damaged", where=where, got="a wrong checksum",
                                  cure="fetch the file again"))
    return record, end + 4


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """TFRecord's checksum: CRC-32C, rotated and offset."""
    crc = (_fast_crc or _slow_crc)(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def _slow_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _example(record: bytes) -> dict[str, list[Any]]:
    """Parses ``tf.train.Example``: features by name, each a list of bytes, floats or integers."""
    features: dict[str, list[Any]] = {}
    for _, container in _fields(record):
        for _, entry in _fields(container):
            parts = dict(_fields(entry))
            features[parts[1].decode()] = _values(parts.get(2, b""))
    return features


def _values(feature: bytes) -> list[Any]:
    for kind, content in _fields(feature):
        values = [value for _, value in _fields(content)]
        if kind == 1:
            return values
        packed = b"".join(value for value in values if isinstance(value, bytes))
        if kind == 2:
            return np.frombuffer(packed, "<f4").tolist()
        return [value for value in values if isinstance(value, int)] + list(_varints(packed))
    return []


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the numbers and values of a protocol buffer's fields."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == 0:
            value, position = _varint(data, position)
            yield key >> 3, _signed(value)
            continue
        if key & 7 == 2:
            length, position = _varint(data, position)
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"a field of wire type {key & 7}")
        if position + length > len(data):
            raise ValueError("a field is longer than its record")
        yield key >> 3, data[position:position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _varints(data: bytes) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield _signed(value)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
