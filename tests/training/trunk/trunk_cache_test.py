"""States that are kept give the losses, gradients and scores of networks that compute all layers."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
import trunk_rows as made

from elm_jax.data.arrays.batches import padded
from elm_jax.errors import InputError
from elm_jax.models.network import TRUNK_STATES, Layout, frozen_depth
from elm_jax.runtime import sharding, trees
from elm_jax.training.trunk import trunk_cache

every_family = pytest.mark.parametrize("name", list(made.CONFIGS))


@pytest.fixture
def computed(monkeypatch):
    """Numbers of rows that were computed, one a call."""
    sizes, real = [], trunk_cache._compiled

    def counted(network, params, batch):
        sizes.append(len(next(iter(batch.values()))))
        return real(network, params, batch)

    monkeypatch.setattr(trunk_cache, "_compiled", counted)
    return sizes


def loss_and_gradients(network, params, batch, key=None):
    overlay, frozen = trees.split(params, made.is_trained(network))

    def total(overlay):
        return network.loss(trees.merge(frozen, overlay), batch, key).total()

    return jax.jit(jax.value_and_grad(total))(overlay)


@functools.partial(jax.jit, static_argnums=0)
def loss(network, params, batch, key=None):
    return network.loss(params, batch, key).total()


def approx(value, rel=1e-6):
    return pytest.approx(float(value), rel=rel)


def check_equal(found, expected):
    assert float(found[0]) == approx(expected[0])
    ours, theirs = made.as_arrays(found[1]), made.as_arrays(expected[1])
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-5 * abs(theirs[path]).max())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_losses_and_gradients_are_those_of_all_layers(name, tmp_path, computed):
    """First computed, then read by another run, packed in other company."""
    network, params = made.network_and_params(name)
    packed = made.batches(network, True)[0]
    with made.cache_of(network, params, tmp_path) as cache:
        first = cache.with_states(packed)
    with made.cache_of(network, params, tmp_path) as cache:
        again = cache.with_states(packed)
        assert len(computed) == 1, "the second run finds all of them"
        assert np.array_equal(again[TRUNK_STATES], first[TRUNK_STATES])
        moved = {key: rows[::-1] for key, rows in packed.items()}
        assert np.array_equal(cache.with_states(moved)[TRUNK_STATES], first[TRUNK_STATES][::-1])
    whole = dataclasses.replace(network, trunk=0)
    check_equal(loss_and_gradients(network, params, again), loss_and_gradients(whole, params, packed))


def test_dropout_is_above_the_trunk_alone(tmp_path):
    """Its draws are the same, whether the trunk is computed or not; rows that are not packed, here."""
    network, params = made.network_and_params("t5", dropout_rate=0.3)
    plain = made.batches(network, False)[0]
    with made.cache_of(network, params, tmp_path) as cache:
        alone = cache.with_states(plain)
    assert float(loss(network, params, alone)) == approx(loss(network, params, plain))
    key = jax.random.key(5)
    dropped = float(loss(network, params, alone, key))
    assert dropped == approx(loss(network, params, plain, key))
    assert dropped != approx(loss(network, params, plain), rel=1e-3)


@every_family
def test_scores_are_those_of_all_layers(name, tmp_path, computed):
    network, params = made.network_and_params(name, "lora")
    batch = made.instances(network)
    score = jax.jit(lambda network, batch: network.target_log_probs(
        params, padded(batch, "inputs"), padded(batch, "choices")), static_argnums=0)
    expected = score(dataclasses.replace(network, trunk=0), batch)
    for _ in range(2):
        with made.cache_of(network, params, tmp_path) as cache:
            found = score(network, cache.with_scored_states(batch))
        np.testing.assert_allclose(found[:3], expected[:3], rtol=0, atol=1e-5)
    assert len(computed) == 1


def test_a_text_is_generated_from_kept_states_of_an_encoder(tmp_path):
    network, params = made.network_and_params("t5")
    batch = {name: rows for name, rows in made.instances(network).items() if name.startswith("input")}

    @functools.partial(jax.jit, static_argnums=0)
    def first_logits(network, batch):
        start = network.start(params, padded(batch, "inputs"), 4)
        return network.step(params, *start)[0]

    with made.cache_of(network, params, tmp_path) as cache:
        found = first_logits(network, cache.with_scored_states(batch))
    expected = first_logits(dataclasses.replace(network, trunk=0), batch)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=0, atol=1e-5)
    causal, params = made.network_and_params("llama")
    with made.cache_of(causal, params, tmp_path) as cache:
        assert cache.with_scored_states(batch) is batch, "each new token passes all layers"


def test_a_scan_of_layers_computes_the_same(tmp_path):
    network, params = made.network_and_params("llama")
    batch = made.batches(network, True)[0]
    scanned = dataclasses.replace(network, layout=Layout(scan_layers=True))
    expected = loss_and_gradients(network, params, batch)
    with made.cache_of(scanned, params, tmp_path) as cache:
        check_equal(loss_and_gradients(scanned, params, cache.with_states(batch)), expected)
    assert float(loss(scanned, params, batch)) == approx(expected[0])


def test_other_bases_layers_dtypes_and_rows_have_other_states(tmp_path, computed):
    network, params = made.network_and_params("llama")
    batch = made.batches(network, False)[0]
    folders = set()
    half = dataclasses.replace(network, config=dataclasses.replace(network.config, dtype="bfloat16"))
    for own, fingerprint in ((network, "sha256:1"), (network, "sha256:2"), (half, "sha256:1"),
                             (dataclasses.replace(network, trunk=2), "sha256:1")):
        with made.cache_of(own, params, tmp_path, fingerprint) as cache:
            states = cache.with_states(batch)[TRUNK_STATES]
            assert states.dtype == own.config.activation_dtype
            folders.add(str(cache.store.folder))
    assert len(folders) == len(computed) == 4
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][1, 0] += 1  # another rendering of one row: that row alone is computed
    with made.cache_of(network, params, tmp_path) as cache:
        cache.with_states(other)
    assert computed[4:] == [1]


def test_adapters_above_share_the_states(tmp_path, computed):
    batch = None
    for adapter in made.ADAPTERS:
        network, params = made.network_and_params("t5", adapter)
        batch = batch or made.batches(network, True)[0]
        with made.cache_of(network, params, tmp_path) as cache:
            cache.with_states(batch)
    assert len(computed) == 1


def test_a_mesh_computes_the_same_states(tmp_path):
    network, params = made.network_and_params("llama")
    batch = made.batches(network, True)[0]
    with made.cache_of(network, params, tmp_path / "one") as one:
        expected = one.with_states(batch)[TRUNK_STATES]
    with made.cache_of(network, params, tmp_path / "many", mesh=sharding.make_mesh(4, 2)) as many:
        found = many.with_states(batch)[TRUNK_STATES]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_full_cache_keeps_what_fits_and_says_so(tmp_path, computed, caplog):
    network, params = made.network_and_params("t5")
    batch = made.batches(network, False)[0]
    rows = network.trunk_rows(batch)
    expected = np.where(rows[1][..., None], jax.jit(network.trunk_states)(params, *rows), 0)
    with caplog.at_level(logging.WARNING), made.cache_of(network, params, tmp_path, most_bytes=2500) as cache:
        for _ in range(2):
            np.testing.assert_allclose(cache.with_states(batch)[TRUNK_STATES], expected, rtol=0, atol=1e-5)
    assert 0 < len(cache.store) < 3 and computed[1] < computed[0]
    assert sum("is full" in record.message for record in caplog.records) == 1
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 2500


def test_frozen_depth_is_that_of_the_lowest_trained_leaf():
    for name in made.CONFIGS:
        network, params = made.network_and_params(name)
        paths = list(trees.flatten(params))
        depths = {path: network.depth_of(path) for path in paths}
        assert frozen_depth(network, filter(made.is_trained(network), paths)) == made.DEPTH
        assert frozen_depth(network, []) == network.deepest_trunk and depths["token_embedder/embedding"] == 0
        states = jax.jit(network.trunk_states)
        rows = np.arange(5, 12, dtype=np.int32)[None], np.ones((1, 7), np.int32)
        changed = trees.unflatten({path: leaf + (depths[path] >= made.DEPTH) for path, leaf in
                                   trees.flatten(params).items()})
        assert np.array_equal(states(params, *rows), states(changed, *rows)), "none of them is in the trunk"


def test_without_frozen_layers_there_is_nothing_to_keep(tmp_path):
    network, params = made.network_and_params("t5")
    with pytest.raises(InputError, match="no frozen lower layers"):
        made.cache_of(dataclasses.replace(network, trunk=0), params, tmp_path)
    assert not list(tmp_path.iterdir())
