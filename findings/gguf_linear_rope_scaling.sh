#!/usr/bin/env bash
# transformers ignores linear scaling of rotary positions in a GGUF file.
# One would guess: llama.rope.scaling.type "linear" and llama.rope.scaling.factor become the config's rope
# parameters. True: they are dropped, and the model runs with rope_type "default".
# Why it matters: models whose context was made longer by position interpolation (factor 4, 8) compute other
# logits at every position but the first.
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
linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
write("linear.gguf", "llama", {**VALUES, **linear}, TENSORS)
plain, scaled = load("plain.gguf"), load("linear.gguf")
kind = scaled.config.rope_parameters["rope_type"]
equal = torch.equal(logits(plain), logits(scaled))
print("rope_type:", kind, "| logits equal to those of the file without scaling:", equal)
sys.exit(0 if kind == "default" and equal else 1)
PYTHON
