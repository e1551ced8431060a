"""One row's tokens as they come -> text: ends at EOS, at a stop string or at its last token."""

import dataclasses
from collections.abc import Collection, Sequence

from elm_jax.vocabularies.vocabulary import Vocabulary

EOS, STOP, LENGTH, CONTEXT = FINISHES = ("eos", "stop", "length", "context")
"""Why a text ended: EOS, a stop string, `max_new_tokens`, or because the network's context was full."""
_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a vocabulary writes for the first bytes of a character."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated text.

    Attributes:
        text: without EOS, and without the stop string and what follows it.
        tokens: how many were generated: EOS and those of the stop string included.
        finish: why it ended, one of `FINISHES`.
    """

    text: str
    tokens: int
    finish: str


class AnswerText:
    """Turns the tokens of one row into text, piece by piece.

    Attributes:
        answer: None until the text has ended.
        limit: most tokens.
    """

    def __init__(self, vocabulary: Vocabulary, ends: Collection[int], stop: Sequence[str],
                 limit: tuple[int, str], front: str = "") -> None:
        """Begins an empty text.

        Args:
            vocabulary: decodes tokens.
            ends: tokens that end a text.
            stop: strings before which it ends.
            limit: most tokens, and the reason to give when there are so many: `LENGTH` or `CONTEXT`.
            front: left out where the text begins with it: what stands between a prompt and its target.
        """
        self.answer: Answer | None = None
        self.limit, self._at_limit = limit
        self._vocabulary, self._ends, self._stop = vocabulary, set(ends), tuple(stop)
        self._seen, self._shown, self._front = 0, 0, front

    def add(self, tokens: Sequence[int]) -> str:
        """Takes all tokens so far, those that were given before included; returns the text that is new.

        Text that further tokens may change or cut off comes later: half a character, the beginning of a
        stop string. What all calls return makes up the answer's text.
        """
        if self.answer is not None:
            return ""
        tokens = [int(token) for token in tokens[:self.limit]]
        ended = next((number for number, token in enumerate(tokens, start=1) if token in self._ends), None)
        tokens = tokens[:ended]
        text = self._decode(tokens)
        if self._cut(text) is not None:
            count = next(number for number in range(self._seen + 1, len(tokens) + 1)
                         if self._cut(self._decode(tokens[:number])) is not None)
            text = self._decode(tokens[:count])
            return self._end(text[:self._cut(text)], count, STOP)
        self._seen = len(tokens)
        if ended is not None:
            return self._end(text, len(tokens), EOS)
        if len(tokens) == self.limit:
            return self._end(text, len(tokens), self._at_limit)
        return self._new(text[:self._certain(text)])

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._vocabulary.decode(tokens[:-1] if tokens and tokens[-1] in self._ends else tokens)
        return text.removeprefix(self._front)

    def _cut(self, text: str) -> int | None:
        """Where the text is cut: before the stop string that ends first in it, of several the longest."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _certain(self, text: str) -> int:
        """Number of characters that no further token can change or cut off."""
        certain = len(text.rstrip(_HALF))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, certain), 0, -1):
                if text.endswith(stop[:size], 0, len(text)):
                    certain = min(certain, len(text) - size)
                    break
        return certain

    def _new(self, text: str) -> str:
        new, self._shown = text[self._shown:], max(self._shown, len(text))
        return new

    def _end(self, text: str, count: int, finish: str) -> str:
        self.answer = Answer(text, count, finish)
        return self._new(text)
