"""Leaves of a sparse network made of a dense one's: stacked feed-forwards, fresh routers, the rest as it was.

Source: Komatsuzaki et al., "Sparse Upcycling", https://arxiv.org/abs/2212.05055. Experts from models that
were trained apart, and the mean of all else: Sukhbaatar et al., "Branch-Train-MiX",
https://arxiv.org/abs/2403.07816.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.model import Index, Origin, Tensors, TensorSpec
from elm_jax.formats.tensors import leaf_values
from elm_jax.models import families
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import Network, NetworkConfig
from elm_jax.runtime import trees
from elm_jax.types import Array, FlatParams
from elm_jax.workflows.choices import RESTS

MEAN, BASE = RESTS
_EXPERT = re.compile(r"(.+/mlp)/expert/(\w+/kernel)")
_LAYER = re.compile(r"(\w+)/layers_(\d+)/mlp/expert/")


@dataclasses.dataclass(frozen=True)
class UpcycleOptions:
    """How the leaves of a sparse base are made.

    Attributes:
        rest: with experts, what all other leaves are: one of `RESTS`; None for the mean. Without experts they
            are the base's.
        noise: each copy of a feed-forward gets Gaussian noise of this share of the kernel's root mean square.
        seed: of routers and noise.
    """

    rest: str | None = None
    noise: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Parent:
    """A full expert whose feed-forwards become one of the experts.

    Attributes:
        tensors: every leaf of the base, in float32.
        where: its folder or id, for errors.
    """

    tensors: Tensors
    where: str


def sparse_network(config: NetworkConfig, sparse: SparseConfig, where: object) -> Network:
    """Makes the sparse network of a dense base's config.

    Args:
        config: of the base.
        sparse: settings of the sparse layers.
        where: the base, for errors.

    Raises:
        InputError: the base is sparse already, or its feed-forwards have biases; networks of its family have
            no sparse layers; no layer of this one would be sparse; a decoder's experts would look ahead.
    """
    tree_checks.check_base(config, where)
    if not hasattr(config, "sparse"):
        raise InputError(describe("Networks of this family have no sparse layers", where=where,
                                  got=config.family))
    if config.sparse is not None:
        raise InputError(describe("This base is sparse already", where=where,
                                  got=f"{config.sparse.num_experts} experts in its sparse layers",
                                  expected="a dense base", cure="give the base that it was made of"))
    if getattr(config, "dense_bias", False):
        raise InputError(describe(
            "The feed-forwards of this base have biases, and experts have none", where=where,
            got="dense_bias = True, as GPT-2's", expected="a base without biases in its feed-forwards",
            cure="take a base of the Llama type (`elm base get smollm2 bases/smollm2`) or a T5"))
    return families.network_of(dataclasses.replace(config, sparse=sparse))


def sparse_layers(paths: Iterable[str]) -> dict[str, list[int]]:
    """Numbers of the sparse layers of each stack that has some, of the leaves' paths."""
    found = {(match[1], int(match[2])) for match in map(_LAYER.match, paths) if match}
    return {stack: sorted(layer for own, layer in found if own == stack)
            for stack in sorted({stack for stack, _ in found}, reverse=True)}  # the encoder first


class UpcycledTensors:
    """`Tensors` of a sparse network that read a dense base's, and those of full experts, leaf by leaf.

    Copies of a feed-forward are views of one array: they take no memory of their own.
    """

    def __init__(self, base: Tensors, network: Network, parents: Sequence[Parent], options: UpcycleOptions,
                 where: str) -> None:
        """Makes the fresh leaves; reads nothing.

        Args:
            base: every leaf of the dense base.
            network: the sparse one.
            parents: as many as the network has experts, in their order; none copies the base's feed-forwards.
            options: how leaves are made.
            where: the base, for errors.
        """
        self._base, self._parents, self._options, self._where = base, tuple(parents), options, where
        self._num_experts = network.config.sparse.num_experts
        shapes = {path: leaf.shape for path, leaf in trees.flatten(network.abstract_params()).items()}
        fresh = frozenset(path for path in shapes if path not in base.specs and not _is_expert(path))
        self._fresh = _fresh_leaves(network, fresh, options.seed)
        self.specs = {path: TensorSpec(tuple(shape), self._dtype(path)) for path, shape in shapes.items()}
        self.origins = {path: Origin(path) for path in self.specs}
        self._check_shapes()

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Makes a leaf, or a part of it."""
        if path in self._fresh:
            values = self._fresh[path]
        elif self._parents:
            values = self._of_parents(path)
        else:
            values = self._of_base(path)
        return values if index is None else values[index]

    def _dtype(self, path: str) -> str:
        if path in self._fresh:
            return "float32"
        of_base = not self._parents or (self._options.rest == BASE and not _is_expert(path))
        return self._base.specs[_dense_of(path)].dtype if of_base else "float32"

    def _check_shapes(self) -> None:
        """Raises InputError for leaves of base or parents that do not fit the sparse network."""
        wanted = {_dense_of(path): spec.shape[1:] if _is_expert(path) else spec.shape
                  for path, spec in self.specs.items() if path not in self._fresh}
        parents = [(own.tensors, own.where) for own in self._parents]
        for tensors, where in [(self._base, self._where), *parents]:
            found = {path: spec.shape for path, spec in tensors.specs.items()}
            tree_checks.check_leaves("The leaves do not fit the network", where, found, wanted)

    def _of_base(self, path: str) -> np.ndarray:
        values = _finite(self._base, _dense_of(path), self._where)
        if not _is_expert(path):
            return values
        if self._options.noise:
            return np.stack([self._noisy(values, path, number) for number in range(self._num_experts)])
        return np.broadcast_to(values, (self._num_experts, *values.shape))

    def _noisy(self, values: np.ndarray, path: str, expert: int) -> np.ndarray:
        draw = np.random.default_rng([self._options.seed, zlib.crc32(path.encode()), expert])
        exact = values.astype(np.float32)
        size = self._options.noise * math.sqrt(float(np.mean(np.square(exact), dtype=np.float64)))
        noise = draw.standard_normal(values.shape, np.float32) * np.float32(size)
        return leaf_values.cast_leaf(exact + noise, values.dtype, path, self._where)

    def _of_parents(self, path: str) -> np.ndarray:
        dense = _dense_of(path)
        if _is_expert(path):
            return np.stack([_finite(own.tensors, dense, own.where) for own in self._parents])
        if self._options.rest == BASE:
            return _finite(self._base, dense, self._where)
        total = np.zeros(self.specs[path].shape, np.float64)
        for own in self._parents:
            total += _finite(own.tensors, dense, own.where)
        return (total / len(self._parents)).astype(np.float32)


def _is_expert(path: str) -> bool:
    return _EXPERT.fullmatch(path) is not None


def _dense_of(path: str) -> str:
    """The dense network's leaf: ``.../mlp/expert/wi/kernel`` -> ``.../mlp/wi/kernel``; others as they are."""
    found = _EXPERT.fullmatch(path)
    return path if found is None else f"{found[1]}/{found[2]}"


def _finite(tensors: Tensors, path: str, where: str) -> np.ndarray:
    values = tensors.read(path)
    leaf_values.check_finite(np.asarray(values), path, where)
    return values


def _fresh_leaves(network: Network, paths: frozenset[str], seed: int) -> FlatParams:
    """Leaves that a dense base has not: routers, and the dense feed-forwards behind sparse ones.

    Such a feed-forward adds nothing at first: its last kernel is 0.
    """
    made = {path: np.asarray(leaf) for path, leaf in _init(network, paths, jax.random.key(seed)).items()}
    return {path: np.zeros_like(leaf) if path.endswith("/wo/kernel") else leaf for path, leaf in made.items()}


@functools.partial(jax.jit, static_argnames=("network", "paths"))
def _init(network: Network, paths: frozenset[str], rng: Array) -> FlatParams:
    """The network's own fresh values of some leaves, as one program that never makes the others."""
    flat = trees.flatten(network.init(rng))
    return {path: flat[path] for path in paths}
