"""Forms of training batches: which arrays a network takes, and how examples become these arrays.

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
    """A form of training batches: makes the arrays that a network takes from examples.

    Attributes:
        ids: of the network.
    """

    ids: SpecialIds

    def make(self, examples: Sequence[Example], lengths: Lengths, batch_size: int) -> Batch:
        """Makes a batch of one example a row; longer examples are cut, missing rows have weight 0."""

    def make_packed(self, rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int) -> Batch:
        """Makes a batch of several examples a row, separated by segment ids."""

    def pack(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
        """Groups examples into rows, by their numbers of input and target tokens."""

    def prompt(self, inputs: Tokens, length: int) -> Tokens:
        """Cuts input tokens for scoring and decoding to at most `length`."""

    def target(self, targets: Tokens, length: int) -> Tokens:
        """Cuts target tokens to at most `length`; EOS stays."""


FORMS = {TWO_SIDED: TwoSided, JOINED: Joined}


def form_of(network: Network) -> BatchForm:
    """Returns the form of batches that a network takes."""
    return FORMS[network.batches](ids_of(network.config))
