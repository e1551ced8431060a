"""Training streams: batches as a pure function of (seed, step).

A stream has no state to save: the step alone gives the position, so a run that was killed resumes with
exactly the rows that it would have seen.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from elm_jax.data.arrays import batches
from elm_jax.data.arrays.batch_forms import BatchForm
from elm_jax.data.draw import draw_rows
from elm_jax.errors import InputError, describe
from elm_jax.types import Batch

_CACHED_EPOCHS = 2
_SHUFFLE, _SUBSET = 0, 1  # first word after the seed, so that the two kinds of draw never coincide

Value = TypeVar("Value")


class ExampleSource(Protocol):
    """A fixed number of training examples with random access, which a stream reads."""

    def __len__(self) -> int:
        """Number of examples in an epoch."""

    def example(self, index: int, epoch: int = 0) -> batches.Example:
        """Returns example `index` of an epoch: inputs i32[n], targets i32[m], EOS included.

        A source that knows lengths without reading the tokens also has a method
        ``lengths_of(index, epoch)``, which returns (n, m): packing needs the lengths of all examples. One
        that knows tasks has a method ``task_of(index, epoch)``, their number or None (`gate_tasks`).
        """


class MixtureSource:
    """Concatenates several sources, each with at most `caps[k]` examples an epoch.

    A source larger than its cap gives another seeded subset every epoch.

    Args:
        sources: what is mixed.
        caps: one limit for each source, or one for all; None for no limit.
        seed: of the subsets.
        tasks: number of each source's task, for networks whose batches carry them; None for others.
    """

    def __init__(
        self, sources: Sequence[ExampleSource], caps: Sequence[int | None] | int | None = None,
        seed: int = 0, tasks: Sequence[int] | None = None,
    ) -> None:
        if caps is None or isinstance(caps, int):
            caps = [caps] * len(sources)
        wrong_cap = any(cap is not None and cap < 1 for cap in caps)
        if not sources or len(caps) != len(sources) or wrong_cap:
            raise InputError(
                describe("Mixture is wrong", got=f"{len(sources)} sources, caps {list(caps)}",
                         expected="at least one source, and one positive cap (or None) for each")
            )
        self.sources = list(sources)
        self.tasks = tasks
        self.seed = seed
        self.sizes = [
            len(source) if cap is None else min(len(source), cap)
            for source, cap in zip(sources, caps, strict=True)
        ]
        self._ends = np.cumsum(self.sizes)
        self._subsets: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int, epoch: int) -> tuple[int, int]:
        """Returns (number of the source, index inside it) of mixture example `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        inside = index - (int(self._ends[number - 1]) if number else 0)
        if self.sizes[number] < len(self.sources[number]):
            inside = int(self._subset(number, epoch)[inside])
        return number, inside

    def example(self, index: int, epoch: int = 0) -> batches.Example:
        """Returns example `index` of an epoch: inputs i32[n], targets i32[m]."""
        number, inside = self.locate(index, epoch)
        return self.sources[number].example(inside, epoch)

    def lengths_of(self, index: int, epoch: int = 0) -> tuple[int, int]:
        """Returns the lengths of inputs and targets of example `index` of an epoch."""
        number, inside = self.locate(index, epoch)
        return _sizes(self.sources[number], inside, epoch)

    def task_of(self, index: int, epoch: int = 0) -> int | None:
        """Returns the number of the task of example `index` of an epoch; None if tasks have none."""
        return None if self.tasks is None else self.tasks[self.locate(index, epoch)[0]]

    def _subset(self, number: int, epoch: int) -> np.ndarray:
        def draw() -> np.ndarray:
            return draw_rows(len(self.sources[number]), self.sizes[number],
                             (self.seed, _SUBSET, epoch, number))

        return _cached(self._subsets, (number, epoch), draw, _CACHED_EPOCHS * len(self.sources))


class TrainStream:
    """Random access to the batches of an endless, shuffled, optionally packed training stream.

    Epochs follow one another without a gap: a batch may hold the last rows of one epoch and the
    first of the next, so all batches are full. Every epoch has every example exactly once.

    Args:
        source: the examples.
        batch_size: B, rows of a (global) batch.
        lengths: ``{'inputs': S, 'targets': T}``.
        seed: of the order; batches are a pure function of (seed, step).
        form: makes batches of examples (`batch_forms.form_of` a network).
        pack: whether several examples may share a row.
        shuffle: whether each epoch has an order of its own, or all the order of the source.
    """

    def __init__(
        self, source: ExampleSource, *, form: BatchForm, batch_size: int, lengths: batches.Lengths,
        seed: int, pack: bool, shuffle: bool = True,
    ) -> None:
        batches.check_lengths(lengths)
        if len(source) < 1 or batch_size < 1:
            raise InputError(
                describe("Training stream is empty",
                         got=f"{len(source)} examples, batch_size={batch_size}",
                         expected="at least one example and one row")
            )
        self.source = source
        self.form = form
        self.batch_size = batch_size
        self.lengths = dict(lengths)
        self.seed = seed
        self.pack = pack
        self.shuffle = shuffle
        self._rows: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._first_rows = [0]  # number of the first row of each epoch, in the endless stream

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Returns the batch of a step; the stream's form says its keys.

        Args:
            step: counted from 0.
            rows: the rows to return, for a process that holds a part of the batch; no other row is read.
                None for all.
        """
        numbers = self._row_numbers(step)
        groups = [self._row(numbers[row]) for row in (range(self.batch_size) if rows is None else rows)]
        found = [[self.source.example(index, epoch) for index in row] for epoch, row in groups]
        tasks = self._tasks_of(groups)
        if self.pack:
            return self.form.make_packed(found, self.lengths, len(found), tasks)
        return self.form.make([row[0] for row in found], self.lengths, len(found),
                              None if tasks is None else [row[0] for row in tasks])

    def examples(self, step: int) -> list[tuple[int, int]]:
        """Returns (epoch, example index) of every example in the batch of a step, in row order."""
        groups = (self._row(number) for number in self._row_numbers(step))
        return [(epoch, int(index)) for epoch, row in groups for index in row]

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that an epoch takes, rounded up."""
        return self.steps_for(1)

    def steps_for(self, epochs: int) -> int:
        """Number of steps that `epochs` passes over the data take, rounded up."""
        return -(-self._first_row(epochs) // self.batch_size)

    def facts(self) -> dict[str, Any]:
        """Returns all that decides the order of the stream; a resumed run must have the same."""
        return {
            "num_examples": len(self.source), "batch_size": self.batch_size,
            "lengths": dict(self.lengths), "seed": self.seed, "pack": self.pack,
            "shuffle": self.shuffle, "first_batch": self._digest(0),
        }

    def _digest(self, step: int) -> str:
        """Hash of one batch's contents, which detects another source of the same size."""
        digest = hashlib.sha256()
        for name, array in sorted(self.batch(step).items()):
            digest.update(json.dumps([name, array.shape]).encode() + array.tobytes())
        return f"sha256:{digest.hexdigest()}"

    def _tasks_of(self, groups: Sequence[tuple[int, np.ndarray]]) -> list[list[int]] | None:
        """Numbers of the tasks of each row's examples; None where the network or the source has none."""
        if not self.form.tasks or not hasattr(self.source, "task_of"):
            return None
        found = [[self.source.task_of(index, epoch) for index in row] for epoch, row in groups]
        return None if any(None in row for row in found) else found

    def _row_numbers(self, step: int) -> range:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def _row(self, number: int) -> tuple[int, np.ndarray]:
        """Returns (epoch, example indices) of a row of the endless stream."""
        if not self.pack:
            epoch, inside = divmod(number, len(self.source))
            return epoch, self._order(epoch)[inside : inside + 1]
        while self._first_rows[-1] <= number:
            self._first_row(len(self._first_rows))
        epoch = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        return epoch, self._packed(epoch)[number - self._first_rows[epoch]]

    def _first_row(self, epoch: int) -> int:
        """Number of an epoch's first row; a packed stream packs all earlier epochs to find it."""
        if not self.pack:
            return epoch * len(self.source)
        while len(self._first_rows) <= epoch:
            last = len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + len(self._packed(last)))
        return self._first_rows[epoch]

    def _order(self, epoch: int) -> np.ndarray:
        def draw() -> np.ndarray:
            if not self.shuffle:
                return np.arange(len(self.source))
            return _permutation(len(self.source), self.seed, _SHUFFLE, epoch)

        return draw() if self.pack else _cached(self._rows, epoch, draw, _CACHED_EPOCHS)

    def _packed(self, epoch: int) -> list[np.ndarray]:
        def draw() -> list[np.ndarray]:
            order = self._order(epoch)
            sizes = (_sizes(self.source, int(index), epoch) for index in order)
            return [order[row] for row in self.form.pack(sizes, self.lengths)]

        return _cached(self._rows, epoch, draw, _CACHED_EPOCHS)


def _sizes(source: ExampleSource, index: int, epoch: int) -> tuple[int, int]:
    """Lengths of an example's inputs and targets, without reading them where the source can tell."""
    if hasattr(source, "lengths_of"):
        return source.lengths_of(index, epoch)
    inputs, targets = source.example(index, epoch)
    return len(inputs), len(targets)


def _permutation(size: int, *words: int) -> np.ndarray:
    """A permutation of range(size), i64[size], that depends on the words only."""
    return draw_rows(size, size, words)


def _cached(cache: OrderedDict, key: Any, make: Any, limit: int) -> Any:
    """Returns cache[key], made if missing; drops the least recently used entry of a full cache."""
    if key not in cache:
        cache[key] = make()
        while len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
