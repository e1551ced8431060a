"""Greedy generation as text."""

from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import hosts
from elm_jax.types import Array, Params
from elm_jax.vocabularies.vocabulary import Vocabulary


def generate(
    network: T5Network, params: Params, inputs: Array, *, max_new_tokens: int,
    vocabulary: Vocabulary,
) -> list[str]:
    """The most likely token at every step, as one text a row.

    `greedy` is jitted at module level: networks of equal config share one program for each shape.

    Args:
        network: static.
        params: of that network, on the mesh.
        inputs: i32[B, S], padded with 0, on the mesh.
        max_new_tokens: most tokens of a text, EOS included.
        vocabulary: turns tokens into text.
    """
    tokens = greedy(network, params, inputs, max_length=max_new_tokens)
    return [vocabulary.decode(row) for row in hosts.whole(tokens)]
