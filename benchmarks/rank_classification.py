"""Scoring 8 instances x 4 choices: elm_jax against two ways of doing it in transformers, in turn.

    python benchmarks/rank_classification.py [--rounds 5]

Peers: a full forward pass for each choice, and the encoder run once with its states repeated for each
choice. Same weights, float32, on the processor; the scores of all three must agree. Numbers of one
machine: benchmarks/README.md.
"""

import argparse
from collections.abc import Callable

import jax
import numpy as np
from train_step import BATCH, SMALL, SOURCE, add_flags, in_turn, report

from elm_jax.models import T5Config, T5Network
from elm_jax.types import Padded, Params

CHOICES, LENGTH = 4, 16


def make_instances() -> tuple[np.ndarray, np.ndarray]:
    """Random inputs i32[8, 256] and choices i32[8, 4, 16] of unequal length."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, SMALL.vocab_size, (BATCH, SOURCE)).astype(np.int32)
    targets = rng.integers(2, SMALL.vocab_size, (BATCH, CHOICES, LENGTH)).astype(np.int32)
    lengths = rng.integers(1, LENGTH + 1, (BATCH, CHOICES, 1))
    position = np.arange(LENGTH)
    targets = np.where(position == lengths - 1, 1, targets)
    return inputs, np.where(position < lengths, targets, 0).astype(np.int32)


def ours(config: T5Config, params: Params) -> Callable[[], np.ndarray]:
    """Scores f32[B, C] through `target_log_probs`."""
    network = T5Network(config)
    params = jax.device_put(params)
    score = jax.jit(lambda *arguments: network.target_log_probs(*arguments).sum(axis=-1))

    def padded(tokens: np.ndarray) -> Padded:
        return Padded(tokens, (tokens > 0).sum(axis=-1).astype(np.int32))

    return lambda: np.asarray(score(params, *map(padded, make_instances())))


def transformers_model(config: T5Config, params: Params) -> object:
    """transformers' T5 with our weights, its head its own."""
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.emb_dim, d_kv=config.head_dim,
        d_ff=config.mlp_dim, num_heads=config.num_heads, num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    for stack, attentions in (("encoder", 1), ("decoder", 2)):
        ours_stack, theirs = params[stack], getattr(model, stack)
        copy(theirs.final_layer_norm.weight, ours_stack[f"{stack}_norm"]["scale"])
        first = theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        copy(first, ours_stack["relpos_bias"]["rel_embedding"].T)
        for number, block in enumerate(theirs.block):
            copy_layer(block.layer, ours_stack[f"layers_{number}"], attentions)
    copy(model.shared.weight, params["token_embedder"]["embedding"])
    copy(model.lm_head.weight, params["decoder"]["logits_dense"]["kernel"].T)
    return model


def copy(weight: object, value: np.ndarray) -> None:
    """Writes an array into a PyTorch weight."""
    import torch

    weight.data.copy_(torch.tensor(np.asarray(value)))


def copy_layer(theirs: object, layer: Params, attentions: int) -> None:
    """Writes one layer's weights; PyTorch's Linear keeps [out, in]."""
    own = "attention" if attentions == 1 else "self_attention"
    for number, (name, module) in enumerate(
        ((own, "SelfAttention"), ("encoder_decoder_attention", "EncDecAttention"))[:attentions]
    ):
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            linear = getattr(getattr(theirs[number], module), letter)
            copy(linear.weight, layer[name][part]["kernel"].T)
        kind = "cross_attention" if number else own
        copy(theirs[number].layer_norm.weight, layer[f"pre_{kind}_layer_norm"]["scale"])
    for part in ("wi_0", "wi_1", "wo"):
        linear = getattr(theirs[attentions].DenseReluDense, part)
        copy(linear.weight, layer["mlp"][part]["kernel"].T)
    copy(theirs[attentions].layer_norm.weight, layer["pre_mlp_layer_norm"]["scale"])


def transformers_scores(model: object, *, repeat_states: bool) -> np.ndarray:
    """Scores f32[B, C]: one full pass a choice, or states of one encoding repeated for the choices."""
    import torch

    inputs, targets = (torch.tensor(array).long() for array in make_instances())
    with torch.inference_mode():
        mask = (inputs > 0).long()
        if not repeat_states:
            return np.stack([
                log_probs(model(input_ids=inputs, attention_mask=mask,
                                decoder_input_ids=shifted(choice)).logits, choice)
                for choice in targets.unbind(1)
            ], axis=1)
        states = model.encoder(input_ids=inputs, attention_mask=mask).last_hidden_state
        targets = targets.flatten(0, 1)
        logits = model(
            encoder_outputs=(states.repeat_interleave(CHOICES, 0),),
            attention_mask=mask.repeat_interleave(CHOICES, 0), decoder_input_ids=shifted(targets),
        ).logits
        return log_probs(logits, targets).reshape(BATCH, CHOICES)


def shifted(targets: object) -> object:
    """Decoder inputs of targets: the start token 0, then all but the last."""
    import torch

    return torch.nn.functional.pad(targets, (1, 0))[:, :-1]


def log_probs(logits: object, targets: object) -> np.ndarray:
    """Sum of the targets' log-probabilities over the tokens that are no padding."""
    tokens = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (tokens * (targets > 0)).sum(-1).numpy()


def main() -> None:
    """Parses the flags, checks that the scores agree, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser)
    flags = parser.parse_args()
    params = jax.device_get(jax.jit(T5Network(SMALL).init)(jax.random.key(0)))
    model = transformers_model(SMALL, params)
    runs = {
        "elm_jax": ours(SMALL, params),
        "transformers, full passes": lambda: transformers_scores(model, repeat_states=False),
        "transformers, repeated states": lambda: transformers_scores(model, repeat_states=True),
    }
    scores = {name: run() for name, run in runs.items()}
    for name, values in scores.items():
        np.testing.assert_allclose(values, scores["elm_jax"], rtol=1e-4, atol=1e-3, err_msg=name)
    print(f"{BATCH} instances x {CHOICES} choices of up to {LENGTH} tokens, source {SOURCE}; "
          "scores agree")
    seconds = in_turn(runs, flags.rounds, flags.processor_time)
    report(seconds, "transformers, full passes")


if __name__ == "__main__":
    main()
