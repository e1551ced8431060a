"""Room for keys: arrays that grow behind what is in them, shared by an index and those made from it."""

import threading
from collections.abc import Mapping, Sequence

import numpy as np


class KeyRoom:
    """Keys and owners in arrays with room behind them, and the position of each expert.

    An index sees the first rows of its room alone, and nobody ever changes a row that some index sees: what
    is added to the newest index is written behind its rows, and what is added to an older one goes into a
    new room. Room is doubled when it is full, so that a key is copied a few times however often one is added.

    Args:
        keys: f32[N, K]; not copied.
        owners: i32[N], the position of each key's expert.
        experts: E ids.
    """

    def __init__(self, keys: np.ndarray, owners: np.ndarray, experts: Sequence[str]) -> None:
        self._keys, self._owners, self._used = keys, owners, len(keys)
        self._places = {expert: place for place, expert in enumerate(experts)}
        self._lock = threading.Lock()

    def place(self, expert: str, experts: Sequence[str]) -> int | None:
        """Position of an expert among those of an index of this room; None if it is not one of them."""
        place = self._places.get(expert, len(experts))
        return place if place < len(experts) and experts[place] == expert else None

    def add(self, seen: int, experts: Sequence[str], added: Mapping[str, np.ndarray]
            ) -> tuple["KeyRoom", np.ndarray, np.ndarray]:
        """Adds experts to an index of this room.

        Args:
            seen: N, how many keys the index sees.
            experts: its E ids.
            added: new ids, each with keys f32[S, K].

        Returns:
            (room of the new index, its keys f32[N + sum of S, K], its owners i32[N + sum of S]).
        """
        more = sum(map(len, added.values()))
        with self._lock:
            if seen < self._used or seen + more > len(self._keys):
                return self._moved(seen, more, experts).add(seen, experts, added)
            for place, (expert, keys) in enumerate(added.items(), start=len(experts)):
                self._keys[self._used:self._used + len(keys)] = keys
                self._owners[self._used:self._used + len(keys)] = place
                self._places[expert] = place
                self._used += len(keys)
            return self, read_only(self._keys[:self._used]), read_only(self._owners[:self._used])

    def _moved(self, seen: int, more: int, experts: Sequence[str]) -> "KeyRoom":
        """A larger room that begins with the first keys of this one."""
        length = max(seen + more, 2 * seen)  # what is not written yet takes no memory
        keys, owners = _aligned(length, self._keys.shape[1]), np.empty(length, np.int32)
        keys[:seen], owners[:seen] = self._keys[:seen], self._owners[:seen]
        room = KeyRoom(keys, owners, experts)
        room._used = seen
        return room


def _aligned(length: int, dimension: int) -> np.ndarray:
    """Empty rows f32[length, dimension] that begin at a multiple of 64 bytes: JAX needs no copy of them."""
    values = np.empty(length * dimension + 16, np.float32)
    start = -values.ctypes.data % 64 // 4
    return values[start : start + length * dimension].reshape(length, dimension)


def read_only(array: np.ndarray) -> np.ndarray:
    """A view of an array through which nobody writes."""
    view = array.view()
    view.flags.writeable = False
    return view
