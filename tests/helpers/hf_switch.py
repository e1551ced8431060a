"""Small SwitchTransformers of transformers with random parameters, none of them zero."""

import functools
import json
import pathlib

import numpy as np
import torch
import transformers

VOCAB_SIZE = 61
_SIZES = {"vocab_size": VOCAB_SIZE, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 3, "num_layers": 4,
          "num_decoder_layers": 2, "num_experts": 3, "expert_capacity": 2, "dropout_rate": 0.0,
          "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0}
CASES = {
    "tight": _SIZES,
    "ample, own head": {**_SIZES, "expert_capacity": 64, "tie_word_embeddings": False},
    "unlike steps": {**_SIZES, "num_decoder_layers": 3, "num_sparse_decoder_layers": 3, "expert_capacity": 3},
    "no dropping": {**_SIZES, "num_experts": 4, "expert_capacity": 1 << 20},
    "one sparse layer a stack": {**_SIZES, "num_layers": 2, "num_sparse_encoder_layers": 1},
}
"""Configs; in the first one tokens are dropped."""


@functools.cache
def model(name: str) -> torch.nn.Module:
    """The model of a case; routers are drawn wide, so that experts are unlike."""
    found = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**CASES[name]))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, parameter in found.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in path:
                parameter.add_(1.0)
        for stack in (found.encoder, found.decoder):  # an untied head parts them in transformers 5
            stack.embed_tokens.weight.copy_(found.shared.weight)
    return found.eval()


def written(folder: pathlib.Path, name: str, **changes: object) -> pathlib.Path:
    """A case's folder as transformers writes it, with changes of its config."""
    model(name).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def drops(name: str, inputs: np.ndarray, decoder_inputs: np.ndarray) -> int:
    """Tokens without a place in all routers; proves that transformers' routers keep to the capacity."""
    masks, logits = [], []

    def keep(module: torch.nn.Module, given: tuple, found: tuple) -> None:
        masks.append(found[0].numpy())
        logits.append(found[2].numpy())

    routers = [module for module in model(name).modules() if type(module).__name__.endswith("Top1Router")]
    hooks = [router.register_forward_hook(keep) for router in routers]
    outputs(name, inputs, decoder_inputs)
    for hook in hooks:
        hook.remove()
    assert len(masks) == len(routers) > 0
    assert max(mask.sum(axis=1).max() for mask in masks) <= CASES[name]["expert_capacity"]
    for mask, found in zip(masks, logits, strict=True):  # right experts, where there is a place
        assert np.array_equal(mask.argmax(-1)[mask.any(-1)], found.argmax(-1)[mask.any(-1)])
    return sum(int((~mask.any(axis=-1)).sum()) for mask in masks)


def outputs(name: str, inputs: np.ndarray, decoder_inputs: np.ndarray, **more: object):
    """transformers' outputs of tokens i32[B, S], padded with 0, and i32[B, T]."""
    with torch.no_grad():
        return model(name)(input_ids=torch.tensor(inputs).long(),
                           attention_mask=torch.tensor(inputs > 0).long(),
                           decoder_input_ids=torch.tensor(decoder_inputs).long(), **more)
