"""Writes a tree of arrays as an Orbax folder, array by array and each in parts.

Orbax itself takes a whole tree and holds a copy of each array that it writes. The folder holds an OCDBT
database of zarr arrays, a list of them (``_METADATA``) and the name of the writer.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from elm_jax.formats.tensors import zarr_files
from elm_jax.runtime import storage

METADATA_FILE = "_METADATA"
CHECKPOINT_FILE = "_CHECKPOINT_METADATA"
COMMIT_FILE = "commit_success.txt"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_DICTIONARY_KEY = 2


class NewTree:
    """An Orbax tree of arrays that is being written."""

    def __init__(self, folder: epath.Path) -> None:
        """Creates the folder."""
        self._folder, self._began = folder, time.time_ns()
        with storage.guard_writes(folder):
            folder.mkdir(parents=True)
        self._arrays = zarr_files.Folder(folder, ocdbt=True)
        self._listed: dict[str, Any] = {}

    def create(self, keys: Sequence[str], shape: Sequence[int], dtype: str,
               chunks: Sequence[int]) -> zarr_files.NewArray:
        """Creates the array with these tree keys, to be filled."""
        self._listed[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICTIONARY_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False,
                               "write_shape": list(shape)}}
        return self._arrays.create(".".join(keys), shape, dtype, chunks)

    def finish(self, step: epath.Path | None = None) -> None:
        """Writes Orbax's last files, when all arrays are written.

        Args:
            step: folder of a step, of which the tree is one item; None if the tree is all there is.
        """
        _write_json(self._folder / METADATA_FILE, {
            "tree_metadata": self._listed, "use_ocdbt": True, "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True, "custom_metadata": None})
        top = self._folder if step is None else step
        _write_json(top / CHECKPOINT_FILE, {
            "item_handlers": _HANDLER if step is None else {self._folder.name: _HANDLER},
            "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": self._began,
            "commit_timestamp_nsecs": time.time_ns(), "custom_metadata": {}})
        for folder in dict.fromkeys((self._folder, top)):  # what makes a step whole in a bucket
            storage.write_text(folder / COMMIT_FILE, "Checkpoint commit was successful\n")


def _write_json(path: epath.Path, value: Any) -> None:
    storage.write_text(path, json.dumps(value))
