"""Laws that every merging method keeps, for every row of the table.

`weights` and numbers are drawn by hypothesis; the same draws come in every run. The merges go through
`stream.LeafMerge`, which compiles one program for all of these shapes; `stream_test` proves that the pure
functions of `compose` give the same.

Tolerances: a merged element is a sum of terms, rounded to float32 at every step, so it is exact up to 6
units in the last place (`merge_cases.EPSILON`) of the sum of its terms' sizes. Where signs cancel up to
rounding (`DECIDED`), the vote is rounding's.
"""

import dataclasses

import hypothesis
import merge_cases as cases
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from merge_cases import Case

from elm_jax.errors import InputError
from elm_jax.merging import stream
from elm_jax.merging.methods import method_table
from elm_jax.merging.methods.method_table import METHODS, Method
from elm_jax.merging.methods.parameter import Parameter

hypothesis.settings.register_profile(
    "merging", max_examples=14, derandomize=True, deadline=None, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("merging")

UNITS = 6.0
SHAPES = [(0,), (1,), (63,), (), (3, 0), (0, 5), (1, 1), (7, 5), (64,), (4, 3, 2), (300,)]
every_method = pytest.mark.parametrize("method", cases.ALL)
on_base = pytest.mark.parametrize("method", cases.WITH_BASE)
sparse = pytest.mark.parametrize("method", cases.SPARSE)


def normal(rng, shape, count):
    base = rng.normal(size=shape)
    return base, [base + 0.25 * rng.normal(size=shape) for _ in range(count)]


def unrelated(rng, shape, count):
    return rng.normal(size=shape), [rng.normal(size=shape) for _ in range(count)]


def on_a_grid(rng, shape, count):
    """Eighths, of which sums are exact, and many of one magnitude."""
    base = rng.integers(-16, 17, size=shape) / 8
    return base, [base + rng.integers(-3, 4, size=shape) / 8 for _ in range(count)]


def one_magnitude(rng, shape, count):
    return np.zeros(shape), [rng.choice([-0.5, 0.5], size=shape) for _ in range(count)]


def mostly_zero(rng, shape, count):
    return np.zeros(shape), [rng.normal(size=shape) * (rng.random(shape) < 0.1) for _ in range(count)]


def all_zero(rng, shape, count):
    return np.zeros(shape), [np.zeros(shape) for _ in range(count)]


def parallel(rng, shape, count):
    base = rng.normal(size=shape)
    return base, [base * (i + 1) for i in range(count)]


def opposite(rng, shape, count):
    base = rng.normal(size=shape)
    return np.zeros(shape), [base * (-1) ** i for i in range(count)]


def huge(rng, shape, count):
    return 1e30 * rng.normal(size=shape), [1e30 * rng.normal(size=shape) for _ in range(count)]


def tiny(rng, shape, count):
    return 1e-30 * rng.normal(size=shape), [1e-30 * rng.normal(size=shape) for _ in range(count)]


FLAVOURS = (normal, unrelated, on_a_grid, one_magnitude, mostly_zero, all_zero, parallel, opposite, huge,
            tiny)
SMOOTH = (normal, unrelated)
"""Without ties, so that no vote depends on rounding."""


def value_of(parameter: Parameter, count: int) -> st.SearchStrategy:
    """A value of a parameter, whichever it is; of one that each expert has, one each."""
    if parameter.kind == "bool":
        one = st.booleans()
    elif parameter.kind == "choice":
        one = st.sampled_from(parameter.choices)
    elif parameter.kind == "int":
        one = st.integers(max(parameter.low, -100), min(parameter.high, 100))
    else:
        low, high = max(parameter.low, -2.0), min(parameter.high, 2.0)
        one = st.integers(0, 40).map(lambda steps: low + (high - low) * steps / 40)
    return st.tuples(*[one] * count) if parameter.per_expert else one


def weights_of(row: Method, count: int, divided: bool) -> st.SearchStrategy:
    """Weights that the method takes; of those that are divided by their sum, none that nearly cancel."""
    one = st.integers(-8 if row.signed else 0, 12).map(lambda eighths: eighths / 8)
    found = st.lists(one, min_size=count, max_size=count)
    if not row.signed or divided:
        found = found.filter(lambda each: sum(each) > 0 and sum(each) >= 0.2 * sum(map(abs, each)))
    return found


@st.composite
def draws(draw, method: str, flavours=FLAVOURS, plain: bool = False,
          several: bool = False) -> Case:
    """A case of a method.

    Args:
        draw: hypothesis' own.
        method: its name.
        flavours: kinds of values.
        plain: leaves all parameters at their defaults.
        several: whether there are three experts, and not one alone.
    """
    row = METHODS[method]
    count = row.num_experts or draw(st.sampled_from([3] if several else [1, 3]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    dtype = np.dtype(draw(st.sampled_from(["float32", "bfloat16"])))
    flavour = draw(st.sampled_from(flavours))
    base, experts = flavour(rng, draw(st.sampled_from(SHAPES)), count)
    parameters = {} if plain else {each.name: draw(value_of(each, count)) for each in row.parameters
                                   if each.name not in ("t", "divisor")}
    if cases.has(method, "divisor") and parameters.get("normalize"):
        parameters["divisor"] = method_table.DIVISORS[seed % 2]  # of one that divides; it needs no draw
    divided = parameters.get("normalize", row.normalize)
    return Case(method, [np.asarray(x).astype(dtype) for x in experts],
                np.asarray(base).astype(dtype) if row.needs_base else None,
                draw(weights_of(row, count, divided)), parameters,
                [f"expert-{i}" for i in range(count)], "float32")


def exactly(found, expected):
    """Every bit, but that zero has two signs."""
    np.testing.assert_array_equal(np.asarray(found, np.float64), np.asarray(expected, np.float64))


def close(found, expected, case, units=UNITS, factor=1.0):
    """Within some units in the last place of all that is added up."""
    size = sum(abs(w) * np.abs(x.astype(np.float64)) for w, x in
               zip(np.maximum(np.abs(case.all_weights), 1), case.experts, strict=True))
    if case.base is not None:
        size = size + (1 + sum(map(abs, case.all_weights))) * np.abs(case.base.astype(np.float64))
    wrong = np.abs(np.asarray(found, np.float64) - expected) > units * factor * cases.EPSILON * size + 1e-44
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size}"


def test_the_published_methods_are_compared_with_their_papers():
    assert set(METHODS) >= set(cases.FROM_PAPERS)
    assert {"mean", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties",
            "slerp"} == set(cases.FROM_PAPERS)


@every_method
@hypothesis.given(data=st.data())
def test_every_method_equals_its_paper_in_float64(method, data):
    case = data.draw(draws(method))
    expected = cases.REFERENCE[method](case)
    if np.max(expected.size, initial=0) > 1e37:  # a density of 1e-9 makes values of 1e30 too large
        return
    cases.assert_within(cases.stream(case), expected, UNITS)


NEW_ROWS = [
    Method("agree", "those that agree", "y", "s", needs_base=True, normalize=True, consensus=True,
           parameters=(Parameter("scale", "float", 1.0, "factor"),)),
    Method("trim", "the largest changes", "y", "s", needs_base=True, sparsify="magnitude",
           parameters=(Parameter("density", "float", 0.3, "share", 0, 1, per_expert=True),)),
]


@pytest.mark.parametrize("row", NEW_ROWS, ids=[row.name for row in NEW_ROWS])
def test_a_new_method_is_a_row_and_no_more(row, monkeypatch):
    monkeypatch.setitem(METHODS, row.name, row)
    case = cases.random_case(row.name, (63,), weights=[0.5, 0.3, 0.4])
    for found in (cases.stream(case), cases.whole(case)):
        cases.assert_within(found, cases.by_steps(case), UNITS)


@every_method
@hypothesis.given(data=st.data())
def test_one_expert_comes_back(method, data):
    """Of a method of two experts, the same one twice."""
    case = data.draw(draws(method, plain=True))
    row = METHODS[method]
    count = row.num_experts or 1
    one = case.change(experts=[case.experts[0]] * count, weights=None, names=None)
    if row.needs_base:
        close(cases.stream(one), case.experts[0].astype(np.float64), one, units=1)
    elif count == 1:
        exactly(cases.stream(one), case.experts[0])
    else:
        close(cases.stream(one), case.experts[0].astype(np.float64), one, units=1)


@every_method
@hypothesis.given(data=st.data())
def test_a_weight_of_one_on_one_expert_gives_it_back(method, data):
    case = data.draw(draws(method, plain=True))
    number = data.draw(st.integers(0, len(case.experts) - 1))
    found = cases.stream(case.change(weights=cases.only(case, number)))
    if METHODS[method].needs_base:  # base + (expert - base), rounded twice
        chosen = dataclasses.replace(case, experts=[case.experts[number]], weights=[1.0])
        close(found, case.experts[number].astype(np.float64), chosen, units=1)
    else:
        exactly(found, case.experts[number])


@pytest.mark.parametrize("method", cases.DETERMINISTIC)
@hypothesis.given(data=st.data())
def test_equal_experts_give_the_expert(method, data):
    """With weights whose sum is one, or that are divided by their sum."""
    case = data.draw(draws(method, plain=True))
    weights = np.asarray(case.all_weights)
    hypothesis.assume(weights.sum() > 0.1)
    same = case.change(experts=[case.experts[0]] * len(case.experts), weights=list(weights / weights.sum()))
    if METHODS[method].consensus and (weights < 0).any():
        return  # an expert that is subtracted votes against the others
    close(cases.stream(same), case.experts[0].astype(np.float64), same)


@pytest.mark.parametrize("method", cases.DETERMINISTIC)
@pytest.mark.parametrize("count", [2, 4])
def test_the_default_merge_of_equal_experts_is_bit_for_bit_the_expert(method, count):
    """Sums of two and of four equal values, and their quotients, are exact."""
    case = cases.random_case(method, (63,), count=count)
    same = case.change(experts=[case.experts[0]] * len(case.experts))
    if METHODS[method].needs_base:
        close(cases.stream(same), case.experts[0].astype(np.float64), same, units=1)
    else:
        exactly(cases.stream(same), case.experts[0])


@every_method
@hypothesis.given(data=st.data())
def test_the_order_of_experts_does_not_matter(method, data):
    """Experts, weights, densities and names together."""
    case = data.draw(draws(method, SMOOTH, several=True))
    order = data.draw(st.sampled_from(cases.orders(case)))

    def turn(values):
        return [values[i] for i in order]

    row = METHODS[method]
    per_expert = {each.name: tuple(turn(case.parameters[each.name])) for each in row.parameters
                  if each.per_expert}
    turned = case.change(experts=turn(case.experts), weights=turn(case.weights), names=turn(case.names),
                         parameters={**case.parameters, **per_expert})
    expected = cases.REFERENCE[method](case)
    sides = [cases.stream(each) for each in (case, turned)]
    difference = cases.Expected(sides[0].astype(np.float64), expected.size, expected.doubtful)
    cases.assert_within(sides[1], difference, 2 * UNITS)


@on_base
@hypothesis.given(data=st.data())
def test_without_task_vectors_the_base_stays_bit_for_bit(method, data):
    case = data.draw(draws(method))
    exactly(cases.stream(case.change(experts=[case.base] * len(case.experts))), case.base)


@sparse
@hypothesis.given(data=st.data())
def test_a_density_of_zero_gives_the_base_bit_for_bit(method, data):
    case = data.draw(draws(method))
    none = {**case.parameters, "density": 0.0}
    exactly(cases.stream(case.change(parameters=none)), case.base)


@pytest.mark.parametrize("method", [name for name in cases.SPARSE if not METHODS[name].consensus])
@hypothesis.given(data=st.data())
def test_a_density_of_one_is_task_arithmetic_bit_for_bit(method, data):
    case = data.draw(draws(method, (normal, on_a_grid, mostly_zero)))
    whole = {**case.parameters, "density": 1.0}
    exactly(cases.stream(case.change(parameters=whole)),
            cases.stream(case.change(method="task_arithmetic", parameters=shared(case))))


def shared(case: Case) -> dict:
    """What methods on task vectors have in common."""
    return {"normalize": case.parameters.get("normalize", METHODS[case.method].normalize),
            "divisor": case.parameters.get("divisor", "sum"),
            "scale": case.parameters.get("scale", 1.0)}


@pytest.mark.parametrize("method", [name for name in cases.SPARSE if METHODS[name].consensus])
@hypothesis.given(data=st.data())
def test_a_density_of_one_is_the_plain_vote_bit_for_bit(method, data):
    """Whatever is dropped, and however the rest is rescaled: with all of it kept, the methods are one."""
    case = data.draw(draws(method, (normal, on_a_grid, mostly_zero)))
    found = cases.stream(case.change(parameters={**case.parameters, "density": 1.0}))
    for other in ("ties", "dare_ties"):
        exactly(found, cases.stream(case.change(method=other, parameters={
            **shared(case), "density": 1.0, "rescale": "none"})))


@pytest.mark.parametrize("method", [name for name in cases.WITH_BASE if cases.has(name, "scale")])
@hypothesis.given(data=st.data())
def test_the_scale_is_a_factor_of_the_merged_task_vector(method, data):
    case = data.draw(draws(method, SMOOTH))
    case = case.change(base=np.zeros_like(case.base))
    found = [cases.stream(case.change(parameters={**case.parameters, "scale": scale})).astype(np.float64)
             for scale in (1.0, -0.5, 3.0)]
    exactly(found[1], -0.5 * found[0])
    np.testing.assert_allclose(found[2], 3 * found[0], rtol=cases.EPSILON)


LINEAR = [name for name, row in METHODS.items() if not (row.consensus or row.spherical)
          and cases.has(name, "normalize")]


@pytest.mark.parametrize("method", LINEAR)
@hypothesis.given(data=st.data())
def test_without_normalisation_and_votes_a_merge_is_linear_in_the_weights(method, data):
    case = data.draw(draws(method, SMOOTH))
    count = len(case.experts)
    if case.base is not None:
        case = case.change(base=np.zeros_like(case.base))
    plain = {**case.parameters, "normalize": False, "divisor": "sum"}
    first, second = (data.draw(weights_of(METHODS[method], count, False)) for _ in range(2))
    together = [2 * a - 0.5 * b for a, b in zip(first, second, strict=True)]
    merged = [cases.stream(case.change(weights=weights, parameters=plain)).astype(np.float64)
              for weights in (first, second, together)]
    sizes = [cases.REFERENCE[method](case.change(weights=np.abs(weights).tolist(), parameters=plain)).size
             for weights in (first, second, together)]
    size = 2 * sizes[0] + 0.5 * sizes[1] + sizes[2]
    expected = cases.Expected(2 * merged[0] - 0.5 * merged[1], size, np.zeros(size.shape, bool))
    cases.assert_within(merged[2], expected, UNITS)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.normalize or row.spherical])
@hypothesis.given(data=st.data())
def test_normalised_weights_count_by_their_ratio(method, data):
    """A factor of a power of two changes no bit."""
    case = data.draw(draws(method))
    if not case.parameters.get("normalize", METHODS[method].normalize or METHODS[method].spherical):
        return
    try:
        found = cases.stream(case)
    except InputError:
        return
    exactly(cases.stream(case.change(weights=[4 * weight for weight in case.weights])), found)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (), (9, 7)])
def test_of_equal_magnitudes_the_first_are_kept(density, shape):
    """Exactly ``int(density * size)`` of them, one at least; a base of zero shows which."""
    signs = np.where(np.arange(np.prod(shape, dtype=int)) % 3 == 1, -1, 1)
    leaf = (0.5 * signs).reshape(shape).astype(np.float32)
    found = cases.stream(Case("ties", [leaf], np.zeros_like(leaf), None, {"density": density}))
    number = min(leaf.size, max(1, int(density * leaf.size))) if density else 0
    expected = np.where(np.arange(leaf.size) < number, leaf.reshape(-1), 0).reshape(shape)
    exactly(found, expected)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_special_vectors(t):
    """Parallel and antiparallel ones go straight, and those of which one has no direction."""
    leaf = np.random.default_rng(0).normal(size=63).astype(np.float32)
    zero = np.zeros_like(leaf)

    def slerp(first, second):
        return cases.stream(Case("slerp", [first, second], None, None, {"t": t})).astype(np.float64)

    np.testing.assert_allclose(slerp(leaf, 2 * leaf), (1 + t) * leaf, rtol=2e-7)
    np.testing.assert_allclose(slerp(leaf, -leaf), (1 - 2 * t) * leaf, rtol=2e-7)
    np.testing.assert_allclose(slerp(leaf, zero), (1 - t) * leaf, rtol=2e-7)
    np.testing.assert_allclose(slerp(zero, leaf), t * leaf, rtol=2e-7)
    exactly(slerp(zero, zero), zero)


@pytest.mark.parametrize("size", [1e-29, 1e-12, 1.0, 1e19, 1e37])
@pytest.mark.parametrize("how", [cases.stream, cases.whole], ids=["stream", "whole"])
def test_slerp_keeps_the_length_at_any_size(how, size):
    """At 60 degrees; squares of these values would leave float32."""
    first, second = np.zeros((2, 64), np.float32)
    first[3] = size
    second[[3, 60]] = size / 2, size * np.sqrt(0.75)
    middle = how(Case("slerp", [first, second], None, [1.0, 1.0])).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(middle), size, rtol=1e-6)
    np.testing.assert_allclose(middle[[3, 60]], size * np.asarray([np.sqrt(0.75), 0.5]), rtol=1e-6)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("how", [cases.stream, cases.whole], ids=["stream", "whole"])
def test_the_ends_of_the_arc_are_the_experts_bit_for_bit(how, t):
    rng = np.random.default_rng(0)
    for _ in range(20):
        pair = [rng.normal(size=9).astype(np.float32) for _ in range(2)]
        exactly(how(Case("slerp", pair, None, None, {"t": t})), pair[int(t)])


BAD = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf}
WIDE = (40, 13)


def hidden(method: str) -> Case:
    """A case in which weights of zero and a density of zero hide all experts but the first."""
    case = cases.random_case(method, WIDE, weights=None)
    weights = cases.only(case, 0)
    density = {"density": (1.0, *(0.0,) * (len(case.experts) - 1))} if cases.has(method, "density") else {}
    return case.change(weights=weights, parameters=density, names=["first", "second", "third"][:len(weights)])


def owners(case: Case) -> dict[str, np.ndarray]:
    """Leaves that may hold what is not finite, by the name that an error gives their owner."""
    return {"first": case.experts[0], "second": case.experts[1],
            **({} if case.base is None else {"the base": case.base})}


def assert_refused(case: Case, where: str) -> None:
    with pytest.raises(InputError, match=rf"not finite\n  where: leaf {cases.LEAF} of {where}\n"):
        cases.stream(case)


@every_method
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_are_refused(method, bad, dtype, monkeypatch):
    """Wherever they are, and though a weight or a density of zero leaves them out: leaf and expert."""
    monkeypatch.setattr(stream, "MOST_ELEMENTS", 13 * 8)  # five slices
    case = hidden(method)
    case = case.change(experts=[x.astype(np.dtype(dtype)) for x in case.experts],
                       base=None if case.base is None else case.base.astype(np.dtype(dtype)))
    for where, leaf in owners(case).items():
        for place in (0, 250, 519):
            good = leaf.reshape(-1)[place]
            leaf.reshape(-1)[place] = BAD[bad]
            assert_refused(case, where)
            leaf.reshape(-1)[place] = good
    cases.stream(case)


@pytest.mark.parametrize("method", [name for name in cases.SPARSE if cases.has(name, "rescale")])
@pytest.mark.parametrize("rescale", method_table.RESCALES)
def test_not_finite_with_every_rescaling(method, rescale, monkeypatch):
    """A norm over a leaf with NaN is NaN in every slice; the error still names who has it."""
    monkeypatch.setattr(stream, "MOST_ELEMENTS", 13 * 8)
    case = hidden(method)
    case = case.change(parameters={"density": 0.5, "rescale": rescale})
    for where, leaf in owners(case).items():
        good = leaf[39, 12]
        leaf[39, 12] = np.nan
        assert_refused(case, where)
        leaf[39, 12] = good


@every_method
def test_a_result_that_leaves_its_type_is_refused(method):
    """70,000 is no float16; in float32 it is fine."""
    case = cases.random_case(method, (63,))
    case = case.change(experts=[np.full(63, 7e4, np.float32)] * len(case.experts))
    assert np.all(np.abs(cases.stream(case) - 7e4) < 1)
    with pytest.raises(InputError, match=rf"too large\n  where: leaf {cases.LEAF}\n(.|\n)*float16"):
        cases.stream(case.change(dtype="float16"))


@every_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_results_are_rounded_once(method, dtype):
    """A merge in bfloat16 is the merge in float32, rounded."""
    case = cases.random_case(method, (300,), dtype=dtype)
    wide = cases.stream(case.change(dtype="float32"))
    narrow = cases.stream(case)
    assert narrow.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(narrow.view(np.uint16), wide.astype(np.dtype(dtype)).view(np.uint16))


def test_float64_is_refused_and_never_narrowed_in_silence():
    case = Case("mean", [np.ones(3)] * 2)
    with pytest.raises(InputError, match="float64"):
        cases.stream(case)
    assert cases.stream(case.change(dtype="float32")).dtype == np.float32
    assert ml_dtypes.bfloat16  # known to numpy by this import
