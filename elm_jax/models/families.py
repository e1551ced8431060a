"""The table of network families; makes a network from a config, and a config from its dictionary."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.decoder import hf_names as decoder_names
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.network import DecoderNetwork
from elm_jax.models.network import HfParameter, Layout, Network, NetworkConfig
from elm_jax.models.t5 import hf_names as t5_names
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network

FAMILY = "family"
"""Key of a stored config that names its family; a config without it is a T5's, as older ones are."""


class Family(NamedTuple):
    """The classes of a family of networks.

    Attributes:
        config: class of its configs, with ``from_dict(values, where)``.
        network: ``network(config, layout)`` makes one.
        hf_parameters: ``hf_parameters(config)`` gives the parameters of Hugging Face's implementation; None
            if there is none.
    """

    config: type[NetworkConfig]
    network: type[Network]
    hf_parameters: Callable[[Any], Sequence[HfParameter]] | None = None


FAMILIES: dict[str, Family] = {
    "t5": Family(T5Config, T5Network, t5_names.hf_parameters),
    "decoder": Family(DecoderConfig, DecoderNetwork, decoder_names.hf_parameters),
}


def network_of(config: NetworkConfig, layout: Layout | None = None) -> Network:
    """Makes the network of a config; `layout` says how it is computed and changes no result."""
    return FAMILIES[config.family].network(config, layout or Layout())


def hf_parameters_of(config: NetworkConfig, where: Any = None) -> Sequence[HfParameter]:
    """Parameters of Hugging Face's implementation of a network, without adapters.

    Raises:
        InputError: there is no such implementation.
    """
    listed = FAMILIES[config.family].hf_parameters
    if listed is None:
        raise InputError(describe(f"Networks of family {config.family!r} are not in Hugging Face's package",
                                  where=where))
    return listed(config.with_adapter(None))


def config_of(values: Mapping[str, Any], where: Any = None) -> NetworkConfig:
    """Builds a network config of any family from the dictionary that its `to_dict` wrote.

    Args:
        values: its fields, and ``family``.
        where: the file that they come from, for the error.

    Raises:
        InputError: the family is unknown; a field is unknown, missing or wrong.
    """
    if not isinstance(values, Mapping):
        raise InputError(describe("The network's config is wrong", where=where, got=repr(values)[:200],
                                  expected="an object with the fields of a network's config"))
    name = values.get(FAMILY, "t5")
    if name not in FAMILIES:
        raise unknown_name("family of networks", str(name), FAMILIES, where)
    fields = {field: value for field, value in values.items() if field != FAMILY}
    return FAMILIES[name].config.from_dict(fields, where)


def plain_settings(settings: Any) -> dict[str, Any]:
    """Returns the fields of a settings object as plain values; `network` as its `to_dict` writes it.

    `dataclasses.asdict` alone leaves out the network's family and the kind of its adapters.
    """
    network = settings.network
    return {**dataclasses.asdict(settings), "network": network and network.to_dict()}
