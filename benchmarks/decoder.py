"""SmolLM2-135M's shapes on the processor: elm_jax beside transformers and PEFT, measured in turn in a run.

    python benchmarks/decoder.py [--rounds 5] [--only forward,lora,full,scoring,memory,greedy] [--threads 2]

forward: logits of 8 x 128 tokens. lora: a training step of LoRA, rank 8 on every projection, with a frozen
base and AdamW, as `elm train` compiles it; the peer is PEFT. full: a step over all weights. scoring: 4
choices an instance at three shapes; the peers are full passes, and `past_key_values` expanded to the choices.
memory: what scoring holds at once by the compiler's account, for 1, 4 and 16 choices. greedy: 64 tokens,
batch 8 and 1, against `generate`. All float32 with the same random weights, and results must agree;
transformers in bfloat16 is a row of its own. Numbers of one machine: benchmarks/README.md.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_step import add_flags, in_turn, report

from elm_jax.evaluation.rank import score_choices
from elm_jax.experts.overlay import trained_leaves
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.decode import greedy
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.families import network_of
from elm_jax.models.network import Network
from elm_jax.runtime import sharding, trees
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.state import create_state
from elm_jax.training.step import StepConfig, compile_step, make_spec
from elm_jax.types import Padded, Params

CONFIG = DecoderConfig(
    vocab_size=49152, emb_dim=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536, num_layers=30,
    max_length=8192, norm_epsilon=1e-5, rope_base=100_000.0, tied_head=True, pad_id=2, eos_id=2)
BATCH, LENGTH, NEW_TOKENS, CHOICES = 8, 128, 64, 4
SHAPES = {"P 128, C 8": (128, 8), "P 256, C 8": (256, 8), "P 64, C 16": (64, 16)}
"""Tokens of a prompt and of a choice, by the name of the shape."""
MEMORY_SHAPE = (1024, 8)
"""Tokens of a prompt and of a choice, where memory is counted."""
RANK, LEARNING_RATE = 8, 1e-4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Runs = dict[str, Callable[[], object]]


def tokens_of(*shape: int, seed: int = 0) -> np.ndarray:
    """Random tokens i32 of a shape, none of them special."""
    return np.random.default_rng(seed).integers(3, CONFIG.vocab_size, shape).astype(np.int32)


def full_rows(tokens: np.ndarray) -> Padded:
    """Rows without padding."""
    return Padded(tokens, np.full(tokens.shape[:-1], tokens.shape[-1], np.int32))


def transformers_model(params: Params) -> Any:
    """transformers' Llama with our weights."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.emb_dim, intermediate_size=CONFIG.mlp_dim,
        num_hidden_layers=CONFIG.num_layers, num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim, rms_norm_eps=CONFIG.norm_epsilon,
        max_position_embeddings=CONFIG.max_length, tie_word_embeddings=True, pad_token_id=2, eos_token_id=2,
        bos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_base})).eval()
    names = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
             "out": "self_attn.o_proj", "wi_0": "mlp.gate_proj", "wi_1": "mlp.up_proj", "wo": "mlp.down_proj"}
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    state = {"model.embed_tokens.weight": flat["token_embedder/embedding"],
             "model.norm.weight": flat["decoder/final_norm/scale"]}
    for number in range(CONFIG.num_layers):
        ours, theirs = f"decoder/layers_{number}", f"model.layers.{number}"
        state[f"{theirs}.input_layernorm.weight"] = flat[f"{ours}/pre_attention_norm/scale"]
        state[f"{theirs}.post_attention_layernorm.weight"] = flat[f"{ours}/pre_mlp_norm/scale"]
        for part, name in names.items():
            room = "mlp" if name.startswith("mlp") else "attention"
            state[f"{theirs}.{name}.weight"] = flat[f"{ours}/{room}/{part}/kernel"].T
    missing, unexpected = model.load_state_dict({name: torch.tensor(np.ascontiguousarray(value))
                                                 for name, value in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model


def forward(network: Network, params: Params, model: Any) -> Runs:
    """Logits f32[8, 128, V]."""
    import torch

    tokens = tokens_of(BATCH, LENGTH)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens),
             "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)}
    ours = jax.jit(network.logits)
    half = copy.deepcopy(model).bfloat16()
    given = torch.tensor(tokens).long()

    def theirs(own: Any) -> np.ndarray:
        with torch.inference_mode():
            return own(input_ids=given, use_cache=False).logits.float().numpy()

    return {"elm_jax": lambda: np.asarray(ours(params, batch)), "transformers": lambda: theirs(model),
            "transformers, bfloat16": lambda: theirs(half)}


def training_batch() -> dict[str, np.ndarray]:
    """Joined rows i32[8, 128] with the loss on every token but the first."""
    tokens = tokens_of(BATCH, LENGTH + 1)
    return {"tokens": tokens[:, :-1], "target_tokens": tokens[:, 1:],
            "segment_ids": np.ones((BATCH, LENGTH), np.int32),
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)).copy(),
            "loss_weights": np.ones((BATCH, LENGTH), np.float32)}


def our_step(network: Network, params: Params, update: str) -> Callable[[], float]:
    """A step over the leaves of `update` ('adapter' or 'all'); returns the mean loss of a token."""
    optimizer = OptimizerConfig(name="adamw", learning_rate=LEARNING_RATE, weight_decay=0.01)
    batch = training_batch()
    trained = trained_leaves(network.role_of, update) if update == "adapter" else lambda path: True
    overlay, frozen = trees.split(params, trained)
    step = compile_step(make_spec(StepConfig(network, optimizer), frozen, overlay, batch,
                                  sharding.make_mesh(1, 1)))
    frozen = jax.device_put(frozen)
    held = [create_state(jax.tree.map(jnp.copy, overlay), optimizer)]
    placed = jax.device_put(batch)

    def run() -> float:
        held[0], metrics = step(frozen, held[0], placed, np.uint32(0), np.int32(1000))
        return float(metrics["loss"])

    return run


def their_step(model: Any) -> Callable[[], float]:
    """The same over all weights of a PyTorch model that ask for a gradient."""
    import torch

    batch = training_batch()
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad],
                                  lr=LEARNING_RATE, weight_decay=0.01)
    given, targets = (torch.tensor(batch[name]).long() for name in ("tokens", "target_tokens"))

    def run() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=given, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def lora(network: Network, params: Params, model: Any) -> Runs:
    """A step of LoRA on every projection, its base frozen."""
    import peft

    def peer(own: Any) -> Callable[[], float]:
        return their_step(peft.get_peft_model(own, peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS), lora_dropout=0.0)))

    adapted = network_of(CONFIG.with_adapter(AdapterConfig(kind="lora", rank=RANK, targets="all")))
    fresh = jax.device_get(jax.jit(adapted.init)(jax.random.key(1)))
    whole = trees.merge(fresh, params)
    return {"elm_jax": our_step(adapted, whole, "adapter"),
            "transformers + PEFT": peer(copy.deepcopy(model)),
            "transformers + PEFT, bfloat16": peer(copy.deepcopy(model).bfloat16())}


def full(network: Network, params: Params, model: Any) -> Runs:
    """A step over all weights."""
    return {"elm_jax": our_step(network, params, "all"), "transformers": their_step(copy.deepcopy(model)),
            "transformers, bfloat16": their_step(copy.deepcopy(model).bfloat16())}


def scoring(network: Network, params: Params, model: Any, shape: tuple[int, int]) -> Runs:
    """Scores f32[8, 4] of choices."""
    prompt, choice = shape
    prompts, choices = tokens_of(BATCH, prompt), tokens_of(BATCH, CHOICES, choice, seed=1)
    return {
        "elm_jax": lambda: np.asarray(score_choices(network, params, full_rows(prompts), full_rows(choices))),
        "elm_jax, full passes": functools.partial(our_full_passes, network, params, prompts, choices),
        "transformers, full passes": functools.partial(their_full_passes, model, prompts, choices),
        "transformers, expanded cache": functools.partial(their_expanded_cache, model, prompts, choices),
    }


def report_memory(network: Network) -> None:
    """Prints the bytes that scoring holds beside its arguments, for few and many choices of a prompt."""
    prompt, choice = MEMORY_SHAPE
    params = network.abstract_params()
    cache = BATCH * prompt * CONFIG.num_layers * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    print(f"keys and values of {BATCH} prompts of {prompt} tokens: {cache / 2**20:.0f} MiB")

    def rows(*shape: int) -> Padded:
        return Padded(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:-1], jnp.int32))

    for count in (1, CHOICES, 4 * CHOICES):
        program = score_choices.lower(
            network, params, rows(BATCH, prompt), rows(BATCH, count, choice)).compile()
        held = program.memory_analysis().temp_size_in_bytes
        print(f"{count:3d} choices of {choice} tokens: {held / 2**20:.0f} MiB beside weights and inputs; a "
              f"copy of the prompts for each choice would be {count * cache / 2**20:.0f} MiB", flush=True)


@functools.partial(jax.jit, static_argnums=0)
def joined_scores(network: Network, params: Params, tokens: jax.Array, choices: jax.Array) -> jax.Array:
    """Sums f32[N] of log-probabilities of choices i32[N, C] at the end of rows i32[N, P + C]."""
    rows, length = tokens.shape
    logits = network.logits(params, {
        "tokens": tokens, "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))})
    logits = jax.nn.log_softmax(logits[:, -choices.shape[1] - 1:-1])
    return jnp.take_along_axis(logits, choices[..., None], axis=-1)[..., 0].sum(-1)


def our_full_passes(network: Network, params: Params, prompts: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Each choice with a prompt of its own, by our network."""
    rows = np.concatenate([np.repeat(prompts, CHOICES, 0), choices.reshape(-1, choices.shape[-1])], 1)
    found = joined_scores(network, params, rows, choices.reshape(-1, choices.shape[-1]))
    return np.asarray(found).reshape(choices.shape[:2])


def their_full_passes(model: Any, prompts: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Each choice with a prompt of its own."""
    import torch

    own = torch.tensor(choices).long().flatten(0, 1)
    rows = torch.cat([torch.tensor(prompts).long().repeat_interleave(CHOICES, 0), own], 1)
    with torch.inference_mode():
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=own.shape[1] + 1).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, own[..., None])[..., 0].sum(-1)
    return found.reshape(choices.shape[:2]).numpy()


def their_expanded_cache(model: Any, prompts: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """The prompt once, its keys and values repeated for the choices."""
    import torch

    own = torch.tensor(choices).long().flatten(0, 1)
    with torch.inference_mode():
        first = model(input_ids=torch.tensor(prompts).long(), use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(CHOICES)
        rest = model(input_ids=own[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first.logits.repeat_interleave(CHOICES, 0), rest], 1)
        found = logits.log_softmax(-1).gather(-1, own[..., None])[..., 0].sum(-1)
    return found.reshape(choices.shape[:2]).numpy()


def decoding(network: Network, params: Params, model: Any, batch: int) -> Runs:
    """64 tokens after prompts of 64, without an end."""
    import torch

    prompts = tokens_of(batch, 64)
    given = torch.tensor(prompts).long()

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                   max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=2)
        return found[:, prompts.shape[1]:].numpy()

    return {"elm_jax": lambda: np.asarray(greedy(network, params, full_rows(prompts), max_length=NEW_TOKENS,
                                                 eos_id=-1)),
            "transformers": theirs}


def measurements(network: Network, params: Params, model: Any
                 ) -> Iterator[tuple[str, str, Callable[[], Runs]]]:
    """Every measurement: its part, its title, and what makes its runs."""
    given = (network, params, model)
    yield "forward", f"forward, {BATCH} x {LENGTH} tokens", lambda: forward(*given)
    yield "lora", f"LoRA step, {BATCH} x {LENGTH} tokens", lambda: lora(*given)
    yield "full", f"full step, {BATCH} x {LENGTH} tokens", lambda: full(*given)
    for name, shape in SHAPES.items():
        prompt, choice = shape
        bound = CHOICES * (prompt + choice) / (prompt + CHOICES * choice)
        title = f"scoring, {BATCH} instances x {CHOICES} choices, {name}; bound over full passes {bound:.2f}"
        yield "scoring", title, functools.partial(scoring, *given, shape)
    for batch in (BATCH, 1):
        yield "greedy", f"greedy decoding, batch {batch}, {NEW_TOKENS} tokens", functools.partial(
            decoding, *given, batch)


def check(runs: Runs, tolerance: float) -> None:
    """All float32 runs give the same numbers; greedy texts are the same tokens."""
    found = {name: np.asarray(run(), np.float64) for name, run in runs.items() if "bfloat16" not in name}
    for name, values in found.items():
        np.testing.assert_allclose(values, found["elm_jax"], rtol=1e-4, atol=tolerance, err_msg=name)


def main() -> None:
    """Parses the flags, checks that the results agree, prints a table for each measurement."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser)
    parser.add_argument("--only", default="forward,lora,full,scoring,memory,greedy",
                        help="parts, with commas")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    network = network_of(CONFIG)
    params = jax.device_get(jax.jit(network.init)(jax.random.key(0)))
    model = transformers_model(params)
    placed = jax.device_put(params)
    if "memory" in flags.only.split(","):
        report_memory(network)
    for part, title, make in measurements(network, placed, model):
        if part not in flags.only.split(","):
            continue
        print(f"\n{title}", flush=True)
        runs = make()
        check(runs, tolerance=2e-3)
        baseline = next(name for name in reversed(runs) if "bfloat16" not in name)
        report(in_turn(runs, flags.rounds, flags.processor_time), baseline)


if __name__ == "__main__":
    main()
