"""Training on SmolLM2-135M's shapes, adapters in the upper 10 of 30 layers: with and without a trunk cache.

    python benchmarks/trunk_cache.py [--rounds 5] [--rows 8] [--prompt 112] [--target 16] [--processor_time]

Three runs in turn, float32, LoRA of rank 8 on every projection, AdamW, 8 rows of 128 tokens: adapters in all
layers; in the upper 10 (`ADAPTER_LAYERS`); and there with the states below read from disk (`TRUNK_CACHE`).
The time of a step is that of `elm train`'s own step and includes its batch, read from the cache in the third
run. The second and the third must have equal losses. The first epoch, which fills the cache, is timed apart.
Numbers of one machine: benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.cursor import TrainStream
from elm_jax.experts.overlay import leaves_to_train
from elm_jax.models import AdapterConfig, families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.network import Network, frozen_depth
from elm_jax.runtime import sharding, trees
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.state import create_state
from elm_jax.training.step import StepConfig, compile_step, make_spec
from elm_jax.training.trunk.trunk_cache import TrunkBase, TrunkCache, TrunkSettings
from elm_jax.training.trunk.trunk_stream import TrunkStream
from elm_jax.types import Params

SMOLLM2 = DecoderConfig(vocab_size=49152, emb_dim=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
                        num_layers=30, max_length=8192, rope_base=100000.0, tied_head=True, pad_id=2)
TINY = dataclasses.replace(SMOLLM2, vocab_size=300, emb_dim=24, num_heads=3, num_kv_heads=1, head_dim=8,
                           mlp_dim=32)
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=1e-4)
STEPS_AN_EPOCH = 2


class Rows:
    """Random rows: prompts and targets of fixed lengths."""

    def __init__(self, count: int, prompt: int, target: int, vocab_size: int) -> None:
        self._tokens = np.random.default_rng(0).integers(5, vocab_size, (count, prompt + target), np.int32)
        self._prompt = prompt

    def __len__(self) -> int:
        return len(self._tokens)

    def example(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and target of a row."""
        del epoch
        return self._tokens[index, :self._prompt], self._tokens[index, self._prompt:]


def stepper(network: Network, params: Params, stream: TrainStream | TrunkStream) -> Callable[[], float]:
    """A function that takes the next step of a run, its batch included, and returns the loss."""
    mesh = sharding.make_mesh(1, 1)
    overlay, frozen = trees.split(params, leaves_to_train(network, "adapter"))
    config = StepConfig(network, OPTIMIZER)
    step_fn = compile_step(make_spec(config, frozen, overlay, stream.batch(0), mesh))
    held = [create_state(jax.tree.map(np.array, overlay), OPTIMIZER), 0]

    def run() -> float:
        batch = sharding.put_batch(stream.batch(held[1]), mesh)
        held[0], metrics = step_fn(frozen, held[0], batch, np.uint32(0), np.int32(1000))
        held[1] += 1
        return float(metrics["loss"])

    return run


def with_adapters(config: DecoderConfig, base: Params, layers: str | None) -> tuple[Network, Params]:
    """Network and parameters of a base with fresh LoRA updates in some layers."""
    adapter = AdapterConfig(kind="lora", rank=8, targets="all", layers=layers)
    network = families.network_of(config.with_adapter(adapter))
    fresh = {path: np.random.default_rng(len(path)).normal(0, 0.02, leaf.shape).astype(np.float32)
             for path, leaf in trees.flatten(network.abstract_params()).items() if "_adapter/" in path}
    return network, trees.merge(base, trees.unflatten(fresh))


def main() -> None:
    """Runs the three in turn and prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("rows", 8), ("prompt", 112), ("target", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tiny", action="store_true", help="shapes of a test")
    parser.add_argument("--processor_time", action="store_true", help="for a machine that others use too")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    config = TINY if options.tiny else SMOLLM2
    base = jax.jit(families.network_of(config).init)(jax.random.key(0))
    rows = Rows(STEPS_AN_EPOCH * options.rows, options.prompt, options.target, config.vocab_size)
    lengths = {"inputs": options.prompt, "targets": options.target}
    every, every_params = with_adapters(config, base, None)
    upper, upper_params = with_adapters(config, base, "upper 10")
    stream = TrainStream(rows, form=form_of(upper), batch_size=options.rows, lengths=lengths, seed=0,
                         pack=False)
    above = dataclasses.replace(upper, trunk=frozen_depth(upper, filter(
        leaves_to_train(upper, "adapter"), trees.flatten(upper_params))))
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, TrunkCache(
            above, TrunkBase("benchmark", base), TrunkSettings(folder), sharding.make_mesh(1, 1)) as cache:
        filling = []
        for step in range(STEPS_AN_EPOCH):
            start = clock()
            cache.with_states(stream.batch(step))
            filling.append(clock() - start)
        cache.store.flush()
        runs = {"all layers": stepper(every, every_params, stream),
                "upper 10": stepper(upper, upper_params, stream),
                "upper 10, cached": stepper(above, upper_params, TrunkStream(stream, cache))}
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                start = clock()
                loss = run()
                losses.setdefault(name, []).append(loss)
                if number:  # the first fills caches
                    seconds.setdefault(name, []).append(clock() - start)
    tokens = options.rows * (options.prompt + options.target)
    rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    cached, plain = (np.asarray(losses[name]) for name in ("upper 10, cached", "upper 10"))
    for name, rate in rates.items():
        print(f"{name:18} {rate:8.0f} tokens/s   {rate / rates['all layers']:.2f} of all layers")
    difference = float(np.max(np.abs(cached - plain) / np.abs(plain)))
    print(f"largest relative difference of losses, cached or not: {difference:.1e} over {len(plain)} steps")
    print(json.dumps({
        "tokens": tokens, "tokens_per_second": rates, "filling": tokens / filling[-1],
        "cached / upper 10": rates["upper 10, cached"] / rates["upper 10"],
        "cached / all layers": rates["upper 10, cached"] / rates["all layers"],
        "loss_difference": difference, "processor_time": options.processor_time}))


if __name__ == "__main__":
    main()
