"""The leaves that tensors of Hugging Face's files hold: parts, shapes, checks, and how they are written."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.model import Origin, Tensors, TensorSpec
from elm_jax.formats.tensors import safetensors_files, streaming
from elm_jax.models.network import HfParameter

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every leaf, by path."""
_EXPERT = re.compile(r"(.*\bexperts\.(?:expert_)?)(\d+)(\..+)")


class ColumnsOf:
    """A part of the last axis of a stored vector or matrix; implements `streaming.Stored`."""

    def __init__(self, whole: streaming.Stored, start: int, size: int) -> None:
        self._whole, self._start = whole, start
        self.shape, self.dtype = (*whole.shape[:-1], size), whole.dtype

    def fill(self, rows: np.ndarray, start: int, column: int = 0) -> None:
        """Reads rows, or parts of rows, of the part."""
        if len(self.shape) == 1:
            self._whole.fill(rows, self._start + start)
        else:
            self._whole.fill(rows, start, self._start + column)


def shape_of(parameter: HfParameter, shapes: Shapes) -> tuple[int, ...]:
    """Shape of a tensor in Hugging Face's files, from the shapes of its leaves."""
    first = shapes[parameter.paths[0]]
    whole = (*first[:-1], sum(shapes[path][-1] for path in parameter.paths))
    whole = whole if parameter.expert is None else whole[1:]
    return whole[::-1] if parameter.transposed else whole


def origin_of(parameter: HfParameter, path: str) -> Origin:
    """Where a leaf stands in Hugging Face's files.

    Of several leaves in one tensor, the name says which; of a tensor for each expert, it has a ``*``.
    """
    name = parameter.name
    if parameter.expert is not None:
        name = _EXPERT.sub(r"\1*\3", name)
    if len(parameter.paths) > 1:
        name = f"{name}[{path.split('/')[-2]}]"
    return Origin(name, parameter.transposed)


def check_tensors(parameters: Sequence[HfParameter], stored: Mapping[str, streaming.Stored], shapes: Shapes,
                  where: Any) -> None:
    """Raises one InputError unless stored tensors are those of a network's config, and no others.

    Args:
        parameters: of the network.
        stored: the tensors by name.
        shapes: of the network's leaves.
        where: the folder.
    """
    _check_experts(parameters, stored, where)
    tree_checks.check_leaves(
        "The weights do not fit the config", where, {name: tensor.shape for name, tensor in stored.items()},
        {each.name: shape_of(each, shapes) for each in parameters},
        "fetch the folder again, or use the config that the weights were made with")
    dtypes: dict[str, set[str]] = {}
    for each in parameters:
        if each.expert is not None:
            dtypes.setdefault(origin_of(each, each.paths[0]).name, set()).add(stored[each.name].dtype)
    mixed = [f"{name}: {', '.join(sorted(found))}" for name, found in dtypes.items() if len(found) > 1]
    if mixed:
        raise InputError(describe("Experts of one layer have different dtypes", where=where,
                                  got="; ".join(mixed), expected="one dtype, as they are one leaf here"))


def _check_experts(parameters: Sequence[HfParameter], stored: Iterable[str], where: Any) -> None:
    """Raises InputError if the weights hold another number of experts than the config says."""
    wanted: dict[str, int] = {}
    for each in parameters:
        if each.expert is not None:
            name = origin_of(each, each.paths[0]).name
            wanted[name] = max(wanted.get(name, 0), each.expert + 1)
    found: dict[str, set[int]] = {name: set() for name in wanted}
    for match in filter(None, map(_EXPERT.fullmatch, stored)):
        before, number, behind = match.groups()
        found.get(f"{before}*{behind}", set()).add(int(number))
    are_alike = len(set(map(frozenset, found.values()))) == 1
    for name, count in wanted.items():
        held = len(found[name])
        if are_alike and held not in (0, count) and found[name] == set(range(held)):
            raise InputError(describe(
                "The weights hold another number of experts than the config says", where=where,
                got=f"{name}: {held} experts", expected=f"{count}",
                cure="use the config that the weights were made with"))


def leaves_of(parameters: Iterable[HfParameter], stored: Mapping[str, streaming.Stored], shapes: Shapes
              ) -> streaming.StoredTensors:
    """The leaves that stored tensors hold, which `check_tensors` has passed."""
    parts: dict[str, streaming.Stored | list[streaming.Stored]] = {}
    origins = {}
    for each in parameters:
        whole, start = stored[each.name], 0
        for path in each.paths:
            size = shapes[path][-1]
            if each.expert is not None:
                parts.setdefault(path, []).append(whole)
            else:
                parts[path] = whole if len(each.paths) == 1 else ColumnsOf(whole, start, size)
            origins[path] = origin_of(each, path)
            start += size
    return streaming.StoredTensors(parts, origins)


def in_order_of(parameters: Iterable[HfParameter], paths: Iterable[str]) -> list[HfParameter]:
    """Sorts parameters by the first of their leaves; those of one leaf stay together, by expert."""
    rank = {path: number for number, path in enumerate(paths)}
    return sorted(parameters, key=lambda each: (rank[each.paths[0]], each.expert or 0))


def specs_of(parameters: Sequence[HfParameter], tensors: Tensors) -> dict[str, TensorSpec]:
    """Shape and dtype of Hugging Face's tensors of a network's leaves, by name."""
    shapes = {path: spec.shape for path, spec in tensors.specs.items()}
    return {each.name: TensorSpec(shape_of(each, shapes), tensors.specs[each.paths[0]].dtype)
            for each in parameters}


def contents_of(parameters: Sequence[HfParameter], tensors: Tensors) -> safetensors_files.Contents:
    """Gives the contents of Hugging Face's tensors, which are asked for in the order of `parameters`.

    Each leaf is read once, and is let go before the next: the tensors of its experts follow one another.
    """
    by_name = {each.name: each for each in parameters}
    leaves = streaming.read_ahead(tensors, (
        path for each in parameters for path in each.paths if not each.expert))
    held: list[np.ndarray] = []

    def contents(name: str) -> Iterator[np.ndarray]:
        """Takes the next leaves, or the next expert of the last one."""
        each = by_name[name]
        if each.expert is not None:
            if each.expert == 0:
                held.append(next(leaves))
            is_last = each.expert == len(held[0]) - 1
            return streaming.pieces((held.pop() if is_last else held[0])[each.expert], each.transposed)
        if len(each.paths) == 1:
            return streaming.pieces(next(leaves), each.transposed)
        return streaming.pieces(np.concatenate([next(leaves) for _ in each.paths], axis=-1), each.transposed)

    return contents
