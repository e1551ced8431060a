"""Seeded draws and the filling of sentence frames, the same on every machine and in every process."""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
_SLOT = re.compile(r"\{([a-z_]+?)(\d*)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u(?!ni|s))(?!one\b|once\b)")


class Draw:
    """A stream of draws that its key alone decides.

    Only ``random.random`` is used: the one method whose stream Python promises to keep.
    """

    def __init__(self, *key: str | int) -> None:
        """Starts a stream of its own for each key."""
        digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in random order."""
        rest = list(items)
        return [rest.pop(int(self._random() * len(rest))) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))

    def bind(self, frame: str, words: Mapping[str, Sequence[str]], slots: dict[str, str]) -> str:
        """Fills a frame's slots and keeps what was drawn.

        Args:
            frame: text with slots such as ``{person}`` or ``{person2}``: different words of the
                list ``person``.
            words: lists by the slots' names without their numbers.
            slots: words that are settled already; what is drawn is added here.

        Returns:
            The text, with ``a`` or ``an`` as the next word asks for, and a capital in front.
        """
        for name, number in _SLOT.findall(frame):
            slot = name + number
            if slot not in slots:
                taken = set(slots.values())
                slots[slot] = self.pick([word for word in words[name] if word not in taken])
        return polish(_SLOT.sub(lambda match: slots[match[1] + match[2]], frame))

    def fill(self, frame: str, words: Mapping[str, Sequence[str]], **slots: str) -> str:
        """As `bind`, for frames whose words are not needed again."""
        return self.bind(frame, words, slots)


def polish(text: str) -> str:
    """Sets ``a`` or ``an``, and a capital at the start of each sentence."""
    text = _ARTICLE.sub(r"\1n ", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
