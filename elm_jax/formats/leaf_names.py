"""Names of models: the name that the user knows a model by, wherever its files are."""

import os
import pathlib
import re

from elm_jax.runtime import storage

HUB = "hf://"
"""Prefix of the address of a model on the Hugging Face hub."""
T5X_TREE_FILE = "checkpoint"
"""The file of a T5X checkpoint by which it is named, too."""
_HUB_FOLDER = re.compile(r"models--(.+)")
_STEP = re.compile(r"checkpoint_\d+")
_NOT_IN_AN_ID = re.compile(r"[^\w.+-]+", re.ASCII)


def name_of(where: storage.PathLike) -> str:
    """Name of a model: the hub's in the hub's cache, the run's for ``checkpoint_<step>``, or the folder's."""
    hub = hub_name(where)
    if hub is not None:
        return hub
    path = storage.as_path(where)
    # "." has no name, and a step that was named from within its run has no folder above it.
    parts = pathlib.Path(os.path.abspath(path)).parts if storage.is_local(path) else path.parts
    return parts[-2] if _STEP.fullmatch(parts[-1]) and len(parts) > 1 else parts[-1]


def hub_name(where: storage.PathLike) -> str | None:
    """``google/t5-v1_1-small`` of ``models--google--t5-v1_1-small/snapshots/<commit>``; None elsewhere."""
    parts = storage.as_path(where).parts
    match = len(parts) > 2 and parts[-2] == "snapshots" and _HUB_FOLDER.fullmatch(parts[-3])
    return match.group(1).replace("--", "/") if match else None


def address_of(where: storage.PathLike) -> str:
    """Address that finds the model again: its folder, or its hub name if it is in the hub's cache."""
    hub = hub_name(where)
    return str(where) if hub is None else HUB + hub


def as_id(name: str) -> str:
    """Turns a name into an expert's id: letters, digits and ``_ . + -``, the first one a letter or digit."""
    return _NOT_IN_AN_ID.sub("_", name).lstrip(".+-")[:200] or "expert"
