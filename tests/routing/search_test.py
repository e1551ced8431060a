"""Search over keys: NumPy and JAX against plain float64 loops, and what may not change a result."""

import dataclasses

import jax
import numpy as np
import pytest

from elm_jax.routing.search import BEST, TIE, best_jax, nearest_key, winners_of
from tests.routing.index_test import make_index, unit_rows

BACKENDS = sorted(BEST)


def plain_best(queries: np.ndarray, index) -> np.ndarray:
    """Best similarities by loops, in float64."""
    best = np.full((len(queries), len(index.experts)), -np.inf)
    for row, query in enumerate(queries.astype(np.float64)):
        for key, owner in zip(index.keys.astype(np.float64), index.owners, strict=True):
            best[row, owner] = max(best[row, owner], sum(a * b for a, b in zip(query, key, strict=True)))
    return best


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [3, 16, 1000])
def test_best_of_each_expert_equals_plain_loops_in_any_order_of_the_keys(backend, chunk):
    rng = np.random.default_rng(3)
    counts = (4, 1, 9, 9, 2, 17, 30)  # more than four numbers: some are filled up
    index = make_index({f"e{n}": unit_rows(rng, count) for n, count in enumerate(counts)})
    order = rng.permutation(len(index))
    mixed = dataclasses.replace(index, keys=index.keys[order], owners=index.owners[order])
    queries = unit_rows(rng, 6)
    for each in (index, mixed):
        found = BEST[backend](queries, each, chunk=chunk)
        np.testing.assert_allclose(found, plain_best(queries, index), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_oldest_expert_wherever_copies_stand(backend, monkeypatch):
    rng = np.random.default_rng(1)
    different = unit_rows(rng, 30, 384)
    copies = rng.permutation(np.repeat(np.arange(30), 5))
    index = make_index({f"e{n}": different[copy][None] for n, copy in enumerate(copies)})
    queries = unit_rows(rng, 40, 384)
    nearest = (queries.astype(np.float64) @ different.T.astype(np.float64)).argmax(axis=1)
    expected = [int(np.flatnonzero(copies == winner)[0]) for winner in nearest]
    for chunk in (11, 64, 150):
        assert winners_of(BEST[backend](queries, index, chunk=chunk)).tolist() == expected
    assert len(jax.local_devices()) == 8
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert winners_of(BEST[backend](queries, index, chunk=50)).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_similarities_below_zero(backend):
    """A padding key of zeros would be nearer than any true one."""
    key = np.eye(4, dtype=np.float32)[:1]
    index = make_index({"a": np.repeat(-key, 3, axis=0), "b": np.repeat(-key, 5, axis=0)})
    assert BEST[backend](key, index, chunk=2).tolist() == [[-1, -1]]


@pytest.mark.parametrize("difference, expected", [(3e-6, 0), (3e-5, 1)])
def test_what_differs_by_rounding_alone_is_a_tie(difference, expected):
    """The later key is nearer by 3e-6, below `TIE`, or by 3e-5, above it."""
    cosines = np.array([0.5, 0.5 + difference])
    keys = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)
    query = np.array([[1, 0]], np.float32)
    for backend in BACKENDS:
        index = make_index({"a": keys[:1], "b": keys[1:]})
        assert winners_of(BEST[backend](query, index)).tolist() == [expected]
    assert nearest_key(query[0], make_index({"z": keys[::-1] * -1, "a": keys}), 1) == 2 + expected
    assert 3e-6 < TIE < 3e-5


def test_keys_on_the_device_follow_their_index():
    rng = np.random.default_rng(5)
    parts = {name: unit_rows(rng, 3) for name in "ab"}
    queries, one = unit_rows(rng, 4), make_index(parts)
    both = {len(best_jax(queries, index)[0]) for index in (one, one.add("c", unit_rows(rng, 3)), one)}
    assert both == {2, 3}
