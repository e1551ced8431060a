"""A tiny real T5 with weights drawn by numpy, and prepared splits of made-up rows."""

import functools
import pathlib
import tempfile

import numpy as np

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.models import AdapterConfig, T5Config, T5Network
from elm_jax.runtime import trees
from elm_jax.types import Params
from elm_jax.vocabularies.vocabulary import Vocabulary, train_vocabulary

VOCAB_SIZE = 64
WORDS = ("red", "green", "blue", "dog", "cat", "bird", "runs", "sleeps", "sings", "fast", "slow", "now")


def network(adapter: bool = True) -> T5Network:
    return T5Network(T5Config(
        vocab_size=VOCAB_SIZE, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64,
        num_encoder_layers=1, num_decoder_layers=1, adapter=AdapterConfig(8) if adapter else None))


@functools.cache
def parameters(net: T5Network, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith(("scale", "bias")):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        spread = 1.0 if "embedding" in path else shape[0] ** -0.5
        return rng.normal(0.0, spread, shape).astype(np.float32)

    leaves = trees.flatten(net.abstract_params())
    return trees.unflatten({path: draw(path, leaf.shape) for path, leaf in leaves.items()})


@functools.cache
def vocabulary() -> Vocabulary:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        return train_vocabulary([" ".join(rng.choice(WORDS, 6)) for _ in range(200)],
                                pathlib.Path(folder) / "tiny.model", 30, 0)


def tokens(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    """Random tokens that end with EOS, at least `low` and at most `high` of them."""
    count = int(rng.integers(low, high + 1))
    return np.append(rng.integers(2, VOCAB_SIZE, count - 1), 1).astype(np.int32)


def rank_rows(count: int = 30, seed: int = 0, longest_source: int = 40) -> list[dict]:
    """Rows of 3 to 8 choices of 2 to 12 tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        own = [tokens(rng, 2, int(rng.choice([3, 6, 12]))) for _ in range(rng.integers(3, 9))]
        label = int(rng.integers(len(own)))
        names = [f"choice {number}" for number in range(len(own))]
        rows.append({"inputs": tokens(rng, 2, longest_source), "targets": own[label], "choices": own,
                     "text": {"inputs": f"question {index}", "targets": names[label],
                              "choices": names, "index": 3 * index + 1}})
    return rows


def generation_rows(count: int = 14, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"inputs": tokens(rng, 2, 40), "targets": tokens(rng, 2, 6),
             "text": {"inputs": f"source {index}", "targets": " ".join(rng.choice(WORDS, 5)),
                      "choices": [], "index": index}} for index in range(count)]


def split_of(rows: list[dict], kind: str) -> PreparedSplit:
    info = {"kind": kind, "dataset": "toys", "config": "small", "template": "ask it"}
    return PreparedSplit.from_rows("toys_small__ask_it", "validation", info, rows)
