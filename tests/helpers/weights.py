"""Random parameters of any network, drawn by numpy: to compile `init` takes longer than most tests."""

import functools

import numpy as np

from elm_jax.models.network import Network
from elm_jax.runtime import trees
from elm_jax.types import Params


@functools.cache
def _drawn(network: Network, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = generator.normal(0.0, 1.0, shape).astype(np.float32)
        if len(shape) < 2:  # a norm's scale, or a bias
            return np.float32(path.endswith("scale")) + np.float32(0.1) * values
        # A tied table of spread 1 would make most networks repeat their last token, whatever the input.
        spread = 0.3 if path.endswith("embedding") else float(np.prod(shape[:-1])) ** -0.5
        return np.float32(spread) * values

    return {path: draw(path, leaf.shape) for path, leaf in trees.flatten(network.abstract_params()).items()}


def drawn(network: Network, seed: int = 0) -> Params:
    """Parameters f32 of the network, none of them zero."""
    return trees.unflatten(dict(_drawn(network, seed)))
