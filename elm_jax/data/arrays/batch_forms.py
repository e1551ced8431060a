"""Forms of training batches: which arrays a network takes, and how examples become these arrays.

A network says which form fits it (`models.network.Network.batches`); special ids are those of its config.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from elm_jax.data.arrays.batches import Example, Lengths, Tokens
from elm_jax.data.arrays.joined import Joined
from elm_jax.data.arrays.two_sided import TwoSided
from elm_jax.models.layers.gate_tasks import tasks_of
from elm_jax.models.network import JOINED, TWO_SIDED, Network, NetworkConfig, context_of, ids_of
from elm_jax.types import Batch, SpecialIds


class BatchForm(Protocol):
    """A form of training batches: makes the arrays that a network takes from examples.

    Attributes:
        ids: of the network.
        context: most tokens of a prompt and what follows it together; None for no limit.
        tasks: names of the tasks whose numbers batches carry (`layers.gate_tasks`); none for most networks.
    """

    ids: SpecialIds
    context: int | None
    tasks: tuple[str, ...]

    def make(self, examples: Sequence[Example], lengths: Lengths, batch_size: int,
             task_ids: Sequence[int] | None = None) -> Batch:
        """Makes a batch of one example a row; longer examples are cut, missing rows have weight 0.

        Args:
            examples: pairs of inputs and targets.
            lengths: ``{'inputs': S, 'targets': T}``.
            batch_size: B.
            task_ids: number of each example's task, for a network that takes them.
        """

    def make_packed(self, rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int,
                    task_ids: Sequence[Sequence[int]] | None = None) -> Batch:
        """Makes a batch of several examples a row, separated by segment ids; arguments as of `make`."""

    def pack(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
        """Groups examples into rows, by their numbers of input and target tokens."""

    def misfits(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[int]:
        """Numbers of the examples that are longer than the context even when they are cut to `lengths`."""

    def prompt(self, inputs: Tokens, length: int) -> Tokens:
        """Makes the prompt of input tokens, for scoring and decoding; cuts it at the end to `length`."""

    def prompt_length(self, size: int) -> int:
        """Number of tokens of the whole prompt of `size` input tokens, EOS among them."""

    def last_of(self, inputs: Tokens, length: int) -> Tokens:
        """The last input tokens, of which a prompt of at most `length` loses none: a cut on the left."""

    def target(self, targets: Tokens, length: int) -> Tokens:
        """Cuts target tokens to at most `length`; EOS stays."""


FORMS: dict[str, Callable[[NetworkConfig], BatchForm]] = {
    TWO_SIDED: lambda config: TwoSided(ids_of(config), tasks_of(config)),
    JOINED: lambda config: Joined(ids_of(config), context_of(config), tasks_of(config)),
}


def form_of(network: Network) -> BatchForm:
    """Returns the form of batches that a network takes."""
    return FORMS[network.batches](network.config)
