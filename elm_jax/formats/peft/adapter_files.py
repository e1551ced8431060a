"""The two files of a PEFT adapter: adapter_config.json and adapter_model.safetensors.

Source of the form: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats.model import TensorSpec
from elm_jax.formats.tensors import safetensors_files, streaming
from elm_jax.runtime import storage

KIND = "peft"
"""Name of this kind of folder."""
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
MODEL_CONFIG = "config.json"
"""The file that a whole model's folder of Hugging Face has."""
PREFIX = "base_model.model."
"""In front of every tensor's name: PEFT's two wrappers around the base."""


def is_peft(folder: epath.Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_FILE).exists()


def check_no_adapter(folder: epath.Path) -> None:
    """Raises InputError if a PEFT adapter lies beside a whole model.

    transformers would load such a model with the adapter: its bare weights are another model.
    """
    if is_peft(folder) and (folder / MODEL_CONFIG).exists():
        raise InputError(describe(
            "A PEFT adapter lies beside this model, and would change what it computes", where=folder,
            got=CONFIG_FILE, expected="a model without an adapter",
            cure="give the adapter's files a folder of their own: the model is then read as it is, and "
            "`elm convert --from peft --to elm --base MODEL ADAPTER EXPERT` makes an expert of the adapter"))


def read_config(folder: storage.PathLike) -> dict[str, Any]:
    """Reads an adapter's config.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = storage.as_path(folder) / CONFIG_FILE
    if not path.exists():
        raise InputError(describe("There is no PEFT adapter here", where=folder,
                                  expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"))
    return storage.read_json(path, kind="config of a PEFT adapter", schema_version=None)


def recorded_base(folder: storage.PathLike) -> str | None:
    """The name or folder of the base that an adapter's config records; None if it records none."""
    name = read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def open_tensors(folder: storage.PathLike) -> dict[str, streaming.Stored]:
    """Opens an adapter's tensors by their names below the base, without reading them.

    Raises:
        InputError: there are none, or only pickled ones; the file is damaged; a name without PEFT's prefix.
    """
    folder = storage.as_path(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickled = (folder / PICKLED_FILE).exists()
        raise InputError(describe(
            "The adapter's weights are pickled, and such a file can run any code" if pickled
            else "The adapter's weights are missing", where=folder,
            got=PICKLED_FILE if pickled else None, expected=WEIGHTS_FILE,
            cure="load it with PEFT and save it again with safe_serialization=True" if pickled else None))
    stored = safetensors_files.read_header(path)
    foreign = [name for name in stored if not name.startswith(PREFIX)]
    if foreign:
        raise InputError(describe("These are no tensors of a PEFT adapter", where=path,
                                  got=", ".join(sorted(foreign)), expected=f"names that begin with {PREFIX}"))
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def write_into(target: epath.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes an adapter's files into a folder; the config, which readers look for, comes last."""
    named = {PREFIX + name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    specs = {name: TensorSpec(array.shape, array.dtype.name) for name, array in named.items()}
    safetensors_files.write_file(target / WEIGHTS_FILE, specs,
                                 lambda name: streaming.pieces(named[name], False), {"format": "pt"})
    storage.write_json(target / CONFIG_FILE, dict(config))
