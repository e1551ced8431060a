"""Llama 3's scaling, found again in the factors that a GGUF file keeps of it."""

import gguf_files
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.models.decoder import gguf_names
from elm_jax.models.decoder.config import RopeScaling

LLAMA_3_2 = (64, 500000.0, 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(("size", "base", "factor", "low", "high", "length"), [
    LLAMA_3_2, (128, 500000.0, 8.0, 1.0, 4.0, 8192), (64, 500000.0, 32.0, 1.0, 4.0, 5000),
    (128, 10000.0, 16.0, 1.0, 8.0, 4096), (4, 500.0, 4.0, 1.0, 4.0, 16),
])
def test_scalings_are_found_in_transformers_factors(size, base, factor, low, high, length):
    factors = gguf_files.llama3_factors(size, {
        "rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": length})
    found = gguf_names.scaling_of(factors, size, base, None, "file")
    assert found == RopeScaling("llama3", factor, low, high, length)
    np.testing.assert_allclose(gguf_names.llama3_factors(found, size, base), factors, rtol=1e-5)


def test_factors_of_one_are_no_scaling():
    assert gguf_names.scaling_of(np.ones(32), 64, 1e4, None, "file") is None


@pytest.mark.parametrize("factors", [np.ones(31), np.linspace(1, 9, 32), np.full(32, np.nan), np.zeros(32),
                                     np.r_[np.ones(16), np.full(16, 0.5)]], ids=str)
def test_other_factors_are_refused(factors):
    with pytest.raises(InputError, match=r"no known scaling(?s:.*)rope_freqs(?s:.*)expected: 32 factors"):
        gguf_names.scaling_of(factors, 64, 10000.0, None, "file")
