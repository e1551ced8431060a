"""Sparse feed-forward against dense, against transformers' Switch layer and against masks in an einsum.

    python benchmarks/sparse.py [--rounds 7]
    taskset -c 1 python benchmarks/sparse.py --processor_time
    python benchmarks/sparse.py --growth 4,16,64,256

One layer: 2,048 tokens in one group, D = 512, F = 1,024, 16 experts, relu, float32; forward pass, and forward
pass with the gradients of all leaves and of the input. The runs take turns in one process. `rows` is how many
rows the experts compute, capacity counted, over the number of tokens. Gradients of E kernels are E times the
dense layer's: memory that a process gives back between two calls, as glibc does with such large pieces, costs
more time than to fill it. So it is kept here, for all runs alike; `--fresh_memory` leaves that out.
"""

import argparse
import ctypes
import dataclasses
import json
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from train_step import add_flags, in_turn, machine

from elm_jax.models.blocks.feed_forward import Mlp
from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers import gates
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.types import Params

ACTIVATIONS, FLOAT32 = ("relu",), jnp.dtype("float32")
DENSE, SWITCH, EINSUM = "dense", "transformers' Switch", "einsum, one group"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGE = -1, -3, 1 << 30
Runs = dict[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens N, width D, hidden width F, experts E."""

    tokens: int
    emb_dim: int
    mlp_dim: int
    experts: int


SHAPES = {"issue": Sizes(2048, 512, 1024, 16), "tiny": Sizes(64, 16, 32, 4)}


def keep_memory() -> None:
    """Tells glibc to keep what is freed, however large."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGE - 1)
    except (AttributeError, OSError):
        pass  # another allocator


def inputs(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Input f32[1, N, D] and the output's gradient."""
    keys = jax.random.split(jax.random.key(0))
    one, other = (jax.random.normal(key, (1, sizes.tokens, sizes.emb_dim)) for key in keys)
    return one, other


def sparse_layer(sizes: Sizes, experts: int, **settings: object) -> SparseMlp:
    """The layer with these settings."""
    return SparseMlp(sizes.emb_dim, sizes.mlp_dim, ACTIVATIONS, 0.0, FLOAT32,
                     SparseConfig(experts, **settings))


def rows_computed(sizes: Sizes, config: SparseConfig) -> float:
    """Rows of the experts, empty ones counted, over tokens; without a capacity the least there can be."""
    places = gates.capacity(config, sizes.tokens, True)
    return config.experts_per_token if places is None else places * config.num_experts / sizes.tokens


def run_of(sizes: Sizes, layer: SparseMlp | Mlp, apply: Callable | None = None) -> Runs:
    """Forward pass and gradient of a layer, or of another function (params, x) of its leaves."""
    x, share = inputs(sizes)
    params = jax.jit(lambda: layer.init(jax.random.key(1), x, True)["params"])()
    apply = apply or (lambda params, x: layer.apply({"params": params}, x, False))
    forward = jax.jit(apply)
    # With the value: without it the compiler leaves out the last product of the dense layer's forward pass.
    gradient = jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(apply(params, x) * share), (0, 1)))
    return {"forward": lambda: jax.block_until_ready(forward(params, x)),
            "gradient": lambda: jax.block_until_ready(gradient(params, x))}


def masked(sizes: Sizes, config: SparseConfig) -> Callable[[Params, jax.Array], jax.Array]:
    """The layer as T5X computes it on TPUs, all tokens one group: masks [N, E, C] in products."""
    places = gates.capacity(config, sizes.tokens, True)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        logits = x @ params["router"]["router_weights"]["w"]["kernel"]
        choices = gates.choose_by_tokens(logits, jnp.ones(x.shape[:2], bool), config, places)
        one_hot = jax.nn.one_hot(choices.experts[0], config.num_experts)  # [N, K, E]
        place = jax.nn.one_hot(jnp.where(choices.kept, choices.places, places)[0], places)  # [N, K, C]
        combine = jnp.einsum("nke,nkc,nk->nec", one_hot, place, choices.gates[0])
        rows = jnp.einsum("nec,nd->ecd", (combine > 0).astype(x.dtype), x[0])
        hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", rows, params["expert"]["wi"]["kernel"]))
        rows = jnp.einsum("ecf,efd->ecd", hidden, params["expert"]["wo"]["kernel"])
        return jnp.einsum("nec,ecd->nd", combine, rows)[None]

    return apply


def switch(sizes: Sizes, places: int) -> Runs:
    """transformers' Switch layer on torch."""
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    layer = SwitchTransformersSparseMLP(SwitchTransformersConfig(
        d_model=sizes.emb_dim, d_ff=sizes.mlp_dim, num_experts=sizes.experts, expert_capacity=places,
        dropout_rate=0.0, router_jitter_noise=0.0)).train()
    for weight in layer.parameters():
        weight.data.copy_(torch.randn(weight.shape) * weight.shape[-1]**-0.5)
    x, share = (torch.tensor(np.asarray(array)) for array in inputs(sizes))
    x.requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def gradient() -> None:
        layer.zero_grad()
        x.grad = None
        (layer(x) * share).sum().backward()

    return {"forward": forward, "gradient": gradient}


def make_runs(sizes: Sizes) -> tuple[dict[str, Runs], dict[str, float]]:
    """Runs by name, and the rows that each computes over the number of tokens."""
    mlp = Mlp(sizes.emb_dim, sizes.mlp_dim, ACTIVATIONS, 0.0, FLOAT32)
    runs, rows = {DENSE: run_of(sizes, mlp)}, {DENSE: 1.0}
    for k in (1, 2):
        for factor in (1.0, 1.25, None):
            layer = sparse_layer(sizes, sizes.experts, experts_per_token=k, capacity_factor=factor)
            name = f"top {k}, " + ("no capacity" if factor is None else f"capacity {factor}")
            runs[name], rows[name] = run_of(sizes, layer), rows_computed(sizes, layer.sparse)
    config = SparseConfig(sizes.experts)
    layer = sparse_layer(sizes, sizes.experts)
    runs[EINSUM] = run_of(sizes, layer, masked(sizes, config))
    runs[SWITCH] = switch(sizes, gates.capacity(config, sizes.tokens, True))
    return runs, rows | {EINSUM: rows_computed(sizes, config)}


def growth_runs(sizes: Sizes, experts: list[int]) -> tuple[dict[str, Runs], dict[str, float]]:
    """Top 1 with capacity 1.25 and without one, of several numbers of experts."""
    runs, rows = {}, {}
    for factor in (1.25, None):
        for number in experts:
            layer = sparse_layer(sizes, number, capacity_factor=factor)
            name = f"E = {number}, " + ("no capacity" if factor is None else f"capacity {factor}")
            runs[name], rows[name] = run_of(sizes, layer), rows_computed(sizes, layer.sparse)
    return runs, rows


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser)
    parser.add_argument("--shapes", choices=SHAPES, default="issue")
    parser.add_argument("--growth", help="numbers of experts, separated by commas, instead of the peers")
    parser.add_argument("--fresh_memory", action="store_true", help="memory goes back to the system")
    flags = parser.parse_args()
    if not flags.fresh_memory:
        keep_memory()
    sizes = SHAPES[flags.shapes]
    print(f"{machine()}; {dataclasses.asdict(sizes)}")
    if flags.growth:
        runs, rows = growth_runs(sizes, [int(number) for number in flags.growth.split(",")])
    else:
        runs, rows = make_runs(sizes)
    flat = {f"{name}: {kind}": run for name, each in runs.items() for kind, run in each.items()}
    seconds = in_turn(flat, flags.rounds, flags.processor_time)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(runs))
    for name in runs:
        times = [medians[f"{name}: {kind}"] for kind in ("forward", "gradient")]
        ratios = [time / medians[f"{first}: {kind}"]
                  for time, kind in zip(times, ("forward", "gradient"), strict=True)]
        print(f"{name:24s} forward {times[0] * 1e3:8.1f} ms   gradient {times[1] * 1e3:8.1f} ms   "
              f"over {first}: {ratios[0]:5.2f} {ratios[1]:5.2f}   "
              + (f"rows {rows[name]:4.2f}" if name in rows else ""))
    print(json.dumps({"machine": machine(), "shapes": dataclasses.asdict(sizes), "rows": rows,
                      "median_seconds": medians, "seconds": seconds}))


if __name__ == "__main__":
    main()
