"""Merges leaf by leaf and slice by slice, so that memory depends on the size of a slice only.

A leaf is merged in whole rows, those of its last dimension (see `as_rows`). If the method needs
values of the whole leaf (cuts of the largest changes, norms, inner products), a first pass computes them; a
second pass merges. The leaf stays in memory in between if the values of all experts fit into `CACHE_BYTES`,
else it is read again. Slices have few sizes (see `_padded`), and each size has one compiled program.
"""

import functools
import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.merging.methods import compose, method_table, sparsify, threshold
from elm_jax.merging.methods.compose import Numbers, Steps
from elm_jax.merging.recipes.recipe import LeafRecipe
from elm_jax.types import Array

SLICE_BYTES = 1 << 24
"""Bytes of a slice in each worker: rows of all experts and of the base together, in their dtype on disk."""
CACHE_BYTES = 3 << 25
"""A leaf with fewer bytes, of all experts and of the base together, is read only once."""
MOST_ELEMENTS = 1 << 19
"""Most elements of a slice; half of them cost a tenth more processor time, twice as many save little."""
_LEAST, _STEP = 1 << 15, 1 << 4
"""Smaller slices are padded to `_LEAST` elements, larger ones to that times a power of `_STEP`: a
program takes longer to compile than a few hundred slices of zeros to merge."""
_BLOCK = 1 << 18
_PIECE, _TERMS = 1 << 15, 1 << 12
"""Numbers of products that are in memory together, and that are summed in float32."""
_FLOAT = np.dtype(np.float32)
_LOOK_BYTES = 24e6
"""Bytes that a worker needs for the first pass; measured."""
_PROGRAM_BYTES = {None: 0, "magnitude": 1_000_000, "random": 7_000_000}
"""Bytes of compiling for each expert, by kind of sparsification; measured with 60 and 150 experts."""


class LeafSource(Protocol):
    """Leaves of one expert or of the base, read by rows (see `as_rows`).

    Attributes:
        specs: by leaf, anything with a ``shape`` and a ``dtype`` (its name).
    """

    specs: Mapping[str, Any]

    def fill(self, path: str, start: int, out: np.ndarray) -> None:
        """Reads rows of a leaf, from row `start` on, into a flat array [n] of a whole number of rows."""
        ...


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(number of rows, width) of a leaf: all dimensions but the last are flattened into one.

    A vector has a row for each element, so that it can be cut anywhere.

    >>> as_rows((16, 5120, 64)), as_rows((7, 3)), as_rows((7,)), as_rows(())
    ((81920, 64), (7, 3), (7, 1), (1, 1))
    """
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


class LeafMerge:
    """Merges one leaf in slices; several threads may call `rows`."""

    def __init__(self, path: str, recipe: LeafRecipe, experts: Sequence[LeafSource], base: LeafSource | None,
                 names: Sequence[str], dtype: str | None = None,
                 marks: Sequence[str] | None = None) -> None:
        """Checks the settings; reads no leaf.

        Args:
            path: of the leaf.
            recipe: how it is merged.
            experts: that have it, of one shape.
            base: None, or a base without this leaf, counts as zero.
            names: of the experts, for errors.
            dtype: of the result; None for the first expert's.
            marks: identities of the experts that do not depend on their folders, such as fingerprints: random
                masks depend on them; None takes the names.

        Raises:
            InputError: weights or parameters that the method does not take; a leaf of 2^32 elements or more,
                for a method that uses element indices.
        """
        self.path, self._names, self._marks = path, tuple(names), tuple(marks or names)
        self._row = method_table.get_method(recipe.method)
        self._settings = self._row.settings(recipe.parameters, len(experts), f"leaf {path}")
        self._weights = method_table.resolve_weights(self._row, recipe.weights, len(experts), self._settings,
                                                     f"leaf {path}")
        self.shape = tuple(experts[0].specs[path].shape)
        self.dtype = np.dtype(dtype or experts[0].specs[path].dtype)
        if self._row.needs_base and base is None:
            raise method_table.no_base(self._row)
        if self.dtype == np.float64:
            raise InputError(describe("Sums are taken in float32, and a leaf of float64 would lose by it",
                                      where=f"leaf {path}", got="float64",
                                      cure="ask for a result in float32 (--dtype float32)"))
        self.num_rows, self.width = as_rows(self.shape)
        if self._row.sparsify is not None and self.size >= 1 << 32:
            raise InputError(describe(
                f"A leaf is too large for {self._row.name}, which counts its elements in 32 bits",
                where=f"leaf {path}", got=f"{self.size} elements", expected="less than 2^32",
                cure="merge it by a method that drops none, such as mean"))
        with_base = self._row.needs_base and base is not None and path in base.specs
        self._sources = [*experts, *([base] if with_base else [])]
        self._zero_base = self._row.needs_base and not with_base
        self._dtypes = [np.dtype(source.specs[path].dtype) for source in self._sources]
        self._read = self._read_source
        self._numbers: Numbers | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Method, weights and all parameters that apply to this leaf; JSON-ready."""
        return method_table.to_json(self._row, self._weights, self._settings)

    @property
    def size(self) -> int:
        """Number of elements of the leaf."""
        return self.num_rows * self.width

    @property
    def bytes_read(self) -> int:
        """Upper bound of the bytes that are read from all sources."""
        once = sum(self.size * dtype.itemsize for dtype in self._dtypes)
        if not self._looks_first or self._fits:
            return once
        cuts = 3 if self._row.sparsify == "magnitude" and min(self._settings["density"]) < 1 else 0
        return once * (1 + cuts + (self._settings.get("rescale") == "l1") + self._row.spherical)

    @property
    def _looks_first(self) -> bool:
        """Whether the method needs a pass over the whole leaf before it can merge a slice."""
        return (self._row.spherical or self._row.sparsify == "magnitude"
                or self._settings.get("rescale") == "l1")

    @property
    def _fits(self) -> bool:
        return sum(self.size * dtype.itemsize for dtype in self._dtypes) <= CACHE_BYTES

    @property
    def memory(self) -> tuple[int, int]:
        """Approximate bytes that `look` keeps, and that each worker needs beside them for a slice."""
        kept = sum(self.size * dtype.itemsize for dtype in self._dtypes)
        kept = kept if self._looks_first and self._fits else 0
        kept += _PROGRAM_BYTES[self._row.sparsify] * len(self._names)
        if self._row.sparsify == "magnitude" and min(self._settings["density"]) < 1:
            kept += threshold.memory(len(self._names))
        rows = max((stop - start for start, stop in self.slices()[:1]), default=0)
        elements = self._padded(rows * self.width)
        inputs = elements * sum(dtype.itemsize for dtype in self._dtypes)
        # Read once, copied once into the program's own memory; what it computes with is of float32.
        terms = len(self._names) if self._row.consensus else 0
        each = 2 * inputs + (3 + terms) * elements * 4 + (_LOOK_BYTES if self._looks_first else 0)
        return kept, each

    def slices(self) -> list[tuple[int, int]]:
        """Rows (from, to) of each slice, of about equal size so that few programs are compiled."""
        if not self.size:
            return []
        rows = max(1, self._most // self.width)
        rows = -(-self.num_rows // -(-self.num_rows // rows))
        return [(start, min(start + rows, self.num_rows)) for start in range(0, self.num_rows, rows)]

    @property
    def _most(self) -> int:
        """Largest number of elements of a slice, unless a row has more."""
        return max(1, min(SLICE_BYTES // sum(dtype.itemsize for dtype in self._dtypes), MOST_ELEMENTS))

    def _padded(self, count: int) -> int:
        return _padded(count, self._most)

    def look(self, workers: Executor) -> None:
        """Computes what the method needs of the whole leaf; call it once, before `rows`."""
        if self._looks_first and self._fits:
            whole = _whole(workers, self.size, self._dtypes)
            list(workers.map(self._read_source, range(len(whole)), itertools.repeat(0), whole))
            self._read = functools.partial(_copy_rows, whole, self.width)
        self._numbers = self._find_numbers(workers)

    def forget(self) -> None:
        """Releases the leaf that `look` read; its buffer is reused for the next leaf of these workers."""
        self._read = self._read_source

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Merges rows `start` to `stop`; returns them flat, [n], in the result's dtype.

        Raises:
            InputError: a value that is not finite; names the leaf and the expert.
        """
        count = (stop - start) * self.width
        padded = self._padded(count)
        parts = [_scratch(number, padded, dtype) for number, dtype in enumerate(self._dtypes)]
        for number, part in enumerate(parts):
            self._read(number, start, part[:count])
            part[count:] = 0
        experts, base = self._split(parts, padded)
        steps = compose.steps_of(self._row, self._settings, self.dtype.name)
        place = start * self.width if self._row.sparsify is not None else 0  # others may be beyond 2^32
        numbers = self._numbers._replace(start=np.uint32(place))
        merged, finite = _merge_slice(steps, experts, base, numbers)
        if not finite:
            raise self._not_finite()
        return np.asarray(merged)[:count]

    def _split(self, parts: Sequence[np.ndarray], count: int) -> tuple[list[np.ndarray], np.ndarray | None]:
        if self._zero_base:
            return list(parts), np.zeros(count, np.float32)
        return (list(parts[:-1]), parts[-1]) if self._row.needs_base else (list(parts), None)

    def _read_source(self, number: int, start: int, out: np.ndarray) -> None:
        self._sources[number].fill(self.path, start, out)

    def _not_finite(self) -> InputError:
        # A norm of the leaf is not finite in any slice, wherever the value lies: all of it is searched.
        for number, name in zip(range(len(self._sources)), [*self._names, "the base"], strict=False):
            spans = map(self._span, range(self._num_blocks))
            if not all(np.all(np.isfinite(widen(self._block(number, *span)))) for span in spans):
                return InputError(describe(
                    "A value is not finite", where=f"leaf {self.path} of {name}", got="NaN or infinity",
                    expected="finite values in all that is merged", cure="train or fetch it again"))
        return InputError(describe(
            "The merged values are too large", where=f"leaf {self.path}", got=f"infinity in {self.dtype}",
            expected="smaller weights, or another dtype"))

    def _find_numbers(self, workers: Executor) -> Numbers:
        row, settings = self._row, self._settings
        weights = np.asarray(self._weights, np.float32)
        if row.spherical:
            return Numbers(self._arc(workers))
        numbers = Numbers(weights, np.float32(settings.get("scale", 1.0)))
        if row.sparsify == "random":
            numbers = numbers._replace(
                keys=np.asarray(compose.leaf_keys(settings["seed"], self.path, self._marks)),
                density=np.asarray(settings["density"], np.float32))
        if row.sparsify == "magnitude":
            counts = [sparsify.num_kept(share, self.size) for share in settings["density"]]
            numbers = numbers._replace(cuts=threshold.find_cuts(
                self._deltas, self._num_blocks, counts, self.size, workers))
        if settings.get("rescale") == "density":
            return numbers._replace(factors=np.asarray(compose.density_factors(
                row, settings["density"], self.size)))
        if settings.get("rescale") == "l1":
            return numbers._replace(factors=self._norm_factors(numbers, workers))
        return numbers

    @property
    def _block_rows(self) -> int:
        return max(1, _BLOCK // max(1, self.width))

    def _deltas(self, block: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields each expert's task vector f32[n] in a block: (expert, index of its first element, values).

        The values are valid until the next ones are taken.
        """
        (start, count), base = self._span(block), len(self._sources) - 1
        with_base = self._row.needs_base and not self._zero_base
        if with_base:
            under = widen(self._block(base, start, count), _scratch("under", count, _FLOAT))
        for number in range(len(self._names)):
            values = widen(self._block(number, start, count), _scratch("wide", count, _FLOAT))
            if with_base:
                with np.errstate(invalid="ignore", over="ignore"):  # `rows` tells of what is not finite
                    values -= under
            yield number, start * self.width, values

    def _block(self, number: int, start: int, count: int) -> np.ndarray:
        """Reads one source's values [count] of a block; they are valid until the next block is read."""
        part = _scratch(0, count, self._dtypes[number])
        self._read(number, start, part)
        return part

    @property
    def _num_blocks(self) -> int:
        return -(-self.num_rows // self._block_rows) if self.size else 0

    def _span(self, block: int) -> tuple[int, int]:
        """The first row of a block, and its number of elements."""
        start = block * self._block_rows
        return start, (min(start + self._block_rows, self.num_rows) - start) * self.width

    def _norm_factors(self, numbers: Numbers, workers: Executor) -> np.ndarray:
        """Factors f32[E] that restore the L1 norms of the sparsified task vectors."""
        def norms(block: int) -> list[tuple[float, float]]:
            found = []
            for number, start, delta in self._deltas(block):
                kept = _mask(self._row.name, delta, numbers, number, np.uint32(start))
                sizes = np.abs(delta)
                found.append((float(np.sum(sizes, dtype=np.float64)),
                              float(np.sum(sizes[kept], dtype=np.float64))))
            return found

        sums = np.sum([np.zeros((len(self._names), 2)), *workers.map(norms, range(self._num_blocks))], axis=0)
        factors = np.asarray(sparsify.norm_factor(*np.asarray(sums, np.float32).T))
        return np.where(np.asarray(self._settings["density"]) >= 1, np.float32(1), factors)

    def _arc(self, workers: Executor) -> np.ndarray:
        """Factors f32[2] of the two experts for spherical interpolation."""
        sums = np.sum([np.zeros(3), *workers.map(self._products, range(self._num_blocks))], axis=0)
        first, second = (math.sqrt(square) for square in sums[:2])
        with np.errstate(invalid="ignore"):  # `rows` tells of what is not finite
            cosine = sums[2] / (first * second) if min(first, second) > compose.SMALLEST else 1.0
        share = np.float64(self._weights[1] / math.fsum(self._weights))
        return compose.arc_weights(np.clip(cosine, -1.0, 1.0), share, np).astype(np.float32)

    def _products(self, block: int) -> np.ndarray:
        """Sums f64[3] over a block: first expert's squares, second expert's squares, products."""
        start, count = self._span(block)
        raw = [_scratch(number, count, dtype) for number, dtype in enumerate(self._dtypes)]
        for number, part in enumerate(raw):
            self._read(number, start, part)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = _sums_of_products(*raw)
            if np.all(np.isfinite(sums)) and min(sums[:2]) > 1e-20:
                return sums
            # Too large or too small for squares in float32.
            a, b = (widen(part).astype(np.float64) for part in raw)
            return np.asarray([np.vdot(x, y) for x, y in ((a, a), (b, b), (a, b))])


def _sums_of_products(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sums f64[3] of a*a, b*b and a*b for arrays [n]; float32 within `_TERMS` products, float64 above.

    Works in pieces that fit into the processor's cache, which takes half the time.
    """
    sums: list[list[np.ndarray]] = [[], [], []]
    for start in range(0, len(first), _PIECE):
        size = min(_PIECE, len(first) - start)
        a, b = (widen(values[start:start + size], _scratch(name, size, _FLOAT))
                for name, values in (("a", first), ("b", second)))
        product = _scratch("product", size, _FLOAT)
        for own, (x, y) in zip(sums, ((a, a), (b, b), (a, b)), strict=True):
            own.append(np.add.reduceat(np.multiply(x, y, out=product), range(0, size, _TERMS)))
    return np.asarray([np.sum(np.concatenate(own), dtype=np.float64) for own in sums])


_threads = threading.local()
_kept: weakref.WeakKeyDictionary[Executor, np.ndarray] = weakref.WeakKeyDictionary()


def _whole(workers: Executor, size: int, dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Buffers for one leaf of each source; reuses the last leaf's, since new memory takes time to clear."""
    sizes = [size * dtype.itemsize for dtype in dtypes]
    starts = list(itertools.accumulate((-(-nbytes // 64) * 64 for nbytes in sizes), initial=0))
    if workers not in _kept or len(_kept[workers]) < starts[-1]:
        _kept.pop(workers, None)  # freed before the larger buffer is made
        _kept[workers] = np.empty(starts[-1], np.uint8)
    return [_kept[workers][start:start + nbytes].view(dtype)
            for start, nbytes, dtype in zip(starts, sizes, dtypes, strict=False)]


def _scratch(name: int | str, size: int, dtype: np.dtype) -> np.ndarray:
    """A buffer of this thread, by name or source number; overwrites what it held before."""
    kept = _threads.__dict__.setdefault("scratch", {})
    nbytes = size * dtype.itemsize
    if name not in kept or len(kept[name]) < nbytes:
        kept[name] = np.empty(nbytes, np.uint8)
    return kept[name][:nbytes].view(dtype)


class CopiedLeaf:
    """A leaf that is no parameter, such as a table of positions: equal in all experts, and copied."""

    def __init__(self, path: str, sources: Sequence[LeafSource], names: Sequence[str]) -> None:
        """Stores the arguments; reads nothing."""
        self.path, self._sources, self._names = path, sources, names
        self.shape = tuple(sources[0].specs[path].shape)
        self.dtype = np.dtype(sources[0].specs[path].dtype)
        self.num_rows, self.width = as_rows(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the leaf."""
        return self.num_rows * self.width

    @property
    def bytes_read(self) -> int:
        """Bytes that are read from all sources."""
        return len(self._sources) * self.size * self.dtype.itemsize

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes as `LeafMerge.memory` gives them."""
        return 0, SLICE_BYTES

    def slices(self) -> list[tuple[int, int]]:
        """Rows (from, to) of each slice."""
        rows = max(1, SLICE_BYTES // max(1, self.width * self.dtype.itemsize * len(self._sources)))
        return [(start, min(start + rows, self.num_rows))
                for start in range(0, self.num_rows, rows)] if self.size else []

    def look(self, workers: Executor) -> None:
        """Does nothing: copying needs no pass over the whole leaf."""

    def forget(self) -> None:
        """Does nothing: no data is kept."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns rows `start` to `stop`, flat, [n].

        Raises:
            InputError: they differ between two experts.
        """
        found = np.empty((len(self._sources), (stop - start) * self.width), self.dtype)
        for source, out in zip(self._sources, found, strict=True):
            source.fill(self.path, start, out)
        for name, other in zip(self._names[1:], found[1:], strict=True):
            if other.tobytes() != found[0].tobytes():
                raise InputError(describe(
                    f"A leaf of {self.dtype} cannot be merged, and differs", where=f"leaf {self.path}",
                    got=f"other values in {self._names[0]} than in {name}", expected="equal values in all"))
        return found[0]


@functools.partial(jax.jit, static_argnames="steps")
def _merge_slice(steps: Steps, experts: list[Array], base: Array | None,
                 numbers: Numbers) -> tuple[Array, Array]:
    """Merges a slice f[n] of E experts; returns it, and bool[], whether all values are finite.

    A sum is not finite if one of its terms is not; if a method drops elements, each input is checked as well.
    """
    merged = compose.combine(steps, experts, base, numbers)
    looked_at = [merged]
    if method_table.get_method(steps.method).sparsify is not None:
        looked_at += experts if base is None else [*experts, base]
    return merged, jnp.all(jnp.stack([jnp.all(jnp.isfinite(values)) for values in looked_at]))


def _mask(method: str, delta: np.ndarray, numbers: Numbers, number: int, start: np.uint32) -> np.ndarray:
    """Mask bool[n] of the elements of one expert's task vector f32[n] that are kept."""
    own = slice(number, number + 1)
    keys, density = (None if each is None else each[own] for each in (numbers.keys, numbers.density))
    numbers = Numbers(numbers.weights[own], cuts=numbers.cuts[own], keys=keys, density=density, start=start)
    padded = np.zeros(_padded(delta.size, _BLOCK), np.float32)
    padded[:delta.size] = delta
    return np.asarray(_mask_padded(method, padded, numbers))[:delta.size]


@functools.partial(jax.jit, static_argnames="method")
def _mask_padded(method: str, delta: Array, numbers: Numbers) -> Array:
    """Mask bool[n] of a padded task vector f32[n]; `numbers` describe this expert alone, as expert 0."""
    return compose.mask(method_table.get_method(method), delta, numbers, 0)


def _padded(count: int, most: int) -> int:
    """Padded size of a slice, one of few sizes so that few programs are compiled."""
    size = _LEAST
    while size < min(count, most):
        size *= _STEP
    return size if size <= most else max(count, most)


def _copy_rows(whole: Sequence[np.ndarray], width: int, number: int, start: int, out: np.ndarray) -> None:
    out[...] = whole[number][start * width:start * width + out.size]


def widen(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Converts values [n] to f32[n]; bfloat16 by its bits, several times as fast as a cast.

    Args:
        values: [n], of any floating-point type.
        out: f32[n], the result's memory; None for new memory.
    """
    out = np.empty(values.shape, np.float32) if out is None else out
    if values.dtype == ml_dtypes.bfloat16:
        bits = out.view(np.uint32)
        bits[...] = values.view(np.uint16)
        bits <<= 16
    else:
        out[...] = values
    return out
