"""Reads data sets that TensorFlow Datasets has prepared, with the fields of the Hugging Face version.

```
ELM_TFDS_DIR/<name>[/<config>]/<version>/   as tfds.builder(name).download_and_prepare() leaves it
```

A ``huggingface:`` data set is stored there under its own name in TFDS's spelling (``/`` as ``__``). Finding a
data set needs no TensorFlow; reading it imports TFDS. Nothing is downloaded.
"""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from elm_jax.data.prompts.templates import dataset_path
from elm_jax.errors import InputError, describe
from elm_jax.runtime import records, storage

TFDS_DIR_VARIABLE = "ELM_TFDS_DIR"
_HEAD = "dataset_info.json"
_FEATURES = "features.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TfdsName:
    """A data set's name in TFDS, and how its rows differ from those of the Hugging Face version.

    Attributes:
        name: as ``glue/mrpc``, or ``huggingface:glue/mrpc``.
        fields: from a TFDS field to the Hugging Face name, for those that differ.
        adapt: for rows that differ in more than names; gets the renamed row, and leaves one that has the
            Hugging Face version's fields already as it is.
        adds: fields that `adapt` makes.
        splits: from our name of a split to that in TFDS, for those that differ.
    """

    name: str
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    adds: tuple[str, ...] = ()
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)


_names: dict[tuple[str, str | None], tuple[TfdsName, ...]] = {}


def add_name(dataset: str, config: str | None, *names: TfdsName) -> None:
    """Registers the TFDS names of a data set, if they differ from its own and Hugging Face's."""
    _names[dataset, config] = names


def candidates(dataset: str, config: str | None) -> list[TfdsName]:
    """Names that a data set may have in TFDS, in the order in which they are tried."""
    own = dataset_path(dataset, config)
    return [*_names.get((dataset, config), ()), TfdsName(own), TfdsName(f"huggingface:{own}")]


def tfds_dir() -> epath.Path | None:
    """Path of the prepared TFDS data sets that ELM_TFDS_DIR names; None if it is not set."""
    value = os.environ.get(TFDS_DIR_VARIABLE)
    return storage.as_path(value) if value else None


def find(dataset: str, config: str | None) -> tuple[epath.Path, TfdsName] | None:
    """Finds the newest version's folder of a data set, and its name in TFDS; None if there is none."""
    folder = tfds_dir()
    if folder is None:
        return None
    for name in candidates(dataset, config):
        versions = _versions(folder / _folder_of(name.name))
        if versions:
            return versions[-1], name
    return None


def _folder_of(name: str) -> str:
    """Path of a data set below ELM_TFDS_DIR, in TFDS's spelling.

    >>> _folder_of("huggingface:Cosmos-QA/cos_e/v1.11")
    'cosmos_qa/cos_e/v1_11'
    """
    _, _, own = name.rpartition(":")
    parts = own.split("/")
    if own != name:  # TFDS's spelling of the hub's names
        parts = [re.sub(r"[^a-z0-9_]", "_", part.lower()) for part in parts]
    return "/".join(parts)


def _versions(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir()
             if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / _HEAD).exists()]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")])


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """A split in the head of a data set: rows of each of its files, which TFDS writes as texts."""

    name: str
    shardLengths: list[str | int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Head:
    """What is read of ``dataset_info.json``."""

    splits: list[HeadSplit]


@dataclasses.dataclass(frozen=True)
class FeaturesDict:
    """The fields of rows, by name."""

    features: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Features:
    """What is read of ``features.json``."""

    featuresDict: FeaturesDict


def splits_of(folder: epath.Path) -> dict[str, int]:
    """Number of rows of each split of a prepared data set, read without TensorFlow.

    Raises:
        InputError: its head is damaged.
    """
    path = folder / _HEAD
    head = records.read_record(path, Head, kind="head of a TFDS data set", schema_version=None)
    try:
        return {split["name"]: sum(map(int, split.get("shardLengths", ()))) for split in head["splits"]}
    except ValueError as error:
        raise InputError(describe("The head of a TFDS data set is damaged", where=f"{path}: shardLengths",
                                  got=str(error)[:200], cure="prepare the data set again")) from error


def split_name(folder: epath.Path, name: TfdsName, split: str) -> str | None:
    """The TFDS split that serves a split: the same name; ``test`` for a missing ``validation``; else None."""
    splits = splits_of(folder)
    split = name.splits.get(split, split)
    if split in splits:
        return split
    if split != "validation" or "test" not in splits:
        return None
    _log_test_split(str(folder))
    return "test"


@functools.lru_cache(maxsize=1024)
def _log_test_split(folder: str) -> None:
    """Logs once for each data set that its test split serves as validation."""
    logger.info("%s has no split validation: its split test stands for it", folder)


def fields_of(folder: epath.Path, name: TfdsName) -> frozenset[str] | None:
    """Field names of the rows in Hugging Face's spelling, read without TensorFlow; None if not recorded.

    Raises:
        InputError: the file that says them is damaged.
    """
    found = _features(str(folder))
    if found is None:
        return None
    return frozenset(name.fields.get(field, field) for field in found).union(name.adds)


@functools.lru_cache(maxsize=1024)
def _features(folder: str) -> tuple[str, ...] | None:
    path = storage.as_path(folder) / _FEATURES
    if not path.exists():
        return None
    head = records.read_record(path, Features, kind="features of a TFDS data set", schema_version=None)
    return tuple(head["featuresDict"]["features"])


@functools.lru_cache(maxsize=8)
def _read(folder: str, split: str) -> list[dict[str, Any]]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(describe(
            "TensorFlow Datasets is needed to read this data set and is not installed", where=folder,
            got=error, cure="install it, or write the rows as JSON lines")) from error
    try:
        # One file after another: the rows' order depends on nothing but the files.
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        builder = tfds.builder_from_directory(folder)
        data = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
        return [_plain(row) for row in tfds.as_numpy(data)]
    except InputError:
        raise
    except Exception as error:  # TFDS and TensorFlow fail in many ways on damaged files
        raise InputError(describe("A TFDS data set cannot be read", where=f"{folder}, split {split}",
                                  got=f"{type(error).__name__}: {str(error)[:300]}",
                                  cure="prepare the data set again")) from error


def read_rows(folder: epath.Path, name: TfdsName, split: str) -> list[dict[str, Any]]:
    """Reads all rows of a split, in the files' order, as plain Python values with Hugging Face's fields.

    Raises:
        InputError: TFDS is not installed, or the files are damaged.
    """
    rows = [{name.fields.get(key, key): value for key, value in row.items()}
            for row in _read(str(folder), split_name(folder, name, split) or split)]
    return rows if name.adapt is None else [name.adapt(row) for row in rows]


def _plain(value: Any) -> Any:
    """Converts numpy values to Python's: bytes to text, arrays to lists, numbers to numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "to_list"):  # a ragged tensor: lists of unlike lengths
        value = value.to_list()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.decode("utf-8") if isinstance(value, bytes) else value
