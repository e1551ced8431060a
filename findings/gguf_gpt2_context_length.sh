#!/usr/bin/env bash
# transformers does not load a GGUF file of GPT-2 whose context is not 1,024 tokens.
# One would guess: gpt2.context_length gives the number of positions, as in llama.cpp. True: n_positions
# stays at the config class's default, 1,024, and position_embd.weight of another size does not fit.
# Why it matters: GPT-2 type models of one's own (short contexts in teaching, 2,048 in Cerebras-GPT) cannot be
# brought back from GGUF.
# Versions: transformers 5.24.0, accelerate 1.15.0, gguf 0.19.0, torch 2.13.0. Date: 2026-11-29.
# Exit status: 0 as described, 1 if that has changed. Installs into a temporary folder, which it removes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
export HF_HUB_OFFLINE=1
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys

import gguf
import numpy as np
import torch
import transformers

folder = sys.argv[1]
draw = np.random.default_rng(0)


def write(name, architecture, values, tensors):
    """Writes a GGUF file of metadata and float32 tensors."""
    writer = gguf.GGUFWriter(f"{folder}/{name}", architecture)
    for key, value in values.items():
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add = kinds[type(value)]
        add(f"{architecture}.{key}", value)
    for key, array in tensors.items():
        writer.add_tensor(key, array.astype(np.float32))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {number}" for number in range(64)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(name):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)


def random(*shape):
    return draw.normal(size=shape) * 0.2


VALUES = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 128,
          "attention.head_count": 2, "attention.layer_norm_epsilon": 1e-5, "vocab_size": 64}
TENSORS = {"token_embd.weight": random(64, 32), "position_embd.weight": random(64, 32)}
for name, shape in (("attn_qkv", (96, 32)), ("attn_output", (32, 32)), ("ffn_up", (128, 32)),
                    ("ffn_down", (32, 128))):
    TENSORS |= {f"blk.0.{name}.weight": random(*shape), f"blk.0.{name}.bias": random(shape[0])}
for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
    TENSORS |= {f"{name}.weight": np.ones(32), f"{name}.bias": np.zeros(32)}

write("gpt2.gguf", "gpt2", VALUES, TENSORS)
try:
    load("gpt2.gguf")
except RuntimeError as error:
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file="gpt2.gguf")
    print("n_positions:", config.n_positions, "| vocab_size:", config.vocab_size, "| n_embd:", config.n_embd,
          "|", type(error).__name__, str(error))
    sys.exit(0 if (config.n_positions, config.vocab_size, config.n_embd) == (1024, 64, 32) else 1)
print("loaded")
sys.exit(1)
PYTHON
