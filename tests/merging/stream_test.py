"""A leaf merged slice by slice is bit for bit the leaf merged at once; cuts and random masks.

Of any slices, threads and reads the result is the same bit for bit, and that of the pure functions (eager,
jitted, over stacked leaves) within `ROUNDED` units in the last place of all that is added up: a compiler may
multiply settings with each other first, or multiply and add in one step. Where numbers of the whole leaf are
sums of floats in another order (slerp's angle, the L1 norm), it is within `SUMMED` units.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import hypothesis
import jax
import jax.numpy as jnp
import merge_cases as cases
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st
from merge_cases import Case

from elm_jax.errors import InputError
from elm_jax.formats.model import TensorSpec
from elm_jax.formats.tensors.streaming import ArrayTensors
from elm_jax.merging import stream
from elm_jax.merging.methods import compose, sparsify, threshold
from elm_jax.merging.methods.method_table import METHODS
from elm_jax.merging.recipes.recipe import LeafRecipe
from elm_jax.workflows.merge.merge_inputs import TensorsSource

ROUNDED, SUMMED = 3.0, 5.0
every_method = pytest.mark.parametrize("method", cases.ALL)
SETTINGS = {
    "plain": {"density": 0.3},
    "l1": {"density": 0.3, "rescale": "l1", "normalize": True, "scale": 0.7},
    "divided": {"density": 0.3, "rescale": "density", "normalize": True, "scale": 0.7},
}
WEIGHTS = (0.7, 0.2, 0.4)
SLICINGS = {
    "rows": {"MOST_ELEMENTS": 1},
    "by_bytes": {"SLICE_BYTES": 5000, "_LEAST": 64},
    "read_twice": {"CACHE_BYTES": 0, "MOST_ELEMENTS": 400, "SLICE_BYTES": 4000},
}


def make(method: str, shape: tuple[int, ...], settings: str = "plain", dtype: str = "bfloat16") -> Case:
    case = cases.random_case(method, shape, dtype=dtype)
    kept = {name: value for name, value in SETTINGS[settings].items() if cases.has(method, name)}
    return case.change(weights=WEIGHTS[:len(case.experts)], parameters=kept, dtype="float32")


def same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(*(np.atleast_1d(each).view(np.uint32) for each in (found, expected)))


def same_slices(found, expected):
    """To the bit as users' programs are compiled; the tests' compiler rounds a slice's end differently."""
    if "--xla_cpu_use_fusion_emitters=false" not in os.environ["XLA_FLAGS"].split():
        return same_bits(found, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def use(monkeypatch, **sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(stream, name, value)


@every_method
@pytest.mark.parametrize("settings", ["plain", "l1"])
def test_the_slices_make_no_difference(method, settings, monkeypatch):
    """Of bytes, of elements, read once or twice, with one worker or three."""
    case = make(method, (67, 29), settings)
    expected = cases.stream(case)
    for sizes in SLICINGS.values():
        with monkeypatch.context() as patch:
            use(patch, **sizes)
            same_slices(cases.stream(case, workers=3), expected)
    same_slices(cases.stream(case, workers=3), expected)


@every_method
def test_slices_of_any_shape(method, monkeypatch):
    """Rows that are wider than a slice, leaves of one dimension, scalars, nothing at all."""
    for shape in [(), (1,), (63,), (5000,), (1, 3000), (3, 2500), (4, 0), (0, 4), (2, 3, 5)]:
        case = make(method, shape)
        expected = cases.stream(case)
        with monkeypatch.context() as patch:
            use(patch, MOST_ELEMENTS=1000, SLICE_BYTES=9000, CACHE_BYTES=100)
            same_bits(cases.stream(case, workers=3), expected)


@every_method
def test_blocks_of_the_first_look_make_no_difference_but_to_slerp(method, monkeypatch):
    case = make(method, (67, 29), "l1")
    expected = cases.stream(case)
    use(monkeypatch, _BLOCK=100, CACHE_BYTES=0)
    found = cases.stream(case, workers=3)
    if METHODS[method].spherical:
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * cases.EPSILON * np.abs(expected).max())
    else:
        same_bits(found, expected)


def test_slices_hold_whole_rows_and_no_more_than_they_may(monkeypatch):
    use(monkeypatch, MOST_ELEMENTS=300, SLICE_BYTES=4000)
    leaf = stream.LeafMerge("x", recipe_of("ties"), *sources_of(make("ties", (100, 29))))
    spans = leaf.slices()
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == 100
    assert max(stop - start for start, stop in spans) == min(300 // 29, 4000 // (29 * 2 * 4))


class Zeros:
    """A source of one leaf of more than 2^32 elements."""

    specs: ClassVar = {"huge": TensorSpec((3, 1 << 20, 1 << 11), "float32")}

    def fill(self, path, start, out):
        out[...] = 0


def test_leaves_of_more_than_two_to_the_32_elements():
    """Their places have no numbers of 32 bits, which only methods that drop elements need."""
    with pytest.raises(InputError, match="leaf huge"):
        stream.LeafMerge("huge", recipe_of("ties"), [Zeros()] * 2, Zeros(), ["a", "b"])
    leaf = stream.LeafMerge("huge", recipe_of("mean"), [Zeros()] * 2, None, ["a", "b"])
    with ThreadPoolExecutor(1) as pool:
        leaf.look(pool)
    start, stop = leaf.slices()[-1]
    assert stop == 3 << 20 and stop - start <= stream.MOST_ELEMENTS >> 11
    assert not leaf.rows(start, stop).any()


class CountingTensors(ArrayTensors):
    """Counts the elements that are read."""

    size = 0

    def read(self, path, index=None):
        found = super().read(path, index)
        self.size += found.size
        return found


@pytest.mark.parametrize("shape", [(4000,), (100, 40), (7, 30, 20), (2, 3, 50, 10), (2, 2, 2, 700)])
@pytest.mark.parametrize("band", [1, 300, 4400, 1 << 20])
def test_bands_give_what_is_asked_for_and_are_read_once(shape, band, monkeypatch):
    monkeypatch.setattr(TensorsSource, "BAND_BYTES", band)
    values = np.arange(math.prod(shape), dtype=np.float32)
    tensors = CountingTensors({"x": values.reshape(shape), "y": -values.reshape(shape)})
    source, (num_rows, width) = TensorsSource(tensors), stream.as_rows(shape)
    for path, sign in (("x", 1), ("y", -1)):
        for start in range(0, num_rows, 9):
            out = np.empty((min(num_rows, start + 9) - start) * width, np.float32)
            source.fill(path, start, out)
            np.testing.assert_array_equal(out, sign * values[start * width:][:out.size])
    assert tensors.size == 2 * values.size


def recipe_of(method, **parameters):
    return LeafRecipe(method, None, parameters)


def sources_of(case):
    base = None if case.base is None else cases.ArraySource({"x": case.base})
    return [cases.ArraySource({"x": expert}) for expert in case.experts], base, case.all_names


class Counting(cases.ArraySource):
    """Counts the elements that are read."""

    def __init__(self, leaves):
        super().__init__(leaves)
        self.read = 0

    def fill(self, path, start, out):
        self.read += out.size
        super().fill(path, start, out)


@every_method
@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_as_much_is_read_as_the_plan_says(method, cache, monkeypatch):
    """Once where the leaf is small, or nothing has to be known of all of it."""
    use(monkeypatch, CACHE_BYTES=cache, MOST_ELEMENTS=500)
    case = make(method, (67, 29))
    sources = [Counting({"x": x}) for x in [*case.experts, *([] if case.base is None else [case.base])]]
    base = sources[-1] if case.base is not None else None
    leaf = stream.LeafMerge("x", recipe_of(method, **case.parameters), sources[:len(case.experts)], base,
                            case.all_names)
    with ThreadPoolExecutor(2) as pool:
        leaf.look(pool)
        for span in leaf.slices():
            leaf.rows(*span)
    read = sum(source.read * 2 for source in sources)
    once = sum(source.leaves["x"].nbytes for source in sources)
    assert once <= read <= leaf.bytes_read <= (once if cache else 5 * once)


def jitted(case: Case, traced: bool = True) -> np.ndarray:
    """Under jit, with weights that the program is given, or knows when it is compiled."""
    keys = compose.leaf_keys(case.settings["seed"], case.leaf, case.all_names) if random(case) else None

    @jax.jit
    def merge(experts, weights, base, keys):
        return compose.merge_leaf(case.method, experts, weights if traced else case.weights, base, keys=keys,
                                  dtype=case.dtype, **case.parameters)

    weights = jnp.asarray(case.all_weights, jnp.float32)
    return np.asarray(merge(list(case.experts), weights, case.base, keys))


def random(case: Case) -> bool:
    return METHODS[case.method].sparsify == "random"


def over_leaves(case: Case, names: list[str]) -> np.ndarray:
    """The same merge of several leaves of one shape, as one batch."""
    count = len(names)
    keys = (jnp.stack([compose.leaf_keys(case.settings["seed"], name, case.all_names) for name in names])
            if random(case) else None)
    merge = functools.partial(compose.merge_leaf, case.method, weights=case.weights, dtype=case.dtype,
                              **case.parameters)
    batched = jax.vmap(lambda experts, base, keys: merge(experts, base=base, keys=keys))
    experts = jnp.stack([jnp.roll(jnp.stack(case.experts), step, axis=1) for step in range(count)])
    base = None if case.base is None else jnp.stack([case.base] * count)
    return np.asarray(batched(experts, base, keys))


def rolled(case: Case, step: int, name: str) -> Case:
    return case.change(experts=[np.roll(x, step, axis=0) for x in case.experts], leaf=name)


def agree(found, expected, case: Case):
    """Within some units in the last place of all that is added up."""
    spherical = METHODS[case.method].spherical
    summed = spherical or (case.parameters.get("rescale") == "l1")
    size = cases.REFERENCE[case.method](case).size / (40 if spherical else 1)
    error = np.max(np.abs(found - expected) / (cases.EPSILON * size))
    assert error <= (SUMMED if summed else ROUNDED)


@every_method
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_pure_function_gives_the_same_under_jit(method, settings):
    case = make(method, (67, 29), settings)
    agree(jitted(case), cases.stream(case), case)


@every_method
def test_the_pure_function_with_constant_weights_gives_the_same_under_jit(method):
    case = make(method, (67, 29), "divided")
    agree(jitted(case, traced=False), cases.stream(case), case)


@every_method
def test_the_pure_function_gives_the_same_eagerly(method):
    """Operation by operation, where nothing is fused."""
    case = make(method, (67, 29), "divided")
    agree(cases.whole(case), cases.stream(case), case)


@every_method
def test_the_pure_function_gives_the_same_over_a_batch_of_leaves(method):
    case = make(method, (67, 29), "divided")
    names = ["first/leaf", "second/leaf", "third/leaf"]
    found = over_leaves(case, names)
    for step, name in enumerate(names):
        each = rolled(case, step, name)
        agree(found[step], cases.stream(each), each)


@every_method
def test_streaming_float16_equals_the_pure_function(method):
    case = make(method, (40, 7), "divided", dtype="float16")
    agree(jitted(case), cases.stream(case), case)


def test_a_leaf_that_the_base_lacks_counts_from_zero():
    """Adapters' leaves, in both forms."""
    case = make("ties", (12, 5))
    zero = case.change(base=np.zeros_like(case.base))
    lacking = stream.LeafMerge("x", recipe_of("ties", density=0.3), sources_of(case)[0],
                               cases.ArraySource({"other": case.base}), case.all_names, "float32")
    with ThreadPoolExecutor(2) as pool:
        lacking.look(pool)
        found = lacking.rows(0, 12).reshape(12, 5)
    same_bits(found, cases.stream(zero.change(weights=None)))
    pure = compose.merge_params("ties", [{"x": x} for x in case.experts], None, {"other": case.base},
                                density=0.3, dtype="float32")
    same_bits(np.asarray(pure["x"]), found)


# ---- where the largest elements end

FIND_CUT = jax.jit(sparsify.find_cut)


def by_sorting(values: np.ndarray, count: int) -> np.ndarray:
    """bool: the `count` largest magnitudes, of equal ones the first."""
    kept = np.zeros(values.size, bool)
    kept[np.argsort(-np.abs(values.reshape(-1)), kind="stable")[:count]] = True
    return kept.reshape(values.shape)


@hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 120), block=st.integers(1, 130),
                  flavour=st.sampled_from(["normal", "ties", "equal", "zero", "neighbours", "extreme"]))
def test_the_cut_is_that_of_a_stable_sort(seed, count, block, flavour):
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.normal(size=120),
        "ties": lambda: rng.integers(-3, 4, size=120) / 4,
        "equal": lambda: rng.choice([-1.0, 1.0], size=120),
        "zero": lambda: np.where(rng.random(120) < 0.5, 0.0, -0.0),
        "neighbours": lambda: 1 + rng.integers(0, 4, size=120) * 2.0**-23,
        "extreme": lambda: rng.choice([0.0, -1e-44, 1e-38, -1.0, 3e38], size=120),
    }[flavour]().astype(np.float32)

    other = rng.permutation(values)

    def blocks(number):
        start = number * block
        yield 0, start, values[start:start + block]
        yield 1, start, other[start:start + block]

    with ThreadPoolExecutor(3) as pool:
        streamed, beside = threshold.find_cuts(blocks, -(-120 // block), [count, 120 - count], 120, pool)
    expected = by_sorting(values, count)
    assert expected.sum() == count
    for cut in (FIND_CUT(values, count), streamed):
        np.testing.assert_array_equal(sparsify.keep_largest(values, cut), expected)
        np.testing.assert_array_equal(sparsify.keep_largest(values[90:], cut, 90), expected[90:])
    np.testing.assert_array_equal(sparsify.keep_largest(other, beside), by_sorting(other, 120 - count))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 5)])
@pytest.mark.parametrize("density", [0.0, 1e-6, 0.5, 1.0])
def test_cuts_of_any_shape(shape, density):
    values = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    count = sparsify.num_kept(density, values.size)
    found = sparsify.keep_largest(values, FIND_CUT(values, count))
    np.testing.assert_array_equal(found, by_sorting(values, count))


# ---- what is kept at random

SIZE = 40_000
ODDS = 1e-6
"""Of a correct program to fail one of these checks, were its draws others; they are always the same."""


def draw(density: float, seed: int = 0, leaf: str = "leaf", expert: str = "expert") -> np.ndarray:
    key = sparsify.random_key(seed, leaf, expert)
    return np.asarray(sparsify.keep_random(key, np.float32(density), (SIZE,)))


def is_share(kept: np.ndarray, share: float) -> bool:
    """Whether so many of them are a likely outcome of independent draws."""
    low, high = scipy.stats.binom.ppf([ODDS / 2, 1 - ODDS / 2], kept.size, share)
    return low <= kept.sum() <= high


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_the_share_that_is_kept_at_random(density):
    kept = draw(density)
    assert is_share(kept, density)
    for part in (*np.split(kept, 8), kept[::2], kept[1::2], kept[::64]):
        assert is_share(part, density)
    # Neighbours are independent: pairs of both kept are as many as chance has it.
    assert is_share(kept[:-1:2] & kept[1::2], density**2)


def test_the_ends_of_the_density():
    assert draw(1.0).all() and not draw(0.0).any()


def test_masks_differ_between_seeds_leaves_and_experts_and_are_independent():
    first = draw(0.3)
    np.testing.assert_array_equal(first, draw(0.3))
    for other in (draw(0.3, seed=1), draw(0.3, leaf="leaf2"), draw(0.3, expert="expert2"),
                  draw(0.3, leaf="expert", expert="leaf")):
        assert is_share(first & other, 0.09)


def test_a_higher_density_keeps_what_a_lower_one_keeps():
    assert np.all(draw(0.6)[draw(0.3)])


def test_masks_do_not_depend_on_the_slice():
    key, shape = sparsify.random_key(3, "leaf", "expert"), (50, 40)
    expected = np.asarray(sparsify.keep_random(key, np.float32(0.4), shape))
    for start, stop in [(0, 1), (7, 20), (49, 50)]:
        part = sparsify.keep_random(key, np.float32(0.4), (stop - start, 40), np.uint32(start * 40))
        np.testing.assert_array_equal(part, expected[start:stop])
    flat = sparsify.keep_random(key, np.float32(0.4), (2000,))
    np.testing.assert_array_equal(flat, expected.reshape(-1))


def test_masks_of_a_place_beyond_two_to_the_31():
    key, start = sparsify.random_key(0, "leaf"), 2**32 - 1000
    kept = np.asarray(sparsify.keep_random(key, np.float32(0.5), (1000,), np.uint32(start)))
    assert is_share(kept, 0.5)


def test_the_masks_are_always_the_same():
    """Threefry by hand: no version of JAX may change what a seed means."""
    case = Case("dare_linear", [np.ones((5, 7), np.float32)] * 3, np.zeros((5, 7), np.float32), [1, 1, 1],
                {"density": (0.2, 0.5, 0.9), "seed": 2**31 - 1}, ["a", "b", "a"])
    key = compose.leaf_keys(2**31 - 1, case.leaf, case.names)
    expected = cases.masks(case)
    for number in range(3):
        found = sparsify.keep_random(key[number], np.float32(case.parameters["density"][number]), (5, 7))
        np.testing.assert_array_equal(found, expected[number])
    assert not np.array_equal(expected[0], expected[1])
    numbers = compose.Numbers(jnp.ones(3), keys=key, density=jnp.asarray(case.parameters["density"]))
    for number in range(3):  # what streaming asks for
        np.testing.assert_array_equal(
            stream._mask("dare_linear", case.experts[0].reshape(-1), numbers, number, np.uint32(0)),
            expected[number].reshape(-1))
