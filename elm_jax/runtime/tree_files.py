"""Reads and writes trees of arrays with Orbax, which is imported on first use: importing it is slow.

With several processes only the first one writes, and in the others the calls return at once. A tree with
arrays that are split over processes is different: every process calls `save_tree`, which writes its shards.
"""

from typing import Any

import jax
import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.runtime import hosts, storage, trees
from elm_jax.types import Params

_CHUNK_BYTES = 1 << 25


def _orbax() -> Any:
    """The package Orbax."""
    import orbax.checkpoint  # late: a tenth of a second, which routing and reports do not need

    return orbax.checkpoint


def save_tree(folder: storage.PathLike, tree: Params) -> None:
    """Writes a tree of arrays with Orbax into `folder` (which must not exist yet).

    A tree with arrays that are split over several processes is written by all of them, each its own shards,
    and is whole when any call returns; any other tree is written by the first process alone.
    """
    folder = storage.as_path(folder)
    shared = any(hosts.is_spread(leaf) for leaf in jax.tree.leaves(tree))
    if not shared and not hosts.is_first():
        return
    with storage.guard_writes(folder), _checkpointer(shared) as checkpointer:
        # In chunks, so that a leaf, or a part of one, can be read without a second copy of it.
        in_chunks = jax.tree.map(lambda _: _orbax().SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
        checkpointer.save(storage.absolute(folder), tree, save_args=in_chunks)
        checkpointer.wait_until_finished()


def _checkpointer(shared: bool) -> Any:
    """An Orbax checkpointer over all processes, or over this one alone."""
    if shared or hosts.count() == 1:
        return _orbax().StandardCheckpointer()
    return _orbax().StandardCheckpointer(multiprocessing_options=_alone_options())


def _alone_options() -> Any:
    me = hosts.index()
    return _orbax().options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone_{me}")


def _reader() -> Any:
    """An Orbax checkpointer that reads in this process alone."""
    if hosts.count() == 1:
        return _orbax().PyTreeCheckpointer()
    return _orbax().Checkpointer(_orbax().PyTreeCheckpointHandler(multiprocessing_options=_alone_options()),
                            multiprocessing_options=_alone_options())


def tree_metadata(folder: storage.PathLike) -> Params:
    """Shape and dtype of every leaf that `save_tree` wrote, without reading contents.

    Raises:
        InputError: no readable checkpoint.
    """
    if not storage.as_path(folder).exists():
        raise InputError(describe("There are no weights here", where=folder,
                                  got=storage.what_is_there(folder), cure="check the path"))
    with storage.guard_reads(folder), _reader() as checkpointer:
        return checkpointer.metadata(storage.absolute(folder)).item_metadata.tree


def restore_tree(folder: storage.PathLike, like: Params | None = None) -> Params:
    """Reads a tree that `save_tree` wrote.

    Args:
        folder: the Orbax folder.
        like: tree of `jax.ShapeDtypeStruct` (with shardings, to restore onto a mesh, each process its
            own shards; every process must call). Without it every leaf comes back as a numpy array of the
            shape and dtype on disk.

    Raises:
        InputError: no readable checkpoint, or the leaf whose presence, shape or dtype differs.
    """
    on_disk = tree_metadata(folder)
    folder = storage.absolute(folder)
    if like is None:
        restore_args = jax.tree.map(lambda _: _orbax().RestoreArgs(restore_type=np.ndarray), on_disk)
        with storage.guard_reads(folder), _reader() as checkpointer:
            return checkpointer.restore(folder, restore_args=restore_args)
    difference = trees.first_difference(on_disk, like)
    if difference:
        raise InputError(
            describe("The weights do not fit", where=folder, got=f"leaf {difference} (disk against wanted)")
        )
    with storage.guard_reads(folder), _orbax().StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, like)
