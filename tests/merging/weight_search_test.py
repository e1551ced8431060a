"""The searches on objectives whose answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import InputError, RunError
from elm_jax.merging import weight_search
from elm_jax.runtime import sharding

DATA = jnp.asarray([0.7, 0.2, 0.1, 0.0])


@dataclasses.dataclass(frozen=True)
class Distance:
    """Squared distance of the weights from the data; not a number where they are above a limit."""

    limit: float = np.inf

    def __call__(self, weights, data):
        value = jnp.sum(jnp.square(weights - data))
        return jnp.where(jnp.max(weights) > self.limit, jnp.nan, value)


def run(kind, space="simplex", objective=None, seed=0, data=DATA, **changes):
    objective = objective or Distance()
    if kind == "gradient":
        return weight_search.by_gradient(objective, data, 4, space=space,
                                         **{"steps": 120, "learning_rate": 0.1, **changes})
    how = weight_search.Evolution(**{"steps": 25, "population": 32, "seed": seed, **changes})
    return weight_search.by_evolution(objective, data, 4, space=space, how=how)


@pytest.mark.parametrize("kind", ["gradient", "evolution"])
@pytest.mark.parametrize("space", weight_search.SPACES)
def test_the_nearest_weights_are_found(kind, space):
    found = run(kind, space)
    np.testing.assert_allclose(found.weights, DATA, atol=0.04)
    assert found.objective == min(found.history) <= found.start
    assert found.start == pytest.approx(float(Distance()(jnp.full(4, 0.25), DATA)))


@pytest.mark.parametrize("space", ["simplex", "plane"])
def test_weights_of_a_space_keep_its_rule(space):
    wanted = jnp.asarray([2.0, -1.0, 0.5, 0.5]) * 1.5  # of sum 3
    for kind in ("gradient", "evolution"):
        weights = np.asarray(run(kind, space, data=wanted).weights)
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        if space == "simplex":
            assert weights.min() >= 0
        else:
            np.testing.assert_allclose(weights, np.asarray(wanted) - 0.5, atol=0.15)  # the nearest of sum 1


@pytest.mark.parametrize("space", weight_search.SPACES)
def test_the_origin_means_equal_weights(space):
    np.testing.assert_allclose(weight_search.get_space(space)(jnp.zeros(5)), np.full(5, 0.2), rtol=1e-6)


@pytest.mark.parametrize("kind", ["gradient", "evolution"])
def test_equal_weights_are_kept_where_nothing_is_better(kind):
    found = run(kind, data=jnp.full(4, 0.25), steps=5)
    np.testing.assert_allclose(found.weights, np.full(4, 0.25), rtol=1e-6)
    assert found.objective == found.start == pytest.approx(0, abs=1e-12)


def test_one_seed_is_one_search_and_another_is_another():
    again, other = (run("evolution", seed=seed, steps=3) for seed in (0, 1))
    assert run("evolution", steps=3) == again != other
    assert run("gradient", steps=3) == run("gradient", steps=3)


def test_a_population_scores_as_each_does_alone():
    population = jax.random.normal(jax.random.key(0), (7, 4))
    alone = [float(Distance()(weights, DATA)) for weights in population]
    for at_once in (None, 1, 3, 7):
        np.testing.assert_allclose(
            weight_search.score_population(Distance(), population, DATA, at_once), alone, rtol=1e-6)


@pytest.mark.parametrize(("kind", "program"), [("gradient", weight_search._gradient_step),
                                               ("evolution", weight_search._generation)])
def test_all_steps_are_one_program_wherever_the_data_lie(kind, program):
    spread = jax.device_put(DATA, sharding.batch_sharding(sharding.make_mesh(4, 1)))
    run(kind, steps=1, data=spread)
    before = program._cache_size()
    run(kind, steps=4, data=2 * spread, seed=5)
    assert program._cache_size() == before


def test_what_is_not_finite_is_never_found_and_never_the_start():
    found = run("evolution", "free", Distance(limit=0.5))
    assert np.isfinite(found.objective) and max(found.weights) <= 0.5
    for kind in ("gradient", "evolution"):
        with pytest.raises(RunError, match="not finite"):
            run(kind, objective=Distance(limit=0.0))


def test_an_unknown_space_is_refused():
    with pytest.raises(InputError, match="nearest: simplex"):
        weight_search.get_space("simplx")
