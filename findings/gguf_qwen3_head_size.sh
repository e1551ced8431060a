#!/usr/bin/env bash
# transformers does not load a GGUF file of Qwen3 whose heads are not of size 128.
# One would guess: qwen3.attention.key_length gives head_dim, as in llama.cpp. True: the key is not mapped, so
# head_dim is the config class's default, 128, and the tensors of another size do not fit.
# Why it matters: Qwen3 models of one's own cannot be brought back from GGUF; the message speaks of shapes,
# not of the missing key.
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


VALUES = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
          "attention.head_count": 2, "attention.head_count_kv": 2, "rope.freq_base": 10000.0,
          "attention.key_length": 32, "attention.value_length": 32,
          "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 64}
TENSORS = {
    "token_embd.weight": random(64, 32), "output.weight": random(64, 32), "output_norm.weight": np.ones(32),
    "blk.0.attn_norm.weight": np.ones(32), "blk.0.ffn_norm.weight": np.ones(32),
    "blk.0.attn_q.weight": random(64, 32), "blk.0.attn_k.weight": random(64, 32),
    "blk.0.attn_v.weight": random(64, 32), "blk.0.attn_output.weight": random(32, 64),
    "blk.0.ffn_gate.weight": random(64, 32), "blk.0.ffn_up.weight": random(64, 32),
    "blk.0.ffn_down.weight": random(32, 64),
    "blk.0.attn_q_norm.weight": np.ones(32), "blk.0.attn_k_norm.weight": np.ones(32)}


write("qwen3.gguf", "qwen3", VALUES, TENSORS)
try:
    load("qwen3.gguf")
except RuntimeError as error:
    size = transformers.AutoConfig.from_pretrained(folder, gguf_file="qwen3.gguf").head_dim
    print("head_dim:", size, "|", type(error).__name__, str(error))
    sys.exit(0 if size == 128 else 1)
print("loaded")
sys.exit(1)
PYTHON
