"""Merging leaves that are spread over a mesh: in place, with nothing but counts and sums between devices.

The result equals that of one device within `ROUNDED` units in the last place of all that is added up;
where numbers of the whole leaf are sums of floats (slerp's angle, the L1 norm), which devices take in
another order, within `SUMMED` units.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import merge_cases as cases
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elm_jax.merging.methods import compose
from elm_jax.merging.methods.method_table import METHODS
from elm_jax.planning import chips, hlo
from elm_jax.runtime import sharding

ROUNDED, SUMMED = 3.0, 6.0
MOST_BYTES = 64
"""Of what one collective carries: a count or a sum, or a few of them together."""
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
LEAVES = {
    "wi/kernel": ((16, 24), PartitionSpec("data", "model")),
    "wo/kernel": ((24, 16), PartitionSpec("model", "data")),
    "embedding": ((64, 3, 2), PartitionSpec(("data", "model"))),
    "scale": ((40,), PartitionSpec("model")),
    "scalar": ((), PartitionSpec()),
}
PARAMETERS = {"density": 0.4, "rescale": "l1", "normalize": True, "scale": 0.8, "seed": 3}
WEIGHTS = np.asarray([0.7, 0.4], np.float32)
NAMES = ["first", "second"]
every_method = pytest.mark.parametrize("method", cases.ALL)


def parameters(method: str) -> dict:
    return {name: value for name, value in PARAMETERS.items() if cases.has(method, name)}


@functools.cache
def leaf_case(method: str, path: str) -> cases.Case:
    seed = list(LEAVES).index(path)
    return cases.random_case(method, LEAVES[path][0], seed=seed, count=2, weights=WEIGHTS.tolist(), leaf=path,
                             parameters=parameters(method), names=NAMES)


def trees(method: str):
    """(experts, base), flat, as numpy arrays."""
    of = {path: leaf_case(method, path) for path in LEAVES}
    return [{path: of[path].experts[i] for path in LEAVES} for i in range(2)], (
        {path: of[path].base for path in LEAVES} if METHODS[method].needs_base else None)


def spread(tree, mesh):
    return None if tree is None else {
        path: jax.device_put(leaf, NamedSharding(mesh, LEAVES[path][1])) for path, leaf in tree.items()}


def merging(method: str):
    def merge(weights, experts, base):
        return compose.merge_params(method, experts, weights, base, names=NAMES, **parameters(method))

    return merge


def units(method: str) -> float:
    return SUMMED if METHODS[method].spherical or METHODS[method].sparsify else ROUNDED


def assert_only_counts_and_sums(compiled, devices: int = 8):
    found = hlo.collectives_of(compiled.as_text(), devices)
    assert {one.kind for one in found} <= {"all-reduce"}, hlo.by_kind(found)
    assert all(one.payload <= MOST_BYTES for one in found), sorted(one.payload for one in found)
    return found


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4)


@every_method
def test_a_sharded_merge_equals_that_of_one_device_and_moves_no_parameters(method, mesh):
    experts, base = trees(method)
    split = [spread(expert, mesh) for expert in experts], spread(base, mesh)
    compiled = jax.jit(merging(method)).lower(WEIGHTS, *split).compile()
    found = assert_only_counts_and_sums(compiled)
    looks = METHODS[method].spherical or METHODS[method].sparsify  # L1 norms are among the settings
    assert bool(found) == bool(looks)
    merged = compiled(WEIGHTS, *split)
    for path, leaf in merged.items():
        assert leaf.sharding.is_equivalent_to(split[0][0][path].sharding, leaf.ndim), path
        case = leaf_case(method, path)
        size = cases.REFERENCE[method](case).size / (40 if METHODS[method].spherical else 1)
        error = np.abs(np.asarray(leaf, np.float64) - cases.stream(case))
        assert np.all(error <= units(method) * cases.EPSILON * size), path


@pytest.mark.parametrize("method", [name for name in cases.SPARSE if METHODS[name].sparsify == "random"])
def test_what_is_kept_at_random_does_not_depend_on_the_mesh(method, mesh):
    """One element is in the mask or not: any difference would be as large as the element."""
    case = leaf_case(method, "wi/kernel")
    plain = case.change(base=np.zeros_like(case.base), parameters={"density": 0.4})

    @jax.jit
    def merge(experts, base):
        return compose.merge_params(method, experts, None, base, names=NAMES, density=0.4)

    split = [spread({"wi/kernel": x}, mesh) for x in case.experts], spread({"wi/kernel": plain.base}, mesh)
    merged = np.asarray(merge(*split)["wi/kernel"])
    np.testing.assert_array_equal(merged == 0, cases.stream(plain.change(weights=None)) == 0)


@pytest.mark.parametrize("axes", [("data", "model"), ("model", None), (("data", "model"), None)])
def test_the_cut_of_a_sharded_leaf_is_that_of_a_stable_sort(axes, mesh):
    """Ties too: the first ones of the leaf, on whichever device they lie."""
    rng = np.random.default_rng(0)
    base = np.zeros((16, 24), np.float32)
    experts = [(rng.integers(-3, 4, size=base.shape) / 4).astype(np.float32) for _ in range(2)]
    place = NamedSharding(mesh, PartitionSpec(*axes))
    for density in (0.0, 0.1, 0.55, 1.0):
        found = jax.jit(functools.partial(compose.merge_leaf, "ties", density=density))(
            [jax.device_put(x, place) for x in experts], base=jax.device_put(base, place))
        case = cases.Case("ties", experts, base, None, {"density": density})
        np.testing.assert_array_equal(np.asarray(found), cases.stream(case))


def numeric_gradient(method: str, path: str, factors: np.ndarray) -> np.ndarray:
    """Central differences of the plain float64 version."""
    case, step = leaf_case(method, path), 1e-6

    def value(weights):
        return np.sum(factors * cases.REFERENCE[method](case.change(weights=list(weights))).values)

    weights = WEIGHTS.astype(np.float64)
    return np.asarray([(value(weights + step * unit) - value(weights - step * unit)) / (2 * step)
                       for unit in np.eye(len(weights))])


@every_method
def test_the_gradient_in_the_weights_equals_finite_differences_on_a_mesh(method, mesh):
    """Within 2e-6 of the sum of its terms' sizes: a gradient is a sum over the leaf, in float32."""
    paths = ["wi/kernel", "scale"]
    rng = np.random.default_rng(1)
    factors = {path: rng.normal(size=LEAVES[path][0]).astype(np.float32) for path in paths}
    experts, base = trees(method)
    chosen = [{path: tree[path] for path in paths} for tree in experts]
    base = base and {path: base[path] for path in paths}

    def loss(weights, experts, base):
        merged = merging(method)(weights, experts, base)
        return sum(jnp.sum(factors[path] * merged[path]) for path in paths)

    split = [spread(tree, mesh) for tree in chosen], spread(base, mesh)
    compiled = jax.jit(jax.grad(loss)).lower(WEIGHTS, *split).compile()
    assert_only_counts_and_sums(compiled)
    found = np.asarray(compiled(WEIGHTS, *split))
    expected = sum(numeric_gradient(method, path, factors[path]) for path in paths)
    size = sum(np.sum(np.abs(factors[path] * leaf_case(method, path).experts[0])) for path in paths)
    np.testing.assert_allclose(found, expected, atol=2e-6 * size)
    assert np.all(np.abs(expected) > 2e-5 * size)


def test_the_gradient_of_slerp_lives_on_at_the_ends_and_for_parallel_experts():
    """The ends are the experts bit for bit, which must not make them constants."""
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        case = cases.random_case("slerp", (16,), seed=seed, distance=1.0)
        factors = np.random.default_rng(2).normal(size=16).astype(np.float32)

        def loss(t, case=case, factors=factors):
            merged = compose.merge_leaf("slerp", case.experts, jnp.stack([1 - t, t]))
            return jnp.sum(factors * merged)

        found = float(jax.grad(loss)(jnp.float32(number)))
        a, b = (x.astype(np.float64) for x in case.experts)
        angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
        slopes = ((-np.cos(angle) / np.sin(angle) * angle, angle / np.sin(angle)) if number == 0
                  else (-angle / np.sin(angle), np.cos(angle) / np.sin(angle) * angle))
        np.testing.assert_allclose(found, np.sum(factors * (slopes[0] * a + slopes[1] * b)), rtol=1e-4)
    leaf = np.arange(1.0, 5.0, dtype=np.float32)

    def between(t):
        return jnp.sum(compose.merge_leaf("slerp", [leaf, 2 * leaf], jnp.stack([1 - t, t])))

    np.testing.assert_allclose(float(jax.grad(between)(jnp.float32(0.3))), leaf.sum(), rtol=1e-6)


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: no compiler for TPUs")
@every_method
def test_a_tpus_program_moves_no_parameters_either(method):
    slice_mesh = sharding.make_mesh(2, 4, devices=chips.devices_of(chips.parse("v5e:2x4")))
    _, base = trees(method)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(slice_mesh, spec))
              for path, (shape, spec) in LEAVES.items()}
    weights = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(slice_mesh, PartitionSpec()))
    compiled = jax.jit(merging(method)).lower(weights, [shapes] * 2, base and shapes).compile()
    assert_only_counts_and_sums(compiled)
