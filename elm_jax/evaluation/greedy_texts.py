"""Greedy generation of texts."""

from collections.abc import Sequence

from elm_jax.models.decode import greedy
from elm_jax.models.network import Network, NetworkConfig, ends_of
from elm_jax.runtime import hosts
from elm_jax.types import Padded, Params
from elm_jax.vocabularies.vocabulary import Vocabulary


def generate(
    network: Network, params: Params, inputs: Padded, *, max_new_tokens: int,
    vocabulary: Vocabulary,
) -> list[str]:
    """Generates one text a row greedily: the most likely token at every step.

    `greedy` is jitted at module level: networks of equal config share one program for each shape.

    Args:
        network: static.
        params: of that network, on the mesh.
        inputs: tokens i32[B, S], lengths i32[B], on the mesh.
        max_new_tokens: most tokens of a text, EOS included.
        vocabulary: turns tokens into text.
    """
    tokens = greedy(network, params, inputs, max_length=max_new_tokens)
    return [decoded(network.config, row, vocabulary) for row in hosts.whole(tokens)]


def decoded(config: NetworkConfig, tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    """Decodes a row of tokens up to the first that ends a text, of all that the config names."""
    ends = set(ends_of(config))
    end = next((place for place, token in enumerate(tokens) if int(token) in ends), None)
    return vocabulary.decode_target(tokens[:end])
