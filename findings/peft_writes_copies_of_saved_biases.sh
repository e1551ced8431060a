#!/usr/bin/env bash
# One would guess that a PEFT adapter with bias="all" and modules_to_save holds each bias once, under its own name.
# True (peft 0.21.2, transformers 5.24, 2026-11-29): of each module in modules_to_save the file holds its bias three
# times: `ln_f.bias`, the trained one; `ln_f.modules_to_save.bias`, a copy of it; and `ln_f.original_module.bias`, the
# base's own, which no forward pass with this adapter uses.
# Why users care: readers that take names for parameters find parameters that no model has, or take the wrong one of
# three; two adapters that say the same differ in their tensors.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q \
  'torch==2.13.0' 'transformers==5.24.0' 'peft==0.21.2' 'numpy<3'
cd "$place"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PY'
import peft, torch, transformers
from safetensors.torch import load_file

torch.manual_seed(0)
base = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1))
model = peft.get_peft_model(base, peft.LoraConfig(
    task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, bias="all", modules_to_save=["ln_f"]))
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        parameter.data += 0.1 * torch.randn(parameter.shape)
model.save_pretrained("adapter")
stem = "base_model.model.transformer.ln_f."
found = {name.removeprefix(stem): tensor for name, tensor in load_file("adapter/adapter_model.safetensors").items()
         if name.startswith(stem) and name.endswith("bias")}
for name, tensor in sorted(found.items()):
    print(f"ln_f.{name}: {[round(value, 3) for value in tensor.tolist()]}")
assert sorted(found) == ["bias", "modules_to_save.bias", "original_module.bias"], sorted(found)
assert torch.equal(found["bias"], found["modules_to_save.bias"])
assert not torch.equal(found["bias"], found["original_module.bias"])
print(f"peft {peft.__version__}: three tensors for the one bias of ln_f")
PY
