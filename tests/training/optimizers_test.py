"""Adafactor and AdamW against float64 numpy, written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.training.optimizers import OptimizerConfig, learning_rate, make_optimizer

SHAPES = {"wide": (20, 40), "tall": (40, 20), "square": (24, 24), "small": (4, 40), "bias": (32,)}
STEPS = 6


def problem() -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    scale = {name: 10.0 ** rng.integers(-3, 2) for name in SHAPES}
    grads = [
        {name: scale[name] * rng.normal(size=shape) for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    return params, grads


def run_optax(config: OptimizerConfig, params: dict, grads: list[dict]) -> dict:
    optimizer = make_optimizer(config, STEPS)
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = jax.jit(optimizer.init)(tree)

    @jax.jit
    def step(grad: dict, state: tuple, tree: dict) -> tuple[dict, tuple]:
        updates, state = optimizer.update(grad, state, tree)
        return jax.tree.map(jnp.add, tree, updates), state

    for grad in grads:
        tree, state = step(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grad), state, tree)
    return tree


def clipped(grad: dict, limit: float | None) -> dict:
    norm = np.sqrt(sum((leaf**2).sum() for leaf in grad.values()))
    factor = 1.0 if limit is None else min(1.0, limit / norm)
    return {name: leaf * factor for name, leaf in grad.items()}


def rate(config: OptimizerConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warm
    done = max(step - config.warmup_steps, 0) / (STEPS - config.warmup_steps)
    return config.learning_rate * warm * (1 - done)


def numpy_adafactor(config: OptimizerConfig, params: dict, grads: list[dict]) -> dict:
    """arXiv 1804.04235, algorithms 4 and 5, without parameter scaling and relative step."""
    params = dict(params)
    rows, columns, whole = {}, {}, {}
    for step, grad in enumerate(grads):
        decay = 1 - (step + 1.0) ** -config.decay_exponent
        for name, leaf in clipped(grad, config.clip_norm).items():
            square = leaf**2 + 1e-30
            if leaf.ndim == 2 and min(leaf.shape) >= config.min_dim_size_to_factor:
                rows[name] = decay * rows.get(name, 0) + (1 - decay) * square.sum(1)
                columns[name] = decay * columns.get(name, 0) + (1 - decay) * square.sum(0)
                second = np.outer(rows[name], columns[name]) / rows[name].sum()
            else:
                second = whole[name] = decay * whole.get(name, 0) + (1 - decay) * square
            update = leaf / np.sqrt(second)
            if config.update_clip is not None:
                update /= max(1.0, np.sqrt((update**2).mean()) / config.update_clip)
            if config.parameter_scale:
                update = update * max(1e-3, np.sqrt((params[name] ** 2).mean()))
            if leaf.ndim > 1:
                update = update + config.weight_decay * params[name]
            params[name] = params[name] - rate(config, step) * update
    return params


def numpy_adamw(config: OptimizerConfig, params: dict, grads: list[dict]) -> dict:
    """arXiv 1711.05101, algorithm 2, decay on matrices only."""
    params = dict(params)
    first = dict.fromkeys(params, 0.0)
    second = dict(first)
    for step, grad in enumerate(grads):
        for name, leaf in clipped(grad, config.clip_norm).items():
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * leaf
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * leaf**2
            mean = first[name] / (1 - config.beta1 ** (step + 1))
            spread = second[name] / (1 - config.beta2 ** (step + 1))
            update = mean / (np.sqrt(spread) + config.epsilon)
            if leaf.ndim > 1:
                update = update + config.weight_decay * params[name]
            params[name] = params[name] - rate(config, step) * update
    return params


ADAFACTORS = [
    OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=16),
    OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=128),
    OptimizerConfig("adafactor", 3e-2, min_dim_size_to_factor=16, parameter_scale=True),
    OptimizerConfig("adafactor", 1e-2, min_dim_size_to_factor=16, update_clip=None, clip_norm=0.5,
                    weight_decay=0.1, schedule="linear_decay", warmup_steps=2),
]
ADAMWS = [
    OptimizerConfig("adamw", 1e-2),
    OptimizerConfig("adamw", 1e-2, clip_norm=0.5, weight_decay=0.1, schedule="linear_decay",
                    warmup_steps=2, beta1=0.8, beta2=0.95),
]


@pytest.mark.parametrize("config", ADAFACTORS + ADAMWS)
def test_agrees_with_float64_numpy(config):
    params, grads = problem()
    reference = numpy_adafactor if config.name == "adafactor" else numpy_adamw
    expected = reference(config, params, grads)
    found = run_optax(config, params, grads)
    for name in SHAPES:
        assert np.abs(expected[name] - params[name]).max() > 1e-2
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_factored_state_is_small():
    params = {"kernel": jnp.zeros((64, 48))}
    factored = make_optimizer(OptimizerConfig(min_dim_size_to_factor=16), 1).init(params)
    whole = make_optimizer(OptimizerConfig(min_dim_size_to_factor=128), 1).init(params)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state)) for state in (factored, whole)]
    assert sizes[0] < 64 + 48 + 10 < 64 * 48 <= sizes[1]


def test_linear_decay_ends_just_after_the_last_step():
    config = OptimizerConfig("adamw", 1.0, schedule="linear_decay", warmup_steps=2)
    rates = [float(learning_rate(config, step, 6)) for step in range(8)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0}, {"learning_rate": "1e-4"}, {"clip_norm": -1.0},
              {"beta1": 1.0}, {"warmup_steps": 1.5}, {"weight_decay": -0.1}, {"epsilon": True},
              {"learning_rate": float("nan")}, {"min_dim_size_to_factor": 0}],
)
def test_wrong_settings_are_input_errors(wrong):
    with pytest.raises(InputError, match=f"OptimizerConfig.{next(iter(wrong))}"):
        OptimizerConfig(**wrong)


def test_unknown_names_give_the_nearest():
    with pytest.raises(InputError, match=r"Unknown optimizer 'adamW2'[\s\S]*nearest: adamw"):
        OptimizerConfig("adamW2")
    with pytest.raises(InputError, match=r"Unknown schedule 'linear'[\s\S]*nearest: linear_decay"):
        OptimizerConfig(schedule="linear")
