#!/usr/bin/env bash
# One would guess that init_lora_weights matters to the start of training alone, and that a saved adapter's logits are
# those of the base plus scale * B A, whatever it says.
# True (peft 0.21.2, 2026-11-29): with "pissa" (and "olora") PEFT changes the base's weights again when it loads the
# saved adapter: the adapter's logits are those of a base without its leading singular values, plus B A.
# Why users care: every other reader of adapter_config.json that adds B A to the base (as servers and converters do)
# gets another model, without an error; init_lora_weights must be read and refused, or computed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q \
  'torch==2.13.0' 'transformers==5.24.0' 'peft==0.21.2' 'numpy<3'
cd "$place"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PY'
import json, pathlib
import peft, torch, transformers
from safetensors.torch import load_file

torch.manual_seed(0)
transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.3)).save_pretrained("base")
tokens = torch.arange(2, 10)[None]

def base():
    return transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)

def said(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits

def loaded():
    return said(peft.PeftModel.from_pretrained(base(), "adapter"))

model = peft.get_peft_model(base(), peft.LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
model.save_pretrained("adapter")
path = pathlib.Path("adapter/adapter_config.json")
config = json.loads(path.read_text())
with_pissa = loaded()
by_hand = base()
weights = load_file("adapter/adapter_model.safetensors")
stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
update = config["lora_alpha"] / config["r"] * weights[stem + "B.weight"] @ weights[stem + "A.weight"]
by_hand.model.layers[0].self_attn.q_proj.weight.data += update
path.write_text(json.dumps(config | {"init_lora_weights": True}))
plain = loaded()
print(f"init_lora_weights in the file: {config['init_lora_weights']!r}")
print(f"PEFT as saved, against base + scale B A: {(with_pissa - said(by_hand)).abs().max():.3g}")
print(f"PEFT with init_lora_weights: true, against base + scale B A: {(plain - said(by_hand)).abs().max():.3g}")
assert (with_pissa - said(by_hand)).abs().max() > 1e-2
assert (plain - said(by_hand)).abs().max() < 1e-5
PY
