"""Training steps, scoring and decoding on one accelerator, each beside its floor.

    python benchmarks/accelerator.py --shapes base --dtype bfloat16
    python benchmarks/accelerator.py --shapes xl --dtype bfloat16 --only prompt_step,full_step
    JAX_PLATFORMS=cpu python benchmarks/accelerator.py --shapes tiny --dtype float32 --rounds 3

Random arrays, no SeqIO and no TensorFlow. First the two ceilings of this device are measured: a large matrix
product and a large copy. A floor is the larger of operations over the first and bytes over the second: no
program takes less time. MFU is the operations that the mathematics needs (matrix products only; nothing that
is computed twice counts) over time and ceiling, as in PaLM's appendix B, https://arxiv.org/abs/2204.02311.
For stacks of experts see stacked.py, for mixed batches mixed_batch.py.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from train_step import machine

from elm_jax.evaluation.rank import score_choices
from elm_jax.experts.overlay import trained_leaves
from elm_jax.models import AdapterConfig, T5Config, T5Network
from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import role_of
from elm_jax.runtime import sharding, trees
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.state import create_state
from elm_jax.training.step import StepConfig, compile_step, make_spec
from elm_jax.types import Padded, Params

NO_END = -1
"""An end token that never comes: every row is decoded to its full length."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A model and the batch that it is measured at.

    Attributes:
        config: of the network.
        rows: B of a training step.
        source, target: S and T of a training step and of scoring.
        choices: C of scoring.
        score_rows, decode_rows: B of scoring and of decoding.
        new_tokens: decoded a row.
        product: n of the n x n matrix product that measures the ceiling.
        copy_bytes: of the copy that measures the other one.
    """

    config: T5Config
    rows: int
    source: int = 512
    target: int = 128
    choices: int = 4
    score_rows: int = 32
    decode_rows: int = 64
    new_tokens: int = 64
    product: int = 8192
    copy_bytes: int = 2**31


def _config(width: int, heads: int, mlp: int, layers: int, vocabulary: int = 32128) -> T5Config:
    return T5Config(vocab_size=vocabulary, emb_dim=width, num_heads=heads, head_dim=64, mlp_dim=mlp,
                    num_encoder_layers=layers, num_decoder_layers=layers)


SHAPES = {
    "tiny": Shapes(_config(64, 2, 160, 2, 512), rows=4, source=64, target=16, score_rows=4, decode_rows=4,
                   new_tokens=8, product=512, copy_bytes=2**24),
    "base": Shapes(_config(768, 12, 2048, 12), rows=64),
    "xl": Shapes(_config(2048, 32, 5120, 24), rows=16),
}


# -- the operations that the mathematics needs


def forward_flops(config: T5Config, rows: int, source: int, target: int, choices: int = 1) -> float:
    """Operations of the matrix products of one forward pass, adapters too (two a multiply-add)."""
    width, inner = config.emb_dim, config.num_heads * config.head_dim
    matrices = len(config.mlp_activations) + 1
    mlp = matrices * width * config.mlp_dim
    adapter = 0 if config.adapter is None else 2 * width * config.bottleneck
    encoder_token = 4 * width * inner + mlp + 2 * adapter + 2 * source * inner
    decoder_token = (4 * width * inner + 2 * target * inner / 2  # a token sees half of the others
                     + 2 * width * inner + 2 * source * inner + mlp + 2 * adapter)
    cross_keys = 2 * width * inner  # once for each token of the source, whatever the choices
    encoder = config.num_encoder_layers * encoder_token * source
    decoder = config.num_decoder_layers * (decoder_token * target * choices + cross_keys * source)
    head = width * config.vocab_size * target * choices
    return 2.0 * rows * (encoder + decoder + head)


def step_flops(config: T5Config, rows: int, source: int, target: int) -> float:
    """Operations of a training step: thrice the forward pass, or twice where the base is frozen.

    A frozen matrix needs no gradient of its own; an adapter's two need one, as large as their forward pass.
    """
    forward = forward_flops(config, rows, source, target)
    if config.adapter is None:
        return 3 * forward
    bare = forward_flops(config.with_adapter(None), rows, source, target)
    return 2 * forward + (forward - bare)


def decoding_bytes(config: T5Config, params: Params, shapes: Shapes) -> float:
    """Fewest bytes that greedy decoding reads: the decoder's weights, keys and values, once a token."""
    size = jnp.dtype(config.dtype).itemsize
    read = sum(leaf.size for path, leaf in trees.flatten(params).items() if path.startswith("decoder/"))
    inner = config.num_heads * config.head_dim
    cached = 2 * shapes.decode_rows * inner * config.num_decoder_layers * (
        shapes.source + shapes.new_tokens / 2)
    return float(size * shapes.new_tokens * (read + cached))


# -- ceilings and times


def seconds_of(run: Callable[[], object], rounds: int) -> list[float]:
    """Wall-clock seconds of each round, after two that compile and warm up."""
    found = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if number >= 2:
            found.append(time.perf_counter() - start)
    return found


def ceilings(shapes: Shapes, dtype: str, rounds: int) -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a large copy, read plus written)."""
    size, repeats = shapes.product, 8
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) / size ** 0.5 for key in keys)

    @jax.jit
    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, value: value @ y, x)

    block = jax.random.normal(keys[0], (shapes.copy_bytes // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    product = statistics.median(seconds_of(lambda: products(left, right), rounds))
    moved = statistics.median(seconds_of(lambda: copy(block), rounds))
    return repeats * 2.0 * size**3 / product, 2.0 * block.nbytes / moved


# -- what is measured


def training(shapes: Shapes, dtype: str, prompt: bool) -> tuple[Callable[[], object], dict[str, float]]:
    """A function that takes one step of `elm train`, and what it needs at least."""
    config = dataclasses.replace(shapes.config, dtype=dtype)
    if prompt:
        config = config.with_adapter(AdapterConfig())
    network = T5Network(config)
    params = jax.jit(network.init)(jax.random.key(0))
    overlay, frozen = trees.split(params, trained_leaves(role_of, "adapter" if prompt else "full"))
    optimizer = OptimizerConfig(name="adamw" if prompt else "adafactor", learning_rate=1e-4)
    batch = make_batch(shapes)
    step = compile_step(make_spec(StepConfig(network, optimizer), frozen, overlay, batch,
                                  sharding.make_mesh(1, 1)))
    held = [jax.jit(lambda tree: create_state(tree, optimizer))(overlay)]
    del params, overlay
    placed = jax.device_put(batch)

    def run() -> object:
        held[0], metrics = step(frozen, held[0], placed, np.uint32(0), np.int32(1000))
        return metrics["loss"]

    memory = step.memory_analysis()
    return run, {
        "flops": step_flops(config, shapes.rows, shapes.source, shapes.target),
        "bytes": 0.0, "tokens": shapes.rows * (shapes.source + shapes.target),
        "device_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "compiled_flops": (step.cost_analysis() or {}).get("flops", float("nan")),
    }


def make_batch(shapes: Shapes) -> dict[str, np.ndarray]:
    """Full rows of random tokens."""
    rng, last = np.random.default_rng(0), shapes.config.vocab_size
    targets = rng.integers(2, last, (shapes.rows, shapes.target)).astype(np.int32)
    return {
        "encoder_input_tokens": rng.integers(2, last, (shapes.rows, shapes.source)).astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


def full_rows(rng: np.random.Generator, config: T5Config, *shape: int) -> Padded:
    """Random tokens i32[*shape] without padding, on the device."""
    tokens = rng.integers(2, config.vocab_size, shape).astype(np.int32)
    return jax.device_put(Padded(tokens, np.full(shape[:-1], shape[-1], np.int32)))


def scoring(shapes: Shapes, dtype: str) -> tuple[Callable[[], object], dict[str, float]]:
    """A function that scores one batch of choices, and what it needs at least."""
    config = dataclasses.replace(shapes.config, dtype=dtype).with_adapter(AdapterConfig())
    network, rng = T5Network(config), np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    inputs = full_rows(rng, config, shapes.score_rows, shapes.source)
    length = max(4, shapes.target // 8)
    choices = full_rows(rng, config, shapes.score_rows, shapes.choices, length)
    return functools.partial(score_choices, network, params, inputs, choices), {
        "flops": forward_flops(config, shapes.score_rows, shapes.source, length, shapes.choices),
        "bytes": float(trees.count(params) * jnp.dtype(dtype).itemsize),
        "tokens": shapes.score_rows * (shapes.source + shapes.choices * length),
    }


def decoding(shapes: Shapes, dtype: str) -> tuple[Callable[[], object], dict[str, float]]:
    """A function that decodes one batch greedily to its full length, and what it needs at least."""
    config = dataclasses.replace(shapes.config, dtype=dtype).with_adapter(AdapterConfig())
    network, rng = T5Network(config), np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    inputs = full_rows(rng, config, shapes.decode_rows, shapes.source)
    run = functools.partial(greedy, network, params, inputs, max_length=shapes.new_tokens, eos_id=NO_END)
    return run, {
        "flops": forward_flops(config, shapes.decode_rows, shapes.source, shapes.new_tokens),
        "bytes": decoding_bytes(config, params, shapes), "tokens": shapes.decode_rows * shapes.new_tokens,
    }


MEASURED = {
    "full_step": functools.partial(training, prompt=False),
    "prompt_step": functools.partial(training, prompt=True),
    "scoring": scoring,
    "decoding": decoding,
}


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="activations")
    parser.add_argument("--only", default=",".join(MEASURED), help="names, separated by commas")
    parser.add_argument("--rows", type=int, help="rows of a training step")
    parser.add_argument("--rounds", type=int, default=10)
    flags = parser.parse_args()
    shapes = SHAPES[flags.shapes]
    shapes = dataclasses.replace(shapes, rows=flags.rows or shapes.rows)
    unknown = set(flags.only.split(",")) - set(MEASURED)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(MEASURED)}")
    products, moved = ceilings(shapes, flags.dtype, flags.rounds)
    print(f"{jax.devices()[0].device_kind}; {machine()}")
    print(f"ceilings: matrix product {products / 1e12:.2f} TFLOP/s ({flags.dtype}), "
          f"copy {moved / 1e9:.1f} GB/s")
    table = {}
    for name in flags.only.split(","):
        run, need = MEASURED[name](shapes, flags.dtype)
        found = seconds_of(run, flags.rounds)
        median = statistics.median(found)
        floor = max(need["flops"] / products, need["bytes"] / moved)
        table[name] = {"median_seconds": median, "seconds": found, "floor_seconds": floor,
                       "mfu": need["flops"] / median / products, "tokens_per_second": need["tokens"] / median,
                       **need}
        bound = "operations" if need["flops"] / products >= need["bytes"] / moved else "bytes"
        memory = f"   {need['device_bytes'] / 2**30:6.2f} GiB" if "device_bytes" in need else ""
        print(f"{name:12s} median {median * 1e3:9.2f} ms   floor {floor * 1e3:9.2f} ms ({bound})   "
              f"floor / median {floor / median:5.3f}   MFU {table[name]['mfu']:5.3f}   "
              f"{table[name]['tokens_per_second']:12,.0f} tokens/s{memory}")
        del run
    print(json.dumps({"machine": machine(), "device": jax.devices()[0].device_kind, "shapes": flags.shapes,
                      "dtype": flags.dtype, "product_flops": products, "copy_bytes": moved,
                      "measured": table}))


if __name__ == "__main__":
    main()
