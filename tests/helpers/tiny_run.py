"""A tiny real T5, a tiny stream, and a training run that a test can start, kill and start again.

As a script: ``python tiny_run.py MODEL_DIR TRAIN_STEPS`` trains in MODEL_DIR; exit status 3 says that
SIGTERM stopped it.
"""

import functools
import sys

import numpy as np
import t5_rows

from elm_jax.data.arrays.cursor import TrainStream
from elm_jax.models import AdapterConfig, T5Config, T5Network
from elm_jax.runtime import sharding, trees
from elm_jax.training.loop import FitResult, fit
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.run_settings import RunConfig
from elm_jax.types import Params

STOPPED = 3
LENGTHS = {"inputs": 16, "targets": 8}
ADAFACTOR = OptimizerConfig("adafactor", learning_rate=3e-3, min_dim_size_to_factor=16)
ADAMW = OptimizerConfig("adamw", learning_rate=3e-3, weight_decay=0.01, clip_norm=1.0)


class CopySource:
    """Targets are the first tokens of the inputs: learnable within a few hundred steps."""

    def __init__(self, size: int = 48, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        tokens = rng.integers(2, 60, rng.integers(3, 12)).astype(np.int32)
        end = np.array([1], np.int32)
        return np.concatenate([tokens, end]), np.concatenate([tokens[:3], end])


def network(*, dropout: float = 0.1, adapter: bool = True, dtype: str = "float32") -> T5Network:
    return T5Network(
        T5Config(
            vocab_size=64, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=1,
            num_decoder_layers=1, dropout_rate=dropout, dtype=dtype,
            adapter=AdapterConfig(8) if adapter else None,
        )
    )


@functools.cache
def parameters(net: T5Network) -> Params:
    """Random parameters, drawn by numpy: no test needs to compile `init`."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith(("scale", "bias")):
            return np.full(shape, path.endswith("scale"), np.float32)
        spread = 1.0 if path.endswith("embedding") else shape[0] ** -0.5
        return rng.normal(0.0, spread, shape).astype(np.float32)

    flat = trees.flatten(net.abstract_params())
    return trees.unflatten({path: draw(path, leaf.shape) for path, leaf in flat.items()})


def is_prompt_leaf(path: str) -> bool:
    """The overlay of a prompt expert: adapters and norms."""
    return "_adapter/" in path or path.endswith("scale")


def stream(*, pack: bool = True, batch_size: int = 8, size: int = 48, seed: int = 5) -> TrainStream:
    return TrainStream(
        CopySource(size), form=t5_rows.FORM, batch_size=batch_size, lengths=LENGTHS, seed=seed, pack=pack
    )


def train(model_dir: str | None, train_steps: int, **options) -> FitResult:
    """A prompt expert on one device; `options` are those of `RunConfig`, and network, base, stream, mesh."""
    net = options.pop("network", network())
    base = options.pop("base", None)
    base = parameters(net) if base is None else base
    overlay, _ = trees.split(base, is_prompt_leaf)
    source, mesh = options.pop("stream", None) or stream(), options.pop("mesh", sharding.make_mesh(1, 1))
    run = RunConfig(**{
        "train_steps": train_steps, "random_seed": 3, "model_dir": model_dir, "checkpoint_period": 7,
        "name": None, "optimizer": ADAFACTOR, **options})
    return fit(net, base, overlay, source, run, mesh)


if __name__ == "__main__":
    sys.exit(STOPPED if train(sys.argv[1], int(sys.argv[2])).stopped else 0)
