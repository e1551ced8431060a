"""Causal language modelling over raw passages: every token is predicted from those before it."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from elm_jax.data.arrays.batches import Example, Tokens
from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class CausalSource:
    """Pretraining examples, one for each chunk of a passage, the same in every epoch.

    A passage ends with EOS. A chunk is the target; the input is what the form of batches puts in front of an
    empty prompt, or, inside a passage, the token before the chunk. So each token of a passage, and its EOS,
    is predicted once an epoch.

    Attributes:
        chunks: pairs (i32[0] or i32[1], i32[n]) of the token before a chunk and its tokens.
    """

    chunks: tuple[Example, ...]

    @classmethod
    def from_texts(cls, texts: Iterable[str], vocabulary: Vocabulary, *, chunk_length: int) -> "CausalSource":
        """Tokenises passages as they stand and cuts them into chunks; a chunk never spans two passages.

        Args:
            texts: passages.
            vocabulary: that encodes them; its EOS ends each.
            chunk_length: most tokens of a chunk, EOS included.

        Raises:
            InputError: no passage has a token.
        """
        chunks = []
        for text in texts:
            ids = vocabulary.encode(text)
            if ids:
                chunks += _chunks(np.asarray([*ids, vocabulary.eos_id], np.int32), chunk_length)
        if not chunks:
            raise InputError(describe("No passage has a token to pretrain on", got="empty passages",
                                      expected="text"))
        return cls(tuple(chunks))

    def __len__(self) -> int:
        return len(self.chunks)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Returns the token before a chunk, i32[0] or i32[1], and its tokens i32[n]."""
        del epoch
        return self.chunks[index]


def _chunks(tokens: Tokens, length: int) -> list[Example]:
    return [(tokens[max(0, start - 1):start], tokens[start:start + length])
            for start in range(0, len(tokens), length)]
