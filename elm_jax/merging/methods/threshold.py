"""Finds the cuts of a leaf's largest elements for all experts at once, reading the leaf in blocks.

Gives the same cuts as `sparsify.find_cut`, which needs the whole leaf in memory. A first pass over the leaf
counts magnitudes by their upper bits, a second one by the lower bits within the bucket of the cut. If only
some elements of exactly the smallest kept magnitude are kept, a third pass finds the last of them.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from elm_jax.merging.methods.sparsify import Cut

Blocks = Callable[[int], Iterator[tuple[int, int, np.ndarray]]]
"""From a block's number to (expert, index of its first element, values f32[n]) of each expert."""
_UPPER, _LOWER = 15, 16
_ALL = np.uint32(2**32 - 1)
_AT_ONCE = 4
"""Number of blocks whose bit masks of equal elements are in memory together."""
_BLOCK_BITS = 1 << 18
"""Approximate number of elements of a block."""


def memory(num: int) -> int:
    """Approximate bytes that `find_cuts` needs for `num` experts, beside the blocks that it reads."""
    return num * ((4 << _LOWER) + _AT_ONCE * _BLOCK_BITS // 8)


def find_cuts(blocks: Blocks, num_blocks: int, counts: Sequence[int], size: int,
              workers: Executor) -> tuple[Cut, ...]:
    """Finds the cut of each expert of a leaf.

    Args:
        blocks: yields (expert, index of the first element, task vector f32[n]) of a block; called by several
            threads.
        num_blocks: number of blocks.
        counts: how many elements of each expert are kept.
        size: elements of the leaf, less than 2^32.
        workers: threads.
    """
    wanted = {expert: count for expert, count in enumerate(counts) if 0 < count < size}

    def counted(bins: int, key: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        # One for all workers: of many experts each such array is large.
        totals, lock = np.zeros((len(counts), bins), np.uint32), threading.Lock()

        def add(block: int) -> None:
            for expert, _, values in blocks(block):
                if expert in wanted:
                    found = np.bincount(key(expert, magnitudes(values)), minlength=bins).astype(np.uint32)
                    with lock:
                        totals[expert] += found

        list(workers.map(add, range(num_blocks)))
        return totals

    cuts = [Cut(np.uint32(0), _ALL, np.bool_(count > 0)) for count in counts]
    if not wanted:
        return tuple(cuts)
    upper = counted(1 << _UPPER, lambda expert, bits: bits >> _LOWER)
    high = {expert: _bucket(upper[expert], count) for expert, count in wanted.items()}
    del upper
    lower = counted(1 << _LOWER, lambda expert, bits: bits[bits >> _LOWER == high[expert][0]] & 0xFFFF)
    cut_among_equals: dict[int, tuple[np.uint32, int]] = {}
    for expert in wanted:
        low, missing = _bucket(lower[expert], high[expert][1])
        threshold = np.uint32(high[expert][0] << _LOWER | low)
        cuts[expert] = Cut(threshold, _ALL, np.bool_(True))
        if missing < lower[expert][low]:
            cut_among_equals[expert] = threshold, missing
    for expert, last in _places_of(blocks, num_blocks, cut_among_equals, workers).items():
        cuts[expert] = cuts[expert]._replace(last=np.uint32(last))
    return tuple(cuts)


def magnitudes(values: np.ndarray) -> np.ndarray:
    """Bits u32[...] of ``|x|`` of f32[...], ordered as the magnitudes are."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _bucket(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bucket, from the last one down, in which the wanted count is reached; and the count left in it."""
    from_above = np.cumsum(counts[::-1], dtype=np.int64)
    place = int(np.searchsorted(from_above, wanted))
    before = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before


def _places_of(blocks: Blocks, num_blocks: int, wanted: dict[int, tuple[np.uint32, int]],
               workers: Executor) -> dict[int, int]:
    """Index, by expert, of its n-th element of exactly a given magnitude."""
    left = {expert: number for expert, (_, number) in wanted.items()}
    places: dict[int, int] = {}

    def equals(block: int) -> list[tuple[int, int, np.ndarray]]:
        return [(expert, place, np.packbits(magnitudes(values) == wanted[expert][0]))
                for expert, place, values in blocks(block) if expert in wanted]

    for first in range(0, num_blocks, _AT_ONCE):
        if not left:
            break
        for found in workers.map(equals, range(first, min(first + _AT_ONCE, num_blocks))):
            for expert, place, bits in found:
                if expert not in left:
                    continue
                offsets = np.flatnonzero(np.unpackbits(bits))
                if len(offsets) >= left[expert]:
                    places[expert] = place + int(offsets[left.pop(expert) - 1])
                else:
                    left[expert] -= len(offsets)
    return places
