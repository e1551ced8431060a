"""A run's frozen lower layers: how many there are, and the cache of their states, if the run has one."""

import contextlib
import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.models.network import Network, NetworkConfig, frozen_depth
from elm_jax.runtime import trees
from elm_jax.training.loop import Stream
from elm_jax.training.stack.slots import Opened
from elm_jax.training.trunk.trunk_cache import DEFAULT_BYTES, TrunkBase, TrunkCache, TrunkSettings
from elm_jax.training.trunk.trunk_stream import TrunkStream
from elm_jax.types import Params
from elm_jax.workflows.train.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class FrozenTrunk:
    """The trunk of a run: gives streams and batches their states, or leaves them as they are.

    Attributes:
        cache: of the states; None where every step computes them.
    """

    cache: TrunkCache | None

    def stream(self, stream: Stream) -> Stream:
        """Returns the stream, with states if there is a cache."""
        return stream if self.cache is None else TrunkStream(stream, self.cache)

    def with_states(self, opened: Opened) -> Opened:
        """Returns what a run trains on and its validation batches, with states if there is a cache."""
        if self.cache is None:
            return opened
        validation = [self.cache.with_states(batch) for batch in opened.validation]
        return dataclasses.replace(opened, stream=self.stream(opened.stream), validation=validation)


def network_of(config: TrainConfig, base: NetworkConfig, overlay: Params) -> Network:
    """Makes the network to train; with a trunk where the config treats frozen lower layers in another way.

    Args:
        config: of the run.
        base: the base's config with the run's adapters.
        overlay: the leaves that train.

    Raises:
        InputError: the config asks for a trunk, and the lowest layer or an embedding trains.
    """
    network = config.network_of(base)
    if config.trunk_cache is None and config.trunk_dropout:
        return network
    depth = frozen_depth(network, trees.flatten(overlay))
    if depth == 0:
        name = "trunk_dropout" if config.trunk_cache is None else "trunk_cache"
        raise InputError(describe(
            "This setting has no effect: a leaf of the lowest layer trains", where=f"train.{name}",
            got="adapters" + " and norms" * config.train_norms + " in all layers"
            if config.adapter_layers is None else f"adapter_layers={config.adapter_layers!r}",
            cure="give ADAPTER_LAYERS, such as 'upper 10', or leave it out"))
    return dataclasses.replace(network, trunk=depth)


@contextlib.contextmanager
def opened(config: TrainConfig, network: Network, base: Base, mesh: Mesh) -> Iterator[FrozenTrunk]:
    """Opens the cache of a run's network, if the config has one; writes what it computed at the end."""
    if config.trunk_cache is None:
        yield FrozenTrunk(None)
        return
    settings = TrunkSettings(config.trunk_cache, config.trunk_cache_bytes or DEFAULT_BYTES)
    made_of = TrunkBase(base.fingerprint, base.params, config.base_dtype)
    with TrunkCache(network, made_of, settings, mesh, config.rules()) as cache:
        yield FrozenTrunk(cache)
