#!/usr/bin/env bash
# transformers ignores Llama 3's scaling of rotary positions in a GGUF file.
# One would guess: a Llama 3.1 or 3.2 GGUF computes in transformers what it computes in llama.cpp. True:
# llama.cpp's converter keeps the scaling as a tensor, rope_freqs.weight; transformers drops the tensor and
# runs with rope_type "default".
# Why it matters: the low frequencies are wrong by up to the factor (8 or 32), and no warning says so.
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
          "rope.dimension_count": 16,
          "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 64}
TENSORS = {
    "token_embd.weight": random(64, 32), "output.weight": random(64, 32), "output_norm.weight": np.ones(32),
    "blk.0.attn_norm.weight": np.ones(32), "blk.0.ffn_norm.weight": np.ones(32),
    "blk.0.attn_q.weight": random(32, 32), "blk.0.attn_k.weight": random(32, 32),
    "blk.0.attn_v.weight": random(32, 32), "blk.0.attn_output.weight": random(32, 32),
    "blk.0.ffn_gate.weight": random(64, 32), "blk.0.ffn_up.weight": random(64, 32),
    "blk.0.ffn_down.weight": random(32, 64)}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


write("plain.gguf", "llama", VALUES, TENSORS)
write("llama3.gguf", "llama", VALUES, {**TENSORS, "rope_freqs.weight": np.array([1, 1, 1, 2, 4, 8, 8, 8])})
plain, scaled = load("plain.gguf"), load("llama3.gguf")
kind = scaled.config.rope_parameters["rope_type"]
equal = torch.equal(logits(plain), logits(scaled))
print("rope_type:", kind, "| logits equal to those of the file without rope_freqs.weight:", equal)
sys.exit(0 if kind == "default" and equal else 1)
PYTHON
