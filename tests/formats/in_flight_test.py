"""Arrays in boxes: every box once, few on their way, and nothing left on its way after an error."""

import math
import threading

import numpy as np
import pytest
import tensorstore as ts

from elm_jax.errors import RunError
from elm_jax.formats.tensors import boxes, in_flight


@pytest.mark.parametrize(
    "spans", [(range(12), range(9)), (range(5, 11), range(2, 9)), (range(7, 8), range(0, 1))])
@pytest.mark.parametrize("step", [(1, 1), (4, 9), (5, 2), (100, 100)])
def test_boxes_cover_a_part_once_and_keep_to_the_grid(spans, step):
    seen = np.zeros((12, 9), int)
    for box in boxes.cut(spans, step):
        seen[box] += 1
        for part, size, span in zip(box, step, spans, strict=True):
            assert part.start == span.start or part.start % size == 0
            assert part.start // size == (part.stop - 1) // size, "a box lies in one chunk"
    inside = tuple(slice(span.start, span.stop) for span in spans)
    assert (seen[inside] == 1).all() and seen.sum() == seen[inside].size


@pytest.mark.parametrize("limit", [1, 40, 400, 10_000])
def test_joined_boxes_are_whole_chunks_below_the_limit(limit):
    spans, chunks = (range(3, 50), range(9), range(20)), (5, 3, 2)
    step = boxes.joined(spans, chunks, 4, limit)
    assert all(size % chunk == 0 for size, chunk in zip(step, chunks, strict=True))
    assert step == chunks or 4 * math.prod(step) <= limit


def array(folder, name="a", shape=(40, 30), chunks=(7, 4)):
    return ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/{name}/"},
                    "dtype": "float32", "metadata": {"shape": shape, "chunks": chunks, "compressor": None}},
                   create=True, open=True).result()


@pytest.mark.parametrize("limit", [1, 1000, 1 << 20])
@pytest.mark.parametrize("index", [None, (slice(3, 38), slice(None)), (slice(8, 9), slice(29, 30))])
def test_what_is_read_in_boxes_is_the_array(tmp_path, monkeypatch, limit, index):
    monkeypatch.setattr(in_flight, "BYTES", limit)
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    opened = array(tmp_path)
    opened.write(values).result()
    found = in_flight.read(opened, index)
    np.testing.assert_array_equal(found, values if index is None else values[index])
    assert found.flags.c_contiguous and found.dtype == np.float32
    scalar = array(tmp_path, "s", (), ())
    scalar.write(np.float32(3)).result()
    assert in_flight.read(scalar) == 3


class Slow:
    """Stands for TensorStore where a test must say when a write ends, and how."""

    def __init__(self, on_their_way, seconds=0.0, error=None):
        self.on_their_way, self.seconds, self.error = on_their_way, seconds, error

    def write(self, values, can_reference_source_data_indefinitely):
        self.on_their_way.append(values.nbytes)
        self.values = values
        self.done = threading.Event()
        threading.Timer(self.seconds, self.done.set).start()
        return self

    def result(self):
        self.done.wait()
        self.on_their_way.remove(self.values.nbytes)
        if self.error:
            raise self.error


def test_no_more_than_the_limit_is_on_its_way(monkeypatch):
    monkeypatch.setattr(in_flight, "BYTES", 100)
    on_their_way, most = [], []
    with in_flight.Writes() as writes:
        for size in (40, 40, 40, 10, 300, 10, 10):
            writes.start(Slow(on_their_way), np.zeros(size, np.uint8), "here")
            most.append(sum(on_their_way))
        writes.wait()
        assert on_their_way == []
    assert most == [40, 80, 80, 90, 300, 10, 20]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_after_an_error_nothing_is_on_its_way(place):
    """Else a write would make its files anew in a folder that was cleaned up."""
    on_their_way = []
    with pytest.raises(RunError, match=r"Cannot write a tensor[^$]*array 1[^$]*disk is full"):
        with in_flight.Writes() as writes:
            for number in range(3):
                error = OSError("disk is full") if number == 1 else None
                slow = Slow(on_their_way, 0.1 * (number != place), error)
                writes.start(slow, np.zeros(3), f"array {number}")
    assert on_their_way == []
    with pytest.raises(KeyError):
        with in_flight.Writes() as writes:
            writes.start(Slow(on_their_way, 0.1, OSError("late")), np.zeros(3), "here")
            raise KeyError("of the reader")
    assert on_their_way == []
