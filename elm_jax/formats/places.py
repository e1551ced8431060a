"""Finds the folder of a model that is named by a path or by its name on the hub."""

import re

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import leaf_names
from elm_jax.runtime import storage

EXPERT_FILE = "expert.json"
"""The card of an expert, which is no model."""
_FILES = (".gguf",)
"""Suffixes of models that are one file."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors")
_HUB_WEIGHTS = ("pytorch_model*.bin",)
"""Weight files that are fetched only if the hub has no other."""


def locate(name: storage.PathLike) -> epath.Path:
    """Returns the folder of a model, or its file; fetches it if the name is a hub name."""
    if is_on_hub(name):
        return _fetch(str(name).removeprefix(leaf_names.HUB))
    folder = storage.as_path(name)
    if folder.exists():
        is_model = folder.name == leaf_names.T5X_TREE_FILE or folder.suffix in _FILES
        if not folder.is_dir() and not is_model:
            raise InputError(describe("A model is a folder, not a file", where=folder,
                                      expected=f"a folder, or a file {', '.join(_FILES)}"))
        return folder
    if is_file_name(name):
        raise no_file(name)
    # A wrong path below a folder that is there must not become a request to the hub.
    if not _HUB_NAME.fullmatch(str(name)) or ("/" in str(name) and folder.parent.exists()):
        raise InputError(describe(
            "There is no model here", where=folder, got=storage.what_is_there(folder),
            cure="check the path; `elm base list` shows what `elm base get` makes a base of; a name on the "
            "Hugging Face hub is written hf://OWNER/NAME"))
    return _fetch(str(name))


def is_on_hub(name: storage.PathLike) -> bool:
    """Whether the name is certainly a model's name on the hub, and not a folder's."""
    return str(name).startswith(leaf_names.HUB)


def is_file_name(name: storage.PathLike) -> bool:
    """Whether a name is that of a model in one file, by its suffix: no model on the hub is called so."""
    return str(name).endswith(_FILES)


def no_file(name: storage.PathLike) -> InputError:
    """The error for a model's file that is not there."""
    return InputError(describe("There is no such file", where=storage.as_path(name),
                               expected=f"a file that ends in {' or '.join(_FILES)}"))


def _fetch(name: str) -> epath.Path:
    """Returns a hub model's folder in the hub's cache; downloads the model if it is not there."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # which the package does not load by itself
    except ImportError as error:
        raise InputError(describe(
            "There is no such folder, and models on the hub need the package huggingface_hub",
            where=name, cure="give a folder, or pip install huggingface_hub")) from error
    try:
        files = huggingface_hub.list_repo_files(name)
    except Exception:  # no network: the cache may hold the model
        files = []
    safe = any(file.endswith(".safetensors") and "/" not in file for file in files)
    patterns = _HUB_FILES if safe else (*_HUB_FILES, *_HUB_WEIGHTS)
    try:
        return storage.as_path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's, the network's and the disk's errors have no common class
        raise InputError(describe(
            "There is no such folder, and the Hugging Face hub does not give such a model", where=name,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error).strip()
            else type(error).__name__,
            cure="give a folder; or check the name and the network")) from error
