"""Parameter trees as paths: flatten, split, merge, count, compare, fingerprint."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from elm_jax.runtime import hosts
from elm_jax.types import FlatParams, Params


def flatten(tree: Params) -> FlatParams:
    """Flattens a nested dictionary to ``{'a/b/c': leaf}`` in sorted path order. Inverse of `unflatten`."""
    flat: FlatParams = {}

    def visit(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                visit(child, f"{prefix}/{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    visit(tree, "")
    return dict(sorted(flat.items()))


def unflatten(flat: FlatParams) -> Params:
    """Turns ``{'a/b/c': leaf}`` into a nested dictionary. Inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def split(tree: Params, predicate: Callable[[str], bool]) -> tuple[Params, Params]:
    """Splits a tree by path into (selected, rest). `merge` of the two gives the tree back."""
    flat = flatten(tree)
    selected = {path: leaf for path, leaf in flat.items() if predicate(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in selected}
    return unflatten(selected), unflatten(rest)


def merge(base: Params, overlay: Params) -> Params:
    """Returns the base with the overlay's leaves replaced or added. Inverse of `split`."""
    return unflatten({**flatten(base), **flatten(overlay)})


def count(tree: Params) -> int:
    """Number of parameters in a tree (elements, not leaves)."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def nbytes(tree: Params) -> int:
    """Bytes of all leaves of a tree, abstract ones included."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in flatten(tree).values()
    )


class Fingerprint:
    """Computes a fingerprint leaf by leaf, in sorted path order, and piece by piece within a leaf."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def leaf(self, path: str, shape: Sequence[int], dtype: str, pieces: Iterable[np.ndarray]) -> None:
        """Adds one leaf, whose contents come as contiguous pieces in row-major order."""
        self.begin(path, shape, dtype)
        for piece in pieces:
            self.add(piece)

    def begin(self, path: str, shape: Sequence[int], dtype: str) -> None:
        """Starts a leaf by its name, shape and dtype; its contents follow."""
        self._digest.update(f"{path}|{tuple(shape)}|{dtype}|".encode())

    def add(self, piece: np.ndarray) -> None:
        """Adds the next contiguous piece of the leaf that was started."""
        self._digest.update(piece.reshape(-1).view(np.uint8))

    def __str__(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


def fingerprint(tree: Params) -> str:
    """Fingerprint of a tree: SHA-256 over leaf names, shapes, dtypes and contents, in any leaf order.

    Leaves that are split over several processes are gathered one at a time: every process must call.
    """
    whole = Fingerprint()
    for path, leaf in flatten(tree).items():
        array = hosts.whole(leaf)
        whole.leaf(path, array.shape, array.dtype.name, [np.ascontiguousarray(array)])
    return str(whole)


def first_difference(a: Params, b: Params) -> str | None:
    """Names the first leaf, by path, whose presence, shape or dtype differs; None if all agree."""
    flat_a, flat_b = flatten(a), flatten(b)
    for path in sorted(flat_a.keys() | flat_b.keys()):
        left, right = _leaf_facts(flat_a.get(path)), _leaf_facts(flat_b.get(path))
        if left != right:
            return f"{path}: {left} against {right}"
    return None


def _leaf_facts(leaf: object) -> str:
    if leaf is None:
        return "missing"
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
