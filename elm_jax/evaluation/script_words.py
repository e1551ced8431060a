"""Words of a text in any script: letters with their marks, and single characters where a script has no
spaces.

A text whose letters are those of ASCII gives the words that rouge_score gives: the runs of a-z and 0-9 in its
lower-case form.
"""

import functools
import unicodedata
from collections.abc import Callable

LETTER, MARK, ALONE, BLANK = "letter", "mark", "a word of its own", "between words"
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF),
    (0x1B00, 0x1B7F), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303C),
    (0x3040, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0xA4CF), (0xA980, 0xA9FF),
    (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0x16FE0, 0x18DFF), (0x1AFF0, 0x1B2FF), (0x20000, 0x3FFFF),
)
"""Blocks of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese,
Chinese, Japanese and Yi. Korean, Tibetan and Ethiopic have marks between words or syllables."""
_IGNORED = dict.fromkeys((0x200C, 0x200D, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
"""Joiners and variation selectors, which say how a letter is drawn."""


def words_of(text: str, kind_of: Callable[[str], str] | None = None) -> list[str]:
    """Splits a text into lower-case words; a character of a script without spaces is a word.

    >>> words_of("Der Kater, 猫!"), words_of("고양이가 앉았다")
    (['der', 'kater', '猫'], ['고양이가', '앉았다'])

    Args:
        text: in any script.
        kind_of: gives each character's part in words; None for `kind_of_character`.
    """
    words: list[str] = []
    before = BLANK
    for char in composed(text.lower()):
        kind = (kind_of or kind_of_character)(char)
        if kind == ALONE or (kind == LETTER and before != LETTER):
            words.append(char)
        elif kind == LETTER or (kind == MARK and before != BLANK):
            words[-1] += char
        before = before if kind == MARK else kind
    return words


@functools.lru_cache(maxsize=1 << 14)
def kind_of_character(char: str) -> str:
    """Part of a character in words: `LETTER`, `MARK`, `ALONE` or `BLANK`."""
    category = unicodedata.category(char)
    if category in ("Mn", "Mc"):
        return MARK
    if category[0] != "L" and category != "Nd" and char != "\u3007":  # the last is the Chinese zero
        return BLANK
    place = ord(char)
    return ALONE if any(low <= place <= high for low, high in _WITHOUT_SPACES) else LETTER


def composed(text: str) -> str:
    """Writes each letter and digit in one way: composed, of usual width, without joiners."""
    if text.isascii():
        return text
    kept = text.translate(_IGNORED)
    wide = "".join(unicodedata.normalize("NFKC", char) if kind_of_character(char) != BLANK else char
                   for char in kept)
    return unicodedata.normalize("NFC", wide).lower()


def has_words(text: str) -> bool:
    """Whether a text has any letter or digit."""
    return any(kind_of_character(char) in (LETTER, ALONE) for char in text)


def is_plain(text: str) -> bool:
    """Whether no letter, digit or mark of a text lies outside of ASCII, once it is in lower case."""
    return text.isascii() or all(char.isascii() or kind_of_character(char) == BLANK
                                 for char in text.lower())
