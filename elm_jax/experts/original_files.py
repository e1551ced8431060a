"""Reads prompt experts of the method's first implementation (joeljang/ELM): one file for each tensor.

Its training writes ``<run>/adapter_params/<name>.pt`` with torch.save, one parameter a file, named as in its
T5: adapters as ``encoder.block.0.layer.1.adapter_controller.adapters.<task>. down_sampler.weight``, norms as
in Hugging Face's T5. Its adapters compute what this program's do: with its published configs, gelu in tanh
form, no layer norms of their own, a residual around.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts import hf_adapters
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert
from elm_jax.formats.hf import t5_models
from elm_jax.formats.model import Origin
from elm_jax.formats.tensors import torch_files
from elm_jax.models import families
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.network import NORM, NetworkConfig
from elm_jax.runtime import storage, trees

FOLDER = "adapter_params"
_ADAPTER = re.compile(r"((?:encoder|decoder)\.block\.\d+\.layer\.\d+)\.adapter_controller\.adapters\.([^.]+)"
                      r"\.(down|up)_sampler\.(weight|bias)")


class LoadedTensor:
    """A tensor in memory, used as a stored one (see `streaming.Stored`)."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype = tuple(array.shape), array.dtype.name

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Copies rows, or parts of rows."""
        part = self._array[start:start + len(rows)]
        rows[...] = part if rows.shape == part.shape else part[:, column:column + rows.shape[1]]


def is_original(folder: epath.Path) -> bool:
    """Whether a folder is a run of the first implementation, or the folder of its adapter tensors."""
    inside = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    return any("adapter_controller" in path.name for path in inside.glob("*.pt"))


def read_original(folder: storage.PathLike, config: NetworkConfig, base: Mapping[str, str],
                  expert_id: str | None = None) -> tuple[Expert, dict[str, Origin]]:
    """Reads an expert of the first implementation; also returns the origin of each leaf.

    Args:
        folder: the run, or its ``adapter_params``.
        config: network config of the base that the expert was trained on; the folder does not record it.
        base: that base's ``{'name', 'fingerprint'}``, for the card.
        expert_id: name of the expert; None for the task's.

    Raises:
        InputError: a file is damaged or holds code; adapters of several tasks; names or shapes do not fit
            the base (all are named).
    """
    folder = storage.as_path(folder)
    inside = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    loaded = {path.name.removesuffix(".pt"): _load(path) for path in sorted(inside.glob("*.pt"))}
    tasks = sorted({match[2] for name in loaded if (match := _ADAPTER.fullmatch(name))})
    if len(tasks) != 1:
        raise InputError(describe("The folder must hold the adapters of one task", where=inside,
                                  got=", ".join(tasks) or "none", expected="one task"))
    config = config.with_adapter(BottleneckConfig(_bottleneck(loaded)))
    hf_names, role_of = t5_models.leaf_names(config), families.network_of(config).role_of
    names = {path: _original_name(*name, tasks[0]) for path, name in hf_names.items()
             if is_adapter_leaf(path)}
    norms = {path: tuple(name) for path, name in hf_names.items() if role_of(path) == NORM}
    if any(name in loaded for name, _ in norms.values()):
        names |= norms  # trained all together or not at all
    stored = {name: LoadedTensor(array) for name, array in loaded.items()}
    overlay = hf_adapters.read_named(stored, names, config, inside)
    card = ExpertCard(
        id=expert_id or tasks[0], kind="prompt", form="adapter", base=dict(base), network=config.to_dict(),
        tasks=(tasks[0],), training={"converted_from": "joeljang/ELM"})
    origins = {path: Origin(f"{name}.pt", transposed) for path, (name, transposed) in names.items()}
    return Expert(card, trees.unflatten(overlay), path=str(folder)), origins


def _load(path: epath.Path) -> np.ndarray:
    value: Any = torch_files.load(path)
    if not hasattr(value, "detach"):
        raise InputError(describe("The file holds something else than one tensor", where=path,
                                  got=type(value).__name__))
    tensor = value.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _bottleneck(loaded: Mapping[str, np.ndarray]) -> int:
    widths = {array.shape[0] for name, array in loaded.items()
              if array.ndim and (match := _ADAPTER.fullmatch(name)) and match[3] == "down"}
    return min(widths, default=1)  # all others are then wrong shapes or missing, and named as such


def _original_name(name: str, transposed: bool, task: str) -> tuple[str, bool]:
    """The first implementation's name of a parameter with a name in Hugging Face's style."""
    place, rest = name.split(".adapter.")
    part, kind = rest.split(".")
    return f"{place}.adapter_controller.adapters.{task}.{part}_sampler.{kind}", transposed
