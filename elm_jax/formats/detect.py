"""Detects which kind of model a folder holds, and opens it."""

from collections.abc import Callable

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import places
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import folder_files, hf_models
from elm_jax.formats.model import Model
from elm_jax.formats.t5x import t5x_checkpoints, t5x_folders
from elm_jax.runtime import storage

KINDS: dict[str, tuple[Callable[[epath.Path], bool], Callable[..., Model]]] = {
    "elm": (elm_folders.is_elm, elm_folders.open_elm),
    "hf": (folder_files.is_hf, hf_models.open_model_folder),
    "t5x": (t5x_folders.is_t5x, t5x_checkpoints.open_t5x),
}
"""(test of a folder, function that opens it) by kind; the first kind whose test holds is used."""


def open_model(name: storage.PathLike) -> Model:
    """Opens the model in a folder of any supported kind, or on the Hugging Face hub.

    Args:
        name: a folder, local or in a bucket; or a hub name, ``google/t5-v1_1-small``, which
            ``hf://google/t5-v1_1-small`` cannot be taken for anything else.

    Raises:
        InputError: there is no such folder, or nothing that this program reads is in it, or its reader
            finds a fault.
    """
    folder = places.locate(name)
    for is_kind, open_kind in KINDS.values():
        if is_kind(folder):
            return open_kind(folder)
    raise InputError(describe(
        "The folder holds no model that this program reads", where=folder,
        got=", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "an empty folder",
        expected=f"a model of a kind among {', '.join(KINDS)}"))
