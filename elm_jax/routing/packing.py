"""Puts texts of several lengths into rows of one length, so that an encoder computes little padding."""

import bisect
from collections.abc import Sequence

import numpy as np

ROW_LENGTHS = (64, 128, 192, 256, 384, 512)
"""Tokens of a row. One call of an encoder uses one of them, and so compiles one program."""
FREE_ATTENTION = 600
"""Tokens of a row whose attention costs as much as all else, as measured with MiniLM on a processor."""


def pack_texts(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Packs texts into rows: each row takes the longest text that is left and fits, until none fits.

    Args:
        lengths: tokens of each text, 1 to `row_length`.
        row_length: tokens of a row.

    Returns:
        The numbers of each row's texts.

    Example:
        >>> pack_texts([30, 64, 20, 20, 40], 64)
        [[1], [4, 2], [0, 3]]
    """
    left: dict[int, list[int]] = {}
    for text in reversed(range(len(lengths))):  # the first of a length is taken first
        left.setdefault(int(lengths[text]), []).append(text)
    known, rows = sorted(left), []
    while known:
        row, space = [], row_length
        while (place := bisect.bisect_right(known, space) - 1) >= 0:
            length = known[place]
            row.append(left[length].pop())
            space -= length
            if not left[length]:
                del known[place]
        rows.append(row)
    return rows


def cheapest_rows(lengths: Sequence[int], longest: int) -> tuple[int, list[list[int]]]:
    """Packs texts into rows of the length that costs least; returns that length and each row's texts.

    Args:
        lengths: tokens of each text, at least 1 each.
        longest: tokens of the longest text that there can be; rows are so long if it is above `ROW_LENGTHS`.
    """
    most = max(lengths)
    sizes = [size for size in (*ROW_LENGTHS, longest) if size >= most]
    packed = {size: pack_texts(lengths, size) for size in sizes[:-1] or sizes}
    size = min(packed, key=lambda size: (len(packed[size]) * size * (FREE_ATTENTION + size), size))
    return size, packed[size]


def lay_out(ids: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], shape: tuple[int, int]
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays texts out in rows: tokens, each one's text in its row (from 1; 0 is padding) and its place there.

    Args:
        ids: tokens of every text.
        rows: numbers of each row's texts, at most B rows.
        shape: B and S.

    Returns:
        Three arrays i32[B, S].
    """
    tokens, numbers, positions = np.zeros((3, *shape), np.int32)
    for line, row in enumerate(rows):
        start = 0
        for number, text in enumerate(row, start=1):
            part = np.s_[line, start : start + len(ids[text])]
            tokens[part], numbers[part], positions[part] = ids[text], number, np.arange(len(ids[text]))
            start += len(ids[text])
    return tokens, numbers, positions
