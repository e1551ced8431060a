"""Cross-entropy sums against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.models.losses import LossConfig, token_cross_entropy


def reference(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, config: LossConfig):
    logits = logits.astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    wanted = np.full(logits.shape, config.label_smoothing / logits.shape[-1])
    wanted += (1 - config.label_smoothing) * np.eye(logits.shape[-1])[targets]
    loss = -(wanted * log_p).sum(-1) + config.z_loss * log_z**2
    return (loss * weights).sum(), weights.sum(), ((logits.argmax(-1) == targets) * weights).sum()


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(0.1), LossConfig(0.2, 1e-2)])
def test_sums_agree_with_float64(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 5)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (3, 5)).astype(np.float32)
    sums = token_cross_entropy(logits, targets, weights, config)
    found = [float(sums.loss), float(sums.weight), float(sums.correct)]
    np.testing.assert_allclose(found, reference(logits, targets, weights, config), rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.ones((4, 100, 8), jnp.bfloat16)
    sums = token_cross_entropy(
        logits, jnp.zeros((4, 100), jnp.int32), jnp.ones((4, 100)), LossConfig()
    )
    assert sums.loss.dtype == jnp.float32
    np.testing.assert_allclose(float(sums.loss), 400 * np.log(8), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"label_smoothing": "0.1"},
                                   {"z_loss": -1.0}])
def test_wrong_settings_are_input_errors(wrong):
    with pytest.raises(InputError, match=f"LossConfig.{next(iter(wrong))}"):
        LossConfig(**wrong)
