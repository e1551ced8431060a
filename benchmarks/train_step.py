"""One training step at T5 1.1 small shapes: elm_jax against transformers' PyTorch T5, in turn.

    python benchmarks/train_step.py [--rounds 5] [--tied]
    python benchmarks/train_step.py --memory

Forward and backward pass and AdamW over all weights, float32, on the processor; ours is the compiled step
that `elm train` runs, its metrics included. Both networks have the same number of parameters:
transformers 5 ties the head whatever its config says, so it gets one of its own. `--memory` compares
a prompt expert's step with a full fine-tuning step by what the compiler says that each needs.
Numbers of one machine: benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from elm_jax.experts.overlay import trained_leaves
from elm_jax.models import AdapterConfig, T5Config, T5Network
from elm_jax.models.t5.network import role_of
from elm_jax.runtime import sharding, trees
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.state import create_state
from elm_jax.training.step import StepConfig, compile_step, make_spec
from elm_jax.types import Batch, Params

BATCH, SOURCE, TARGET = 8, 256, 32
SMALL = T5Config(
    vocab_size=32128, emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024, num_encoder_layers=8,
    num_decoder_layers=8,
)
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def make_batch() -> dict[str, np.ndarray]:
    """Full rows of random tokens: encoder i32[8, 256], decoder i32[8, 32]."""
    rng = np.random.default_rng(0)
    targets = rng.integers(2, SMALL.vocab_size, (BATCH, TARGET)).astype(np.int32)
    return {
        "encoder_input_tokens": rng.integers(2, SMALL.vocab_size, (BATCH, SOURCE)).astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


def product_step(config: T5Config, overlay: Params, frozen: Params) -> jax.stages.Compiled:
    """The step of `elm train` for an overlay, on a mesh of one device; leaves may be abstract."""
    return compile_step(make_spec(
        StepConfig(T5Network(config), OPTIMIZER), frozen, overlay, make_batch(), sharding.make_mesh(1, 1)))


def ours(config: T5Config, batch: Batch) -> tuple[Callable[[], float], int]:
    """A function that takes one step and returns its loss, and the number of parameters."""
    params = jax.jit(T5Network(config).init)(jax.random.key(0))
    step, count = product_step(config, params, {}), trees.count(params)
    held = [create_state(params, OPTIMIZER)]
    batch = jax.device_put(batch)

    def run() -> float:
        held[0], metrics = step({}, held[0], batch, np.uint32(0), np.int32(1000))
        return float(metrics["loss"])

    return run, count


def transformers_peer(config: T5Config, batch: Batch) -> tuple[Callable[[], float], int]:
    """The same for transformers' T5."""
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.emb_dim, d_kv=config.head_dim,
        d_ff=config.mlp_dim, num_heads=config.num_heads, num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=config.logits_via_embedding,
        decoder_start_token_id=0,
    )).train()
    if not config.logits_via_embedding:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    inputs, labels = (
        torch.tensor(batch[name]).long()
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    mask = torch.ones_like(inputs)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run, sum(weight.numel() for weight in model.parameters())


def in_turn(
    runs: dict[str, Callable[[], object]], rounds: int, processor_time: bool
) -> dict[str, list[float]]:
    """Seconds of every run, the runs taken in turn so that all see the same machine.

    Two rounds before them are not counted: they compile, and fill caches. Processor time is for a
    machine that others use too: pin the program to one core (`taskset -c 0`), else waiting threads
    are counted as work.
    """
    clock = time.process_time if processor_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if number >= 2:
                seconds[name].append(clock() - start)
    return seconds


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both benchmarks have."""
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each")
    parser.add_argument(
        "--processor_time", action="store_true", help="processor seconds, for a machine in use"
    )


def machine() -> str:
    """Processor, cores, load and versions, for the record."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass  # not Linux: the short name will do
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{model}, {os.cpu_count()} cores, load {load}, jax {jax.__version__}"


def report(seconds: dict[str, list[float]], baseline: str) -> None:
    """Prints medians, smallest values and ratios to the first run, then one line of JSON."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:32s} median {medians[name]:7.3f} s   least {min(values):7.3f} s   "
              f"{baseline} / this {medians[baseline] / medians[name]:5.2f}")
    print(json.dumps({"machine": machine(), "median_seconds": medians, "seconds": seconds}))


def memory(config: T5Config) -> None:
    """Prints the compiler's bytes of a prompt-expert step and of a full fine-tuning step."""
    with_adapters = config.with_adapter(AdapterConfig())
    prompt = trees.split(T5Network(with_adapters).abstract_params(), trained_leaves(role_of, "adapter"))
    full = (T5Network(config).abstract_params(), {})
    table = {}
    for name, net, (overlay, frozen) in (
        ("prompt expert", with_adapters, prompt), ("full fine-tuning", config, full)
    ):
        need = product_step(net, overlay, frozen).memory_analysis()
        table[name] = {
            "arguments": need.argument_size_in_bytes, "temporaries": need.temp_size_in_bytes,
            "total": need.argument_size_in_bytes + need.temp_size_in_bytes,
        }
        print(f"{name:18s} " + "   ".join(f"{k} {v / 2**20:8.1f} MiB" for k, v in table[name].items()))
    ratio = table["prompt expert"]["total"] / table["full fine-tuning"]["total"]
    print(f"prompt expert / full fine-tuning: {ratio:.3f}")
    print(json.dumps({"machine": machine(), "bytes": table, "ratio": ratio}))


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser)
    parser.add_argument("--tied", action="store_true", help="one table for embedding and head")
    parser.add_argument("--memory", action="store_true", help="bytes instead of seconds")
    flags = parser.parse_args()
    if flags.memory:
        memory(SMALL)
        return
    config = T5Config.from_dict({**SMALL.to_dict(), "logits_via_embedding": flags.tied})
    batch = make_batch()
    runs = {}
    for name, make in (("elm_jax", ours), ("transformers", transformers_peer)):
        runs[name], count = make(config, batch)
        print(f"{name}: {count:,} parameters, batch {BATCH} x {SOURCE}/{TARGET}")
    report(in_turn(runs, flags.rounds, flags.processor_time), "transformers")


if __name__ == "__main__":
    main()
