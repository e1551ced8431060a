"""Batches in which each instance goes to its own expert, against batches of one expert.

    python benchmarks/mixed_batch.py --shapes tiny
    python benchmarks/mixed_batch.py --shapes base --dtype bfloat16 --experts 64

Scoring of choices and greedy decoding to full length, the same rows and the same network; the mixed batch
gathers each row's overlay from a stack of E within the timed program. Rounds take turns. Random arrays, no
SeqIO.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time

import jax
import numpy as np
from accelerator import NO_END, Shapes, ceilings, forward_flops, full_rows
from stacked import ALL_SHAPES
from train_step import machine

from elm_jax.evaluation.rank import score_choices
from elm_jax.evaluation.stacked_evaluator import greedy_mixed, score_mixed
from elm_jax.experts.overlay import trained_leaves
from elm_jax.models import AdapterConfig, T5Network
from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import role_of
from elm_jax.runtime import trees


def programs(shapes: Shapes, dtype: str, experts: int) -> dict[str, tuple]:
    """(run with one expert, run with one expert a row, operations of either) by name."""
    config = dataclasses.replace(shapes.config, dtype=dtype).with_adapter(AdapterConfig())
    network, rng = T5Network(config), np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    overlay, shared = trees.split(params, trained_leaves(role_of, "adapter"))
    stack = jax.jit(lambda tree: jax.tree.map(
        lambda leaf: leaf[None] * (1 + 1e-3 * np.arange(experts, dtype=np.float32).reshape(
            -1, *[1] * leaf.ndim)), tree))(overlay)
    length = max(4, shapes.target // 8)
    tokens = functools.partial(full_rows, rng, config)
    rows, decoded = shapes.score_rows, shapes.decode_rows
    inputs, choices = tokens(rows, shapes.source), tokens(rows, shapes.choices, length)
    sources = tokens(decoded, shapes.source)
    index = jax.device_put(rng.integers(0, experts, max(rows, decoded)).astype(np.int32))
    both = (shared, stack)
    options = {"max_length": shapes.new_tokens, "eos_id": NO_END}
    return {
        "scoring": (functools.partial(score_choices, network, params, inputs, choices),
                    functools.partial(score_mixed, network, both, index[:rows], inputs, choices),
                    forward_flops(config, rows, shapes.source, length, shapes.choices)),
        "decoding": (functools.partial(greedy, network, params, sources, **options),
                     functools.partial(greedy_mixed, network, both, index[:decoded], sources, **options),
                     forward_flops(config, decoded, shapes.source, shapes.new_tokens)),
    }


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=ALL_SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="activations")
    parser.add_argument("--experts", type=int, default=16, help="overlays in the stack")
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=10)
    flags = parser.parse_args()
    shapes = ALL_SHAPES[flags.shapes]
    shapes = dataclasses.replace(shapes, score_rows=flags.rows or shapes.score_rows,
                                 decode_rows=flags.rows or shapes.decode_rows)
    products, _ = ceilings(shapes, flags.dtype, flags.rounds)
    print(f"{jax.devices()[0].device_kind}; {machine()}")
    table = {}
    for name, (one, mixed, flops) in programs(shapes, flags.dtype, flags.experts).items():
        seconds: dict[str, list[float]] = {"one": [], "mixed": []}
        for number in range(flags.rounds + 1):
            for kind, run in (("one", one), ("mixed", mixed)):
                start = time.perf_counter()
                jax.block_until_ready(run())
                if number:
                    seconds[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(found) for kind, found in seconds.items()}
        table[name] = {"median_seconds": medians, "seconds": seconds,
                       "mixed_over_one": medians["mixed"] / medians["one"],
                       "mfu": {kind: flops / median / products for kind, median in medians.items()}}
        print(f"{name:9s} one expert {medians['one'] * 1e3:9.2f} ms   "
              f"mixed {medians['mixed'] * 1e3:9.2f} ms   mixed / one {table[name]['mixed_over_one']:5.3f}   "
              f"MFU {table[name]['mfu']['mixed']:5.3f}")
    print(json.dumps({"machine": machine(), "device": jax.devices()[0].device_kind, "shapes": flags.shapes,
                      "dtype": flags.dtype, "experts": flags.experts, "rows": shapes.score_rows,
                      "measured": table}))


if __name__ == "__main__":
    main()
