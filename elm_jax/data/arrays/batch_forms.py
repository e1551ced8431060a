"""Forms of training batches: which arrays a network takes, made of examples.

A network says which form fits it (`models.network.Network.batches`); special ids are those of its config.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from elm_jax.data.arrays.batches import Example, Lengths, Tokens
from elm_jax.data.arrays.joined import Joined
from elm_jax.data.arrays.two_sided import TwoSided
from elm_jax.models.network import JOINED, TWO_SIDED, Network, ids_of
from elm_jax.types import Batch, SpecialIds


class BatchForm(Protocol):
    """How examples become a batch.

    Attributes:
        ids: of the network.
    """

    ids: SpecialIds

    def make(self, examples: Sequence[Example], lengths: Lengths, batch_size: int) -> Batch:
        """One example a row; longer ones are cut, missing rows are padding with weight 0."""

    def make_packed(self, rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int) -> Batch:
        """Several examples a row, told apart by segment ids."""

    def pack(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
        """Which examples share a row, by the numbers of their input and target tokens."""

    def prompt(self, inputs: Tokens, length: int) -> Tokens:
        """Input tokens as scoring and decoding take them, at most `length`."""

    def target(self, targets: Tokens, length: int) -> Tokens:
        """Target tokens, at most `length`, EOS kept."""


FORMS = {TWO_SIDED: TwoSided, JOINED: Joined}


def form_of(network: Network) -> BatchForm:
    """The form of batches that fits a network."""
    return FORMS[network.batches](ids_of(network.config))
