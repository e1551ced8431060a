"""Leaves to merge, sources in memory, and every method once more in plain float64."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from elm_jax.formats.model import TensorSpec
from elm_jax.merging.methods import compose, method_table
from elm_jax.merging.recipes.recipe import LeafRecipe
from elm_jax.merging.stream import LeafMerge

LEAF = "encoder/layers_0/mlp/wi/kernel"
EPSILON = 2.0**-23
"""Between 1 and the next float32."""
DECIDED = 2.0**-20
"""Of the terms' sum: a vote of less is one of rounding errors in float32."""
ALL = tuple(method_table.METHODS)
WITH_BASE = tuple(name for name, row in method_table.METHODS.items() if row.needs_base)
SPARSE = tuple(name for name, row in method_table.METHODS.items() if row.sparsify)
DETERMINISTIC = tuple(name for name, row in method_table.METHODS.items() if row.sparsify != "random")


class ArraySource:
    """A source of leaves that lie in memory."""

    def __init__(self, leaves: Mapping[str, np.ndarray]) -> None:
        self.leaves = dict(leaves)
        self.specs = {path: TensorSpec(leaf.shape, leaf.dtype.name) for path, leaf in leaves.items()}

    def fill(self, path: str, start: int, out: np.ndarray) -> None:
        leaf = self.leaves[path]
        first = start * math.prod(leaf.shape[1:])
        out[...] = leaf.reshape(-1)[first:first + out.size]


@dataclasses.dataclass(frozen=True)
class Case:
    """One leaf of several experts, and how it is merged."""

    method: str
    experts: Sequence[np.ndarray]
    base: np.ndarray | None = None
    weights: Sequence[float] | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Sequence[str] | None = None
    dtype: str | None = None
    leaf: str = LEAF

    @property
    def row(self) -> method_table.Method:
        return method_table.METHODS[self.method]

    @property
    def settings(self) -> dict[str, Any]:
        """Parameters with their defaults."""
        return self.row.settings(self.parameters, len(self.experts))

    @property
    def all_weights(self) -> list[float]:
        """Weights, the method's own where none are given."""
        return list(method_table.resolve_weights(self.row, self.weights, len(self.experts), self.settings))

    @property
    def all_names(self) -> list[str]:
        return list(self.names) if self.names else [str(i) for i in range(len(self.experts))]

    def change(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)


def stream(case: Case, workers: int = 1) -> np.ndarray:
    """Merged slice by slice, as `elm merge` does."""
    base = None if case.base is None else ArraySource({case.leaf: case.base})
    leaf = LeafMerge(case.leaf, LeafRecipe(case.method, case.weights, dict(case.parameters)),
                     [ArraySource({case.leaf: expert}) for expert in case.experts], base, case.all_names,
                     case.dtype)
    with ThreadPoolExecutor(workers) as pool:
        leaf.look(pool)
        parts = list(pool.map(lambda span: leaf.rows(*span).copy(), leaf.slices()))
    leaf.forget()
    return np.concatenate([np.empty(0, leaf.dtype), *parts]).reshape(leaf.shape)


def whole(case: Case) -> np.ndarray:
    """Merged in one piece, by the pure function."""
    base = None if case.base is None else {case.leaf: case.base}
    return np.asarray(compose.merge_params(
        case.method, [{case.leaf: expert} for expert in case.experts], case.weights, base,
        names=case.all_names, dtype=case.dtype, **case.parameters)[case.leaf])


def threefry(key: np.ndarray, low: np.ndarray) -> np.ndarray:
    """u32[2, N]: Threefry-2x32 of 20 rounds (Salmon et al. 2011) of the counters (0, low)."""
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))]
    with np.errstate(over="ignore"):
        x = [np.full(low.shape, keys[0], np.uint32), (low + keys[1]).astype(np.uint32)]
        for number in range(5):
            for rotation in rotations[number % 2]:
                x[0] = x[0] + x[1]
                x[1] = ((x[1] << np.uint32(rotation)) | (x[1] >> np.uint32(32 - rotation))) ^ x[0]
            x[0] = x[0] + keys[(number + 1) % 3]
            x[1] = x[1] + keys[(number + 2) % 3] + np.uint32(number + 1)
    return np.stack(x)


def masks(case: Case) -> list[np.ndarray]:
    """bool[E, ...]: what is kept at random: an element's draw is that of its place in the leaf.

    The key is that of the seed, of the leaf's name and of the expert's, one after another.
    """
    found = []
    for name, density in zip(case.all_names, case.settings["density"], strict=True):
        key = np.asarray([0, case.settings["seed"]], np.uint32)
        for word in (case.leaf, name):
            number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
            key = threefry(key, np.asarray([number], np.uint32))[:, 0]
        draws = threefry(key, np.arange(case.experts[0].size, dtype=np.uint32))[0] >> np.uint32(8)
        found.append((draws / 2**24 < np.float32(density)).reshape(case.experts[0].shape))
    return found


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a plain program finds.

    Attributes:
        values: f64.
        size: f64, the sum of the sizes of all terms, of which float32 rounds away a few `EPSILON`.
        doubtful: bool, elements whose signs' vote is one of rounding errors.
    """

    values: np.ndarray
    size: np.ndarray
    doubtful: np.ndarray


def setting(case: Case, name: str, default: Any) -> Any:
    """Of a method that does not take it, what it comes to."""
    return case.settings.get(name, default)


def weighted_mean(case: Case) -> Expected:
    """Wortsman et al. 2022, Model soups: the average, here with weights."""
    share = np.asarray(case.all_weights, np.float64)
    if case.settings.get("normalize", True):
        share = share / divided_by(case, share).sum()
    terms = [w * x.astype(np.float64) for w, x in zip(share, case.experts, strict=True)]
    return _expected(sum(terms), terms)


def divided_by(case: Case, weights: np.ndarray) -> np.ndarray:
    """What is summed for the divisor: the weights, or their sizes."""
    return np.abs(weights) if setting(case, "divisor", "sum") == "absolute" else weights


def task_vectors(case: Case) -> list[np.ndarray]:
    """In float32, as TIES ranks them, and then in float64."""
    return [(x.astype(np.float32) - case.base.astype(np.float32)).astype(np.float64) for x in case.experts]


def task_arithmetic(case: Case) -> Expected:
    """Ilharco et al. 2023, section 2: the base plus lambda times the sum of task vectors."""
    return _sum_of(case, task_vectors(case))


def ties(case: Case) -> Expected:
    """Yadav et al. 2023, algorithm 1: trim, elect the sign of the sum, mean of those that agree."""
    return _elected(case, trimmed_vectors(case))


def trimmed_vectors(case: Case) -> list[np.ndarray]:
    """The largest elements of each; of equal ones the first."""
    vectors = []
    for vector, density in zip(task_vectors(case), case.settings["density"], strict=True):
        kept = min(vector.size, max(1, int(density * vector.size))) if density > 0 else 0
        order = np.argsort(-np.abs(vector).reshape(-1), kind="stable")
        trimmed = np.zeros(vector.size)
        trimmed[order[:kept]] = vector.reshape(-1)[order[:kept]]
        vectors.append(_rescaled(case, vector, trimmed.reshape(vector.shape), kept / max(1, vector.size)))
    return vectors


def dare(case: Case) -> list[np.ndarray]:
    """Yu et al. 2024, section 3.2: drop at random, rescale by 1 / (1 - p)."""
    return [_rescaled(case, vector, vector * mask, density) for vector, mask, density
            in zip(task_vectors(case), masks(case), case.settings["density"], strict=True)]


def _rescaled(case: Case, before: np.ndarray, after: np.ndarray, density: float) -> np.ndarray:
    rescale = setting(case, "rescale", "none")
    if rescale == "density" and density > 0:
        return after / density
    if rescale == "l1" and density < 1:
        old, new = np.abs(before).sum(), np.abs(after).sum()
        return after if min(old, new) < 1e-7 else after * (old / new)
    return after


def _elected(case: Case, vectors: Sequence[np.ndarray]) -> Expected:
    weights = case.all_weights
    terms = [w * vector for w, vector in zip(weights, vectors, strict=True)]
    total, size = sum(terms), sum(np.abs(term) for term in terms)
    majority = np.where(total >= 0, 1.0, -1.0)
    merged, share = np.zeros(case.base.shape), np.zeros(case.base.shape)
    for w, term in zip(weights, terms, strict=True):
        agrees = np.sign(term) == majority
        merged, share = merged + np.where(agrees, term, 0), share + np.where(agrees, divided_by(case, w), 0)
    doubtful = (np.abs(total) <= DECIDED * size) & (size > 0)
    if setting(case, "normalize", case.row.normalize):
        share = np.where(share == 0, 1.0, share)
        merged, size = merged / share, size / np.abs(share)
    base, scale = case.base.astype(np.float64), setting(case, "scale", 1.0)
    return Expected(base + scale * merged, np.abs(base) + abs(scale) * size, doubtful)


def _sum_of(case: Case, vectors: Sequence[np.ndarray]) -> Expected:
    weights = np.asarray(case.all_weights, np.float64) * setting(case, "scale", 1.0)
    if setting(case, "normalize", case.row.normalize):
        weights = weights / divided_by(case, np.asarray(case.all_weights)).sum()
    terms = [w * vector for w, vector in zip(weights, vectors, strict=True)]
    base = case.base.astype(np.float64)
    return _expected(base + sum(terms), [base, *terms])


def slerp(case: Case) -> Expected:
    """Shoemake 1985: along the great circle; straight where the two are nearly parallel, as mergekit does."""
    first, second = (x.astype(np.float64) for x in case.experts)
    weights = np.asarray(case.all_weights, np.float64)
    t = weights[1] / weights.sum()
    norms = [np.sqrt(np.sum(x**2)) for x in (first, second)]
    cosine = np.sum(first * second) / np.prod(norms) if min(norms) > 1e-8 else 1.0
    if abs(cosine) > 0.9995:
        terms = [(1 - t) * first, t * second]
    else:
        angle = np.arccos(cosine)
        terms = [np.sin((1 - t) * angle) / np.sin(angle) * first, np.sin(t * angle) / np.sin(angle) * second]
    # The factors themselves are of float32, and its arc cosine is only so exact near the poles.
    return _expected(sum(terms), [40 * term for term in terms])


def _expected(values: np.ndarray, terms: Sequence[np.ndarray]) -> Expected:
    size = sum(np.abs(term) for term in terms)
    return Expected(np.asarray(values, np.float64), size, np.zeros(size.shape, bool))


def by_steps(case: Case) -> Expected:
    """Any other row of the table, by its steps."""
    row = case.row
    if not row.needs_base:
        return weighted_mean(case)
    vectors = {None: task_vectors, "magnitude": trimmed_vectors, "random": dare}[row.sparsify](case)
    return _elected(case, vectors) if row.consensus else _sum_of(case, vectors)


FROM_PAPERS = {
    "mean": weighted_mean, "linear": weighted_mean, "task_arithmetic": task_arithmetic, "ties": ties,
    "dare_linear": lambda case: _sum_of(case, dare(case)),
    "dare_ties": lambda case: _elected(case, dare(case)), "slerp": slerp,
}
"""Methods in plain float64."""
REFERENCE = {name: FROM_PAPERS.get(name, by_steps) for name in method_table.METHODS}


def random_case(method: str, shape: tuple[int, ...], *, seed: int = 0, count: int = 3, dtype: str = "float32",
                distance: float = 0.25, **changes: Any) -> Case:
    """A base and experts beside it, normal; of slerp two experts."""
    row = method_table.METHODS[method]
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape)
    experts = [np.asarray(base + distance * rng.normal(size=shape)).astype(np.dtype(dtype))
               for _ in range(row.num_experts or count)]
    return Case(method, experts, np.asarray(base).astype(np.dtype(dtype)) if row.needs_base else None,
                **changes)


def only(case: Case, number: int) -> list[float]:
    """Weights of one on one expert, zero on the others."""
    return [float(i == number) for i in range(len(case.experts))]


def orders(case: Case) -> list[tuple[int, ...]]:
    """All orders of the experts but theirs."""
    return list(itertools.permutations(range(len(case.experts))))[1:]


def has(case_or_method: Case | str, parameter: str) -> bool:
    """Whether a method takes a parameter."""
    method = case_or_method if isinstance(case_or_method, str) else case_or_method.method
    return any(each.name == parameter for each in method_table.METHODS[method].parameters)


def assert_within(found: np.ndarray, expected: Expected, units: float, output: float = 2.0**-24) -> None:
    """Every element within some `EPSILON` of the sum of its terms' sizes, and half a unit of the output."""
    wide = np.asarray(found).astype(np.float64)
    error = np.abs(wide - expected.values) - output * np.abs(expected.values)
    limit = units * EPSILON * expected.size + 1e-44
    wrong = (error > limit) & ~expected.doubtful
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} differ, by up to {np.max(error / limit) * units:.2f} units")
