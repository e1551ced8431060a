"""A training stream whose batches carry the states of the frozen lower layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from elm_jax.training.loop import Stream
from elm_jax.training.trunk.trunk_cache import TrunkCache
from elm_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class TrunkStream:
    """The batches of a stream with states from a cache (`training.loop.Stream`).

    Attributes:
        stream: the batches of tokens; alone decides their order.
        cache: of the run's network and base.
    """

    stream: Stream
    cache: TrunkCache

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.stream.batch_size

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Returns the batch of a step, or some of its rows, with their states."""
        return self.cache.with_states(self.stream.batch(step, rows))

    def facts(self) -> dict[str, Any]:
        """Returns what decides the order of the stream; states change nothing."""
        return self.stream.facts()
