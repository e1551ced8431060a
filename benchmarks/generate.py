"""Greedy decoding at SmolLM2-135M's shapes: elm_jax against transformers' `generate`, in turn.

    python benchmarks/generate.py [--rounds 5] [--source 128] [--layers 30]

Float32 on the processor, random weights that both share; 64 new tokens each for a batch of eight prompts of
unequal lengths up to 128 tokens, and for the longest of them alone: whole, and streamed in pieces. Prompt and
steps together; what is compiled is compiled before. Numbers of one machine: benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.evaluation.text_generator import TextGenerator
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.network import DecoderNetwork
from elm_jax.runtime import trees
from elm_jax.types import Params

NEW = 64
LENGTHS = (128, 97, 64, 120, 33, 101, 80, 128)
SMOLLM2 = {"vocab_size": 49152, "emb_dim": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
           "mlp_dim": 1536, "num_layers": 30, "max_length": 2048, "rope_base": 100_000.0, "tied_head": True}


class NoVocabulary:
    """Token ids are their own text, so that nothing but decoding is measured."""

    eos_id = 0

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids, with a space between."""
        return " ".join(map(str, tokens))


def peer_of(config: DecoderConfig, params: Params) -> object:
    """transformers' Llama with the same weights."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.emb_dim, intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_length,
        rope_theta=config.rope_base, rms_norm_eps=config.norm_epsilon, tie_word_embeddings=True)).eval()
    model.generation_config.eos_token_id = None
    flat = trees.flatten(params)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(np.asarray(flat["token_embedder/embedding"])))
        for number, layer in enumerate(model.model.layers):
            own = f"decoder/layers_{number}/"
            pairs = [(layer.self_attn.q_proj, "attention/query"), (layer.self_attn.k_proj, "attention/key"),
                     (layer.self_attn.v_proj, "attention/value"), (layer.self_attn.o_proj, "attention/out"),
                     (layer.mlp.gate_proj, "mlp/wi_0"), (layer.mlp.up_proj, "mlp/wi_1"),
                     (layer.mlp.down_proj, "mlp/wo")]
            for module, name in pairs:
                module.weight.copy_(torch.tensor(np.asarray(flat[f"{own}{name}/kernel"]).T))
    return model


def peer_run(model: object, prompts: Sequence[np.ndarray]) -> Callable[[], list[list[int]]]:
    """A function that generates with transformers, prompts padded on the left."""
    import torch

    width = max(map(len, prompts))
    tokens, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, real, prompt in zip(tokens, mask, prompts, strict=True):
        row[width - len(prompt):], real[width - len(prompt):] = prompt, 1
    tokens, mask = torch.tensor(tokens), torch.tensor(mask)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW,
                                   pad_token_id=0, use_cache=True)
        return found[:, width:].tolist()

    return run


def ours_run(generator: TextGenerator, prompts: Sequence[np.ndarray], stream: bool) -> Callable[[], list]:
    """A function that generates with elm_jax, whole or piece by piece."""
    settings = GenerationSettings(max_new_tokens=NEW)

    def whole() -> list[list[int]]:
        return [list(map(int, answer.text.split())) for answer in generator.answer(prompts, settings)]

    def streamed() -> list[list[int]]:
        return [list(map(int, "".join(generator.stream(prompt, settings)).split())) for prompt in prompts]

    return streamed if stream else whole


def measure(runs: dict[str, Callable[[], list]], rounds: int, clock: Callable[[], float]
            ) -> dict[str, list[float]]:
    """Seconds of each run, in turn; two rounds are not counted."""
    seconds = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if number >= 2:
                seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    """Measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--processor_time", action="store_true", help="for one core of a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    config = DecoderConfig(**{**SMOLLM2, "num_layers": arguments.layers}, eos_id=0)
    network = DecoderNetwork(config)
    params = jax.jit(network.init)(jax.random.key(0))
    draw = np.random.default_rng(0)
    lengths = [-(-length * arguments.source // max(LENGTHS)) for length in LENGTHS]
    prompts = [draw.integers(3, config.vocab_size, length).astype(np.int32) for length in lengths]
    generator, peer = TextGenerator(network, params, NoVocabulary()), peer_of(config, params)
    cores = len(os.sched_getaffinity(0))
    facts = {"machine": f"{platform.machine()}, {cores} cores", "layers": arguments.layers,
             "source": arguments.source}
    for name, own, stream in (("batch of 8", prompts, False), ("one prompt", prompts[:1], False),
                              ("one prompt, streamed", prompts[:1], True)):
        runs = {"elm_jax": ours_run(generator, own, stream), "transformers": peer_run(peer, own)}
        found = {side: run() for side, run in runs.items()}
        alike = np.mean([one == other for one, other in zip(*found.values(), strict=True)])
        seconds = measure(runs, arguments.rounds, clock)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        ratio = medians["transformers"] / medians["elm_jax"]
        tokens = sum(map(len, found["elm_jax"]))
        print(f"{name}: elm_jax {medians['elm_jax']:.3f} s ({tokens / medians['elm_jax']:.1f} tokens/s), "
              f"transformers {medians['transformers']:.3f} s, ratio {ratio:.2f}, equal texts {alike:.0%}",
              flush=True)
        facts[name] = {**medians, "ratio": ratio, "alike": alike}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
