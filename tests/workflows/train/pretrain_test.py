"""Pretraining at the size of gin/models/tiny.gin, on passages."""

import json

import numpy as np
import pytest

from elm_jax.cli import gin_config
from elm_jax.workflows.train.pretrain import pretrain


def losses(folder, dtype: str) -> np.ndarray:
    """Of 200 steps by the shipped gin files. AdamW at a small rate: a loss that no rounding can toss."""
    gin_config.parse(["gin/runs/pretrain.gin"], [
        f"MODEL_DIR='{folder / dtype}'", f"pretrain.dtype='{dtype}'", "VOCAB_SIZE=1664",
        "PASSAGES=('elm_jax.tasks.embedded:passages',)", "pretrain.vocab_pieces=1500",
        "pretrain.character_coverage=1.0", "TRAIN_STEPS=200", "BATCH_SIZE=8",
        "TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 64}", "pretrain.chunk_length=64",
        "OptimizerConfig.name='adamw'", "LEARNING_RATE=1e-3", "OptimizerConfig.schedule='constant'",
        "pretrain.log_period=1", "pretrain.tensorboard=False"])
    pretrain(gin_config.build("pretrain"))
    rows = (folder / dtype / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(row)["loss"] for row in rows])


@pytest.mark.slow
def test_bfloat16_activations_of_the_tiny_model_end_within_two_percent(tmp_path):
    wide, narrow = (losses(tmp_path, dtype) for dtype in ("float32", "bfloat16"))
    assert len(narrow) == 200 and np.isfinite(narrow).all()
    assert wide[-20:].mean() < 0.6 * wide[0]  # it learned: a flat loss would agree too
    np.testing.assert_allclose(narrow[-20:].mean(), wide[-20:].mean(), rtol=0.02)
    assert (narrow != wide).any()  # the setting reached the network
