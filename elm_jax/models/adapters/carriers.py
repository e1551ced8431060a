"""Which layers of a network carry adapters: the setting ``layers`` of every kind of adapter.

Layers are counted from 0 in the order in which a network computes them: an encoder's before a decoder's.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.network import NetworkConfig

FORMS = "None for all, 'upper 10', '20-29', or a tuple of layers from 0"
WHERE = "AdapterConfig.layers"
_MOST_LAYERS = 10**6
_UPPER, _RANGE = re.compile(r"upper (\d{1,6})"), re.compile(r"(\d{1,6})-(\d{1,6})")
Layers = str | Sequence[int]
Adapter = TypeVar("Adapter", bound=AdapterKind)
Network = TypeVar("Network", bound=NetworkConfig)


def with_layers_of(adapter: Adapter | None, num_layers: int) -> Adapter | None:
    """Returns an adapter config whose ``layers`` are a tuple of layer numbers, or None where all carry one.

    Args:
        adapter: of a network, or None.
        num_layers: of that network.

    Raises:
        InputError: the setting is of no known form, or names a layer that the network has not.
    """
    if adapter is None or adapter.layers is None:
        return adapter
    layers = tuple(sorted(numbers_of(adapter.layers, num_layers)))
    return dataclasses.replace(adapter, layers=None if len(layers) == num_layers else layers)


def numbers_of(layers: Layers, num_layers: int) -> set[int]:
    """Reads ``'upper 10'``, ``'20-29'`` or a sequence of numbers: layers, of a network of `num_layers`."""
    found = _numbers(layers, num_layers)
    if not found or not found <= set(range(num_layers)):
        raise InputError(describe(
            "The adapters' layers are not the network's", where=WHERE, got=repr(layers)[:200],
            expected=f"at least one of the layers 0 to {num_layers - 1}", cure=f"give {FORMS}"))
    return found


def check_form(layers: Any) -> None:
    """Checks a setting before there is a network: None, or a form that names layers of a large one.

    Raises:
        InputError: the setting cannot be read, or names no layer of any network.
    """
    if layers is not None and min(_numbers(layers, _MOST_LAYERS), default=-1) < 0:
        raise _unreadable(layers)


def _numbers(layers: Layers, num_layers: int) -> set[int]:
    if isinstance(layers, str):
        if upper := _UPPER.fullmatch(layers.strip()):
            return set(range(num_layers - int(upper[1]), num_layers))
        if ends := _RANGE.fullmatch(layers.strip()):
            return set(range(int(ends[1]), int(ends[2]) + 1))
    elif (isinstance(layers, tuple | list) and all(type(number) is int for number in layers)
          and len(set(layers)) == len(layers)):
        return set(layers)
    raise _unreadable(layers)


def _unreadable(layers: Any) -> InputError:
    return InputError(describe("The adapters' layers cannot be read", where=WHERE, got=repr(layers)[:200],
                               expected=FORMS))


def carries(adapter: AdapterKind | None, layer: int) -> bool:
    """Whether a layer carries adapters of this config (with ``layers`` as numbers)."""
    return adapter is not None and (adapter.layers is None or layer in adapter.layers)


def layer_configs(config: Network, first: int, count: int, decoder: bool = False) -> list[Network]:
    """Config of each layer of a stack: the network's, less the adapters or experts that the layer has not.

    Args:
        config: of the network.
        first: number, in the network, of the stack's first layer.
        count: layers of the stack.
        decoder: whether it is the decoder of an encoder-decoder.
    """
    configs = [
        config if config.adapter is None or carries(config.adapter, number) else config.with_adapter(None)
        for number in range(first, first + count)]
    if config.sparse is None:
        return configs
    sparse = config.sparse.of_decoder() if decoder else config.sparse
    return [dataclasses.replace(own, sparse=sparse if sparse.is_sparse(layer, decoder) else None)
            for layer, own in enumerate(configs)]


def lowest(adapter: AdapterKind | None) -> int:
    """The lowest layer that carries adapters of this config; 0 if all do, or none."""
    return 0 if adapter is None or adapter.layers is None else min(adapter.layers)
