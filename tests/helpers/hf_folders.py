"""Hugging Face folders as they are published, in small: random weights, configs with those models' fields."""

import json
import pathlib
import shutil

import numpy as np
import safetensors.torch
import torch
import transformers

from elm_jax.vocabularies.vocabulary import train_vocabulary

torch.set_num_threads(1)  # models this small lose most of their time to threads that wait for each other
SIZES = {"d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 3, "num_layers": 2, "vocab_size": 320}
_COMMON = {**SIZES, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
           "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6,
           "pad_token_id": 0, "relative_attention_num_buckets": 32}
_T5_1_1 = {**_COMMON, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
           "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "tie_word_embeddings": False}
PUBLISHED = {
    "t5_1_0": {**_COMMON, "architectures": ["T5WithLMHeadModel"], "model_type": "t5", "n_positions": 512,
               "output_past": True, "task_specific_params": {"summarization": {"num_beams": 4}}},
    "t5_1_0_untied": {**_COMMON, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
                      "feed_forward_proj": "relu", "tie_word_embeddings": False},
    "t5_1_1": {**_T5_1_1, "output_past": True},
    "t5_1_1_tied": {**_T5_1_1, "tie_word_embeddings": True},
    "t5_lm_adapted": {**_T5_1_1, "output_past": True, "torch_dtype": "float32"},
    "t0": {**_T5_1_1, "gradient_checkpointing": False, "torch_dtype": "bfloat16", "use_cache": True,
           "transformers_version": "4.10.0.dev0"},
    "flan_t5": {**_T5_1_1, "n_positions": 512, "output_past": True, "use_cache": True,
                "classifier_dropout": 0.0, "relative_attention_max_distance": 128,
                "transformers_version": "4.23.1"},
    "mt5": {**_COMMON, "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5",
            "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "tie_word_embeddings": False,
            "tokenizer_class": "T5Tokenizer"},
    "byt5": {**_T5_1_1, "num_layers": 5, "num_decoder_layers": 2, "vocab_size": 384,
             "gradient_checkpointing": False, "tokenizer_class": "ByT5Tokenizer"},
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' own model of a family, every weight drawn so that no two leaves are alike."""
    torch.manual_seed(seed)
    values = {name: value for name, value in PUBLISHED[family].items()
              if name not in ("architectures", "torch_dtype", "transformers_version", "model_type")}
    mt5 = PUBLISHED[family]["model_type"] == "mt5"
    config = (transformers.MT5Config if mt5 else transformers.T5Config)(**values)
    model = (transformers.MT5ForConditionalGeneration if mt5
             else transformers.T5ForConditionalGeneration)(config).eval()
    if PUBLISHED[family].get("tie_word_embeddings") is False:
        shape = model.lm_head.weight.shape
        model.lm_head.weight = torch.nn.Parameter(torch.randn(shape) * shape[1] ** -0.5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.copy_(1.0 + 0.2 * torch.randn_like(weight))
            elif "relative_attention_bias" in name:
                weight.copy_(torch.randn_like(weight))
    return model.to(dtype)


def publish(model: transformers.PreTrainedModel, family: str, folder: pathlib.Path,
            shard_size: str = "5GB") -> None:
    """Saves as transformers does, then puts the config there that such a model is published with."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[family]))


def publish_as_torch(model: transformers.PreTrainedModel, family: str, folder: pathlib.Path,
                     **save: bool) -> None:
    """Saves ``pytorch_model.bin`` with the copies and the leftover that the first T5 files have."""
    folder.mkdir()
    state = dict(model.state_dict())
    leftover = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state[leftover] = torch.zeros_like(state[leftover.replace("1.EncDec", "0.Self")])
    torch.save(state, folder / "pytorch_model.bin", **save)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[family]))


def stored(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


def add_vocabulary(folder: pathlib.Path, proto: bytes) -> None:
    """A spiece.model alone, as the oldest folders have it."""
    (folder / "spiece.model").write_bytes(proto)


def copy_of(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A folder to spoil."""
    shutil.copytree(folder, target)
    return target


def tokens(rng: np.random.Generator, rows: int, length: int, vocab_size: int) -> np.ndarray:
    """i32[rows, length]: rows of unlike lengths, padded with 0."""
    ids = rng.integers(2, vocab_size, (rows, length)).astype(np.int32)
    lengths = rng.integers(3, length + 1, rows)
    return np.where(np.arange(length)[None] < lengths[:, None], ids, 0).astype(np.int32)


def make_vocabulary(path: pathlib.Path, texts: list[str], pieces: int = 212) -> bytes:
    """A SentencePiece model of `pieces` pieces."""
    train_vocabulary(texts, path, pieces, seed=0)
    return path.read_bytes()
