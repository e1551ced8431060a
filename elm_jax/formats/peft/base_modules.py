"""The modules of Hugging Face's implementation of a network, as PEFT names and wraps them."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.models import families
from elm_jax.models.adapters.kind import PROJECTIONS
from elm_jax.models.network import HfParameter, NetworkConfig
from elm_jax.runtime import trees
from elm_jax.types import FlatParams

WEIGHT, BIAS = ".weight", ".bias"


@dataclasses.dataclass(frozen=True)
class Modules:
    """Modules of a network.

    Attributes:
        parameters: of all modules, by name; without those of single experts, which transformers joins.
        shapes: of this program's leaves, by path.
        projections: names of the modules that low-rank updates can go on, in the network's order.
        names: of all modules, those around others too.
    """

    parameters: Mapping[str, HfParameter]
    shapes: Mapping[str, tuple[int, ...]]
    projections: tuple[str, ...]
    names: frozenset[str]

    def parts(self, module: str) -> list[tuple[str, tuple[int, int]]]:
        """The projections of ours that make up a module: the path of each, and its size [in, out]."""
        return [(path.removesuffix("/kernel"), self.shapes[path])
                for path in self.parameters[module + WEIGHT].paths]

    def is_conv(self, module: str) -> bool:
        """Whether a module keeps its weight as [in, out]: GPT-2's Conv1D."""
        return not self.parameters[module + WEIGHT].transposed

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter there."""
        parameter = self.parameters[name]
        shapes = [self.shapes[path] for path in parameter.paths]
        whole = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return whole[::-1] if parameter.transposed else whole

    def leaves(self, name: str, array: np.ndarray) -> FlatParams:
        """Our leaves of a parameter's values."""
        parameter = self.parameters[name]
        whole = array.T if parameter.transposed else array
        ends = np.cumsum([self.shapes[path][-1] for path in parameter.paths])[:-1]
        return {path: np.ascontiguousarray(part) for path, part in
                zip(parameter.paths, np.split(whole, ends, axis=-1), strict=True)}

    def values(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Values of a parameter, from its leaves by path."""
        parameter = self.parameters[name]
        whole = np.concatenate([read(path) for path in parameter.paths], axis=-1)
        return np.ascontiguousarray(whole.T) if parameter.transposed else whole

    def inside(self, saves: Callable[[str], bool]) -> list[str]:
        """Names of the parameters for which `saves` holds.

        Raises:
            InputError: one of them is used by other modules too.
        """
        found = [name for name in self.parameters if saves(name)]
        tied = [name for name in found if self.parameters[name].tied]
        if tied:
            raise InputError(describe(
                "The adapter replaces a parameter that other modules use too, which would part them",
                where="modules_to_save", got=", ".join(tied), expected="modules whose weights are their own"))
        return found


def modules_of(config: NetworkConfig, where: Any = None) -> Modules:
    """The modules of a network without adapters.

    Raises:
        InputError: Hugging Face's package has no such network.
    """
    bare = config.with_adapter(None)
    shapes = {path: tuple(leaf.shape) for path, leaf in
              trees.flatten(families.network_of(bare).abstract_params()).items()}
    listed = families.hf_parameters_of(bare, where)
    parameters = {parameter.name: parameter for parameter in listed if parameter.expert is None}
    projections = tuple(name.removesuffix(WEIGHT) for name, parameter in parameters.items()
                        if name.endswith(WEIGHT) and all(map(_is_projection, parameter.paths)))
    names = frozenset(_around(parameter.name for parameter in listed))
    return Modules(parameters, shapes, projections, names)


def _is_projection(path: str) -> bool:
    parts = path.split("/")
    return len(parts) > 2 and parts[-1] == "kernel" and parts[-2] in PROJECTIONS


def _around(parameters: Iterable[str]) -> Iterable[str]:
    for name in parameters:
        while "." in name:
            name = name.rpartition(".")[0]
            yield name


def short_names(chosen: Sequence[str], names: Collection[str],
                fits: Callable[[str, str], bool]) -> list[str]:
    """The last words of module names where they mean no other modules, else whole names; sorted.

    Args:
        chosen: the modules to name.
        names: of all modules.
        fits: whether PEFT takes a module (first) as meant by a word (second).
    """
    wanted, found = set(chosen), set()
    for module in chosen:
        word = module.rpartition(".")[2]
        alone = all(other in wanted for other in names if fits(other, word))
        found.add(word if alone else module)
    return sorted(found)
